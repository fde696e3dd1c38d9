"""Plots of selections. They need matplotlib, imported only when called: `pip install flexmsa[plot]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexmsa import validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

__all__ = ["plot_selection", "selection_share"]

# Colours of Okabe and Ito, which colour-blind readers can distinguish, for all pictures of the project.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"

# The most panels in a row.
COLUMNS = 4
# The most blocks that are drawn with sharp edges, several pixels each.
SHARP_BLOCKS = 256


def plot_selection(
    block_indices: Tensor,
    *,
    batch: int = 0,
    block_size: int | None = None,
    max_rows: int = 128,
    title: str | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Draw which blocks of keys the queries selected: one panel per group, queries from top to bottom, blocks from
    left to right.

    In a long sequence one picture row stands for several queries, and the colour is the share of them that selected a
    block. Blocks that no query of a row sees are grey. The local blocks, always selected, form the staircase edge.

    Args:
        block_indices: [B, Hkv, Sq, topk] int32 or int64, -1 for no block, as `flexmsa.select_blocks` returns it.
        batch: the row of the batch to draw.
        block_size: keys per block, for the label of the axis.
        max_rows: the most picture rows per panel.
        title: the title above all panels.
        figure: a Figure or SubFigure to draw into; None makes one, sized for the number of groups.

    Returns:
        The Figure, or the Figure that contains the SubFigure. It gets one axes per group, then one for the colour bar.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, TypeError: an argument is not as described.

    >>> index_q, index_k = torch.randn(1, 2, 256, 8), torch.randn(1, 1, 256, 8)
    >>> from flexmsa import select_blocks
    >>> figure = plot_selection(select_blocks(index_q, index_k, block_size=16, topk=4), block_size=16)
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['group 0', 'group 1']
    """
    share = selection_share(block_indices, batch=batch, max_rows=max_rows)
    if block_size is not None:
        validation.check_int("block_size", block_size, 1)
    groups, queries = block_indices.shape[1:3]
    columns = min(groups, COLUMNS)
    rows = -(-groups // columns)
    if figure is None:
        figure = _new_figure(rows, columns)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[groups:]:
        axes.remove()
    for group, axes in enumerate(panels.flat[:groups]):
        image = _draw(axes, share[group], queries)
        axes.set_title(f"group {group}", fontsize="medium")
    for axes in panels[-1]:
        axes.set_xlabel("key block" if block_size is None else f"key block ({block_size} tokens each)")
    for axes in panels[:, 0]:
        axes.set_ylabel("query (token)")
    per_row = -(-queries // share.shape[1])
    label = "selected (1) or not (0)" if per_row == 1 else f"share of {per_row} queries that selected it"
    figure.colorbar(image, ax=list(panels.flat[:groups]), label=label, ticks=[0, 0.5, 1], pad=0.02)
    if title is not None:
        figure.suptitle(title, fontsize="large")
    return figure.figure


def selection_share(block_indices: Tensor, *, batch: int = 0, max_rows: int = 128) -> Tensor:
    """Return the colours of `plot_selection`: shares of a selection in rows of consecutive queries.

    Args:
        block_indices: [B, Hkv, Sq, topk]; the newest selected block of a query counts as the last that it sees.

    Returns:
        [Hkv, rows, blocks] float32 with rows <= max_rows: the share of a row's queries that selected a block, NaN where
        no query of the row sees it.

    >>> selection_share(torch.tensor([[[[0, -1], [0, -1], [0, 1], [1, -1]]]]), max_rows=2)
    tensor([[[1.0000,    nan],
             [0.5000, 1.0000]]])
    """
    _check_selection(block_indices, batch)
    validation.check_int("max_rows", max_rows, 1)
    ids = block_indices[batch].detach().cpu().long().sort(-1).values
    groups, queries, _ = ids.shape
    blocks = max(1, int(ids.max()) + 1)
    per_row = -(-queries // max_rows)
    rows = -(-queries // per_row)
    row = torch.arange(queries) // per_row
    first = torch.arange(groups)[:, None] * rows + row
    counted = ids >= 0
    # An id given twice counts once.
    counted[..., 1:] &= ids[..., 1:] != ids[..., :-1]
    cells = (first[..., None] * blocks + ids)[counted]
    selected = torch.bincount(cells, minlength=groups * rows * blocks).view(groups, rows, blocks)
    share = selected / torch.bincount(row)[:, None]
    newest = torch.full((groups * rows,), -1).scatter_reduce(0, first.flatten(), ids[..., -1].flatten(), "amax")
    return share.masked_fill(torch.arange(blocks) > newest.view(groups, rows, 1), torch.nan)


def decorate(axes: Axes, title: str, size: str = "medium") -> None:
    """Give a panel its title and grid, and no frame."""
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold")
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _check_selection(block_indices: Tensor, batch: int) -> None:
    if not isinstance(block_indices, Tensor):
        raise TypeError(f"block_indices: expected a tensor [B, Hkv, Sq, topk], got {type(block_indices).__name__}")
    if block_indices.dim() != 4 or 0 in block_indices.shape:
        raise ValueError(f"block_indices: expected [B, Hkv, Sq, topk], none of them 0, got {list(block_indices.shape)}")
    batches, groups, queries, _ = block_indices.shape
    validation.check_block_indices(block_indices, batches, groups, queries, block_indices.device)
    validation.check_int("batch", batch, 0)
    if batch >= batches:
        raise ValueError(f"batch: expected a row of block_indices, 0 to {batches - 1}, got {batch}")


def _new_figure(rows: int, columns: int) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting: expected matplotlib, which is not installed; pip install flexmsa[plot]") from error
    return Figure(figsize=(1.6 + 3.4 * columns, 0.9 + 3.3 * rows), dpi=120, layout="constrained")


def _draw(axes: Axes, share: Tensor, queries: int) -> AxesImage:
    """Draw share [rows, blocks] over an area of `queries` by blocks."""
    from matplotlib import colormaps

    blocks = share.shape[1]
    return axes.imshow(
        share.numpy(),
        cmap=colormaps["YlGnBu"].with_extremes(bad="0.85"),
        vmin=0,
        vmax=1,
        aspect="auto",
        extent=(-0.5, blocks - 0.5, queries, 0),
        interpolation="nearest" if blocks <= SHARP_BLOCKS else "antialiased",
    )
