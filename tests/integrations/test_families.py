"""Every kind of dense model that the documents name is converted, or refused at once."""

from pathlib import Path

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flexmsa.integrations.transformers import convert, set_warm_up

from .device import DEVICE
from .families import CONVERTED, REFUSED, VOCABULARY, make, rows

SETTINGS = {"block_size": 4, "topk": 2}
CASES = [(name, settings) for types in CONVERTED.values() for name, settings in types.items()]
REFUSALS = [(name, settings, message) for message, types in REFUSED.values() for name, settings in types.items()]


def known(name: str) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")


@pytest.mark.parametrize(("name", "settings"), CASES, ids=[name for name, _ in CASES])
def test_converted(name, settings):
    known(name)
    model, ids = (
        make(name, settings).to(DEVICE),
        torch.randint(1, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0)),
    )
    ids = ids.to(DEVICE)
    with torch.no_grad():
        dense = model(ids).logits
        torch.manual_seed(1)
        convert(model, SETTINGS)
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4 * dense.abs().max().item())
        set_warm_up(model, False)
        assert (model(ids).logits - dense).abs().max() > 0.01 * dense.abs().max()
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        assert torch.equal(written[:, 24:], model(written).logits.argmax(-1)[:, 23:-1])
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for key, p in model.named_parameters() if "index_q_proj" in key)
    assert torch.isfinite(model.flexmsa.report.index_losses).all()


@pytest.mark.parametrize(("name", "settings", "message"), REFUSALS, ids=[name for name, *_ in REFUSALS])
def test_refused(name, settings, message):
    known(name)
    with torch.device("meta"):
        model = make(name, settings)
    with pytest.raises(ValueError, match=message):
        convert(model, SETTINGS)


def test_the_document_names_them():
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    missing = [row for row in rows() if row not in page]
    assert not missing, "expected in docs/transformers.md:\n" + "\n".join(missing)
