"""Packed documents and padding on the left: what each gets alone, which transformers' eager path does not give."""

import itertools

import pytest
import torch
from integrations.device import DEVICE
from integrations.m3 import error, tokens
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

from flexmsa.integrations.transformers.gathered import token_bounds
from flexmsa.integrations.transformers.sequences import row_table

LENGTHS = [30, 1, 41, 28]


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def alone(eager):
    """The logits of each document of tokens(1, 100), run by itself."""
    ends = list(itertools.accumulate(LENGTHS, initial=0))
    with torch.no_grad():
        parts = [eager(tokens(1, 100)[:, start:end]).logits for start, end in itertools.pairwise(ends)]
    return torch.cat(parts, dim=1)


def positions(lengths=tuple(LENGTHS)):
    return torch.cat([torch.arange(n, device=DEVICE) for n in lengths])[None]


@pytest.mark.parametrize("use_cache", [False, True])
def test_documents_by_their_positions(eager, model, alone, use_cache):
    x = tokens(1, 100)
    assert error(model(x, position_ids=positions(), use_cache=use_cache).logits, alone) < 1e-4
    assert error(eager(x, position_ids=positions(), use_cache=use_cache).logits, alone) > 1.0


def test_documents_of_the_flattening_collator(eager, model, alone):
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    batch = collate([{"input_ids": part[0].tolist()} for part in tokens(1, 100).split(LENGTHS, dim=1)])
    del batch["labels"]
    batch = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    assert error(model(**batch, use_cache=False).logits, alone) < 1e-4
    assert error(eager(**batch, use_cache=False).logits, alone) > 1.0
    batch["position_ids"] = None
    offsets_only = model(**batch, use_cache=False).logits
    assert error(offsets_only, alone) < 1e-4


def test_documents_in_several_rows(model, alone):
    x, other = tokens(1, 100), tokens(1, 100, seed=1)
    split = positions([60, 40])
    out = model(torch.cat([other, x]), position_ids=torch.cat([split, positions()])).logits
    assert error(out[1:], alone) < 1e-4
    assert error(out[:1], model(other, position_ids=split).logits) < 1e-4


def test_documents_and_padding_on_the_right(model, alone):
    mask = torch.ones(1, 110, dtype=torch.bool, device=DEVICE)
    mask[:, 100:] = False
    padded = torch.cat([tokens(1, 100), tokens(1, 10, seed=1)], dim=1)
    position_ids = torch.cat([positions(), torch.zeros_like(padded[:, :10])], dim=1)
    out = model(padded, attention_mask=mask, position_ids=position_ids).logits
    assert error(out[:, :100], alone) < 1e-4


@pytest.mark.parametrize("static", [False, True])
def test_the_last_document_goes_on_from_a_cache(model, alone, static):
    cache = StaticCache(model.config, max_cache_len=128) if static else DynamicCache(config=model.config)
    chunks = [
        model(chunk, position_ids=at, past_key_values=cache).logits
        for chunk, at in zip(
            tokens(1, 100).split([50, 20, 1, 29], dim=1), positions().split([50, 20, 1, 29], dim=1), strict=True
        )
    ]
    assert error(torch.cat(chunks, dim=1), alone) < 1e-4


@pytest.mark.parametrize("with_positions", [False, True])
def test_padding_on_the_left(eager, model, with_positions):
    x = tokens(2, 100)
    mask = torch.arange(100, device=DEVICE) >= torch.tensor([[0], [37]], device=DEVICE)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0) if with_positions else None
    alone = eager(x[1:, 37:]).logits
    padded = [m(x, attention_mask=mask, position_ids=position_ids).logits[1:, 37:] for m in (eager, model)]
    assert error(padded[1], alone) < 1e-4
    assert error(padded[0], alone) > 1.0


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_from_prompts_padded_on_the_left(eager, model, cache):
    x = tokens(1, 40)
    batch = torch.cat([torch.cat([torch.zeros_like(x[:, :17]), x], dim=1), tokens(1, 57, seed=3)])
    mask = torch.arange(57, device=DEVICE) >= torch.tensor([[17], [0]], device=DEVICE)
    settings = {"max_new_tokens": 40, "do_sample": False}
    alone = eager.generate(x, **settings)[0]
    together = model.generate(batch, attention_mask=mask.long(), cache_implementation=cache, **settings)
    assert together[0, 17:].equal(alone)
    assert not eager.generate(batch, attention_mask=mask.long(), **settings)[0, 17:].equal(alone)


def test_the_mask_that_generate_makes_for_a_static_cache(model):
    x = tokens(2, 57)
    mask = torch.arange(57, device=DEVICE) >= torch.tensor([[17], [0]], device=DEVICE)
    cache = StaticCache(model.config, max_cache_len=64)
    masks = create_masks_for_generate(model.config, torch.empty(2, 57, 0, device=DEVICE), mask.long(), cache)
    prepared = model(x, attention_mask=masks, past_key_values=cache).logits
    assert error(prepared[mask], model(x, attention_mask=mask).logits[mask]) < 1e-4


def test_masks_that_cannot_be_followed_are_refused(model):
    x = tokens(1, 20)
    with pytest.raises(ValueError, match=r"expected \[B, 20\], 0 keys in the cache and 20 new ones, got \[1, 19\]"):
        model(x, attention_mask=torch.ones_like(x[:, :19]))
    with pytest.raises(ValueError, match="a mask for each query needs"):
        model(x, attention_mask=torch.ones(1, 1, 20, 20, device=DEVICE))
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected one packed row, B = 1, got B=2"):
        model(x.repeat(2, 1), cu_seq_lens_q=torch.tensor([0, 20], dtype=torch.int32, device=DEVICE))


def test_a_table_of_rows():
    """Two rows behind 4 cached keys: padding in the cache; a document that ends, one that starts, and padding."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]], device=DEVICE)
    position_ids = torch.tensor([[2, 3, 4], [4, 0, 0]], device=DEVICE)
    bounds = token_bounds(mask.bool())
    table = row_table(bounds, position_ids, tokens(2, 3), past=4)
    assert table.tolist() == [[0, 0, 3, 2, 7], [1, 0, 1, 0, 5], [1, 1, 2, 5, 6], [1, 2, 3, 0, 0]]
    assert row_table(bounds, None, tokens(2, 3), past=4).tolist() == [
        [0, 0, 3, 2, 7],
        [1, 0, 0, 0, 0],
        [1, 0, 2, 0, 6],
        [1, 2, 3, 0, 0],
    ]


def test_positions_within_padding_start_no_sequences():
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0]], device=DEVICE)
    position_ids = torch.tensor([[0, 0, 0, 0, 1, 2, 0, 0, 0]], device=DEVICE)
    table = row_table(token_bounds(mask.bool()), position_ids, tokens(1, 9), past=0)
    assert table.tolist() == [[0, 0, 6, 3, 6], [0, 6, 9, 0, 0]]
