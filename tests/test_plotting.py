"""Pictures of a selection."""

import sys

import pytest
import torch

from flexmsa import select_blocks
from flexmsa.plotting import plot_selection, selection_share


def _selection(groups, queries, topk=3):
    index_q, index_k = torch.randn(2, groups, queries, 4), torch.randn(2, 1, queries, 4)
    return select_blocks(index_q, index_k, block_size=8, topk=topk)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_one_panel_a_group(groups, tmp_path):
    pytest.importorskip("matplotlib")
    figure = plot_selection(_selection(groups, 50), batch=1, block_size=8, title="A selection")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [f"group {group}" for group in range(groups)]
    assert len(figure.axes) == groups + 1
    assert panels[0].get_ylabel() == "query (token)"
    figure.savefig(tmp_path / "selection.png")


def test_it_draws_into_a_part_of_a_figure():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    upper, lower = figure.subfigures(2, 1)
    assert plot_selection(_selection(2, 20), figure=upper) is figure
    assert (len(upper.axes), len(lower.axes)) == (3, 0)


@pytest.mark.parametrize("queries", [1, 7, 50, 301])
def test_every_choice_is_counted_once(queries):
    chosen = _selection(2, queries)
    share = selection_share(chosen, batch=1, max_rows=16)
    assert share.shape[1] <= 16
    per_row = -(-queries // 16)
    sizes = torch.tensor([min(per_row, queries - first) for first in range(0, queries, per_row)])
    counts = share.nan_to_num(0).sum(-1) * sizes
    torch.testing.assert_close(counts.sum(-1), (chosen[1] >= 0).sum((-1, -2)).float())
    repeated = torch.cat([chosen, chosen.flip(-1)], dim=-1)
    torch.testing.assert_close(selection_share(repeated, batch=1, max_rows=16), share, equal_nan=True)


def test_blocks_not_yet_seen_are_told_from_blocks_not_chosen():
    share = selection_share(_selection(1, 40, topk=1))
    newest = torch.arange(40)[:, None] // 8
    block = torch.arange(5)
    assert torch.equal(share[0].isnan(), block > newest)
    assert torch.equal(share[0] == 1, block == newest)


def test_rows_without_any_block_are_empty():
    assert selection_share(torch.full((1, 1, 4, 2), -1)).isnan().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block_indices": [[0]]}, TypeError, "block_indices: expected a tensor"),
        ({"block_indices": torch.zeros(3, 4, dtype=torch.int32)}, ValueError, r"expected \[B, Hkv, Sq, topk\]"),
        ({"block_indices": torch.zeros(1, 1, 0, 1, dtype=torch.int32)}, ValueError, "none of them 0"),
        ({"block_indices": torch.zeros(1, 1, 4, 1)}, TypeError, "expected int32 or int64"),
        ({"batch": 2}, ValueError, "batch: expected a row"),
        ({"batch": -1}, ValueError, "batch: expected an int >= 0"),
        ({"max_rows": 0}, ValueError, "max_rows: expected an int >= 1"),
        ({"block_size": 0}, ValueError, "block_size: expected an int >= 1"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        plot_selection(**{"block_indices": _selection(1, 16), **arguments})


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install flexmsa\[plot\]"):
        plot_selection(_selection(1, 16))
