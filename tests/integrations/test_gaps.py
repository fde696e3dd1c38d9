"""Padding between tokens: each row gives what its tokens give alone, without the padding."""

import copy

import pytest
import torch
from integrations import converted, m3
from integrations.device import DEVICE
from transformers import CompileConfig, DynamicCache, StaticCache

from flexmsa.integrations.transformers import IndexLosses
from flexmsa.integrations.transformers.sequences import gathered_rows

pytestmark = pytest.mark.usefixtures("no_grad")
MODELS = {"m3": lambda: m3.make_m3("flexmsa"), "converted": converted.make_converted}
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(model.config, max_cache_len=96),
}
each_cache = pytest.mark.parametrize("new_cache", CACHES.values(), ids=CACHES)
LENGTH = 60


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def tokens(*shape, seed=0):
    return converted.tokens(*shape, seed=seed)


def gaps():
    """Two holes; one hole, and padding on both sides; padding on the right; on the left; none."""
    mask = torch.ones(5, LENGTH, dtype=torch.bool, device=DEVICE)
    mask[0, 10:13] = mask[0, 30:47] = False
    mask[1, :5] = mask[1, 20:21] = mask[1, 55:] = False
    mask[2, 40:] = False
    mask[3, :7] = False
    return mask


def counted(mask):
    """The positions that `generate` makes of a mask."""
    return (mask.long().cumsum(1) - 1).masked_fill(~mask.bool(), 0)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def alone(model, ids, mask):
    """The logits of each row's tokens without padding, one row at a time, put back where the tokens are."""
    logits = torch.zeros(*ids.shape, model.config.vocab_size, device=DEVICE)
    for row, kept in enumerate(mask):
        logits[row, kept] = model(ids[row : row + 1, kept], use_cache=False).logits[0]
    return logits


def test_a_forward(model):
    ids, mask = tokens(5, LENGTH), gaps()
    logits = model(ids, attention_mask=mask, position_ids=counted(mask), use_cache=False).logits
    assert_close(logits[mask], alone(model, ids, mask)[mask])


@each_cache
@pytest.mark.parametrize("sizes", [[30, 30], [25, 1, 20, 14], [11, 1, 1, 47]])
def test_chunks_and_steps_with_a_cache(model, new_cache, sizes):
    ids, mask = tokens(5, LENGTH), gaps()
    cache, found, end = new_cache(model), [], 0
    for chunk, at in zip(ids.split(sizes, dim=1), counted(mask).split(sizes, dim=1), strict=True):
        end += chunk.shape[1]
        found.append(model(chunk, attention_mask=mask[:, :end], position_ids=at, past_key_values=cache).logits)
    assert_close(torch.cat(found, dim=1)[mask], alone(model, ids, mask)[mask])


@each_cache
def test_steps_from_prompts_padded_on_the_right(model, new_cache):
    ids, lengths = tokens(3, 40), torch.tensor([40, 23, 7], device=DEVICE)
    prompt = torch.arange(28, device=DEVICE) < (lengths - 12).clamp(min=1)[:, None]
    mask = torch.cat([prompt, torch.ones(3, 12, dtype=torch.bool, device=DEVICE)], dim=1)
    at, cache = counted(mask), new_cache(model)
    model(ids[:, :28], attention_mask=prompt, position_ids=at[:, :28], past_key_values=cache)
    steps = []
    for i in range(28, 40):
        # A copy of a chat's cache goes on like the cache.
        cache = copy.deepcopy(cache) if i == 30 else cache
        step = {"attention_mask": mask[:, : i + 1], "position_ids": at[:, i : i + 1], "past_key_values": cache}
        steps.append(model(ids[:, i : i + 1], **step).logits)
    assert_close(torch.cat(steps, dim=1), alone(model, ids, mask)[:, 28:])


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_from_pad_ids_in_a_prompt(model, cache):
    """`generate` makes a mask of them."""
    ids, mask = tokens(3, LENGTH), gaps()[:3]
    mask[1:, 40:] = True
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids.masked_fill(~mask, 0), cache_implementation=cache, **settings)
    for row, kept in enumerate(mask):
        assert together[row, LENGTH:].equal(model.generate(ids[row : row + 1, kept], **settings)[0, kept.sum() :])


def test_a_chat_whose_answers_have_different_lengths(model):
    """What follows an answer that ended early is padding in the kept cache."""
    # With other tokens, logits are as good as equal, and rounding decides between them.
    first, second = tokens(2, 20, seed=1), tokens(2, 15, seed=2)
    settings = {"max_new_tokens": 10, "do_sample": False}
    cache = DynamicCache(config=model.config)
    answered = model.generate(first, past_key_values=cache, **settings)
    mask = torch.ones(2, 45, dtype=torch.bool, device=DEVICE)
    mask[1, 24:30] = False
    ids = torch.cat([answered, second], dim=1)
    together = model.generate(ids, attention_mask=mask.long(), past_key_values=cache, **settings)
    for row in range(2):
        expected = model.generate(ids[row : row + 1, mask[row]], **settings)[0, -10:]
        assert together[row, 45:].equal(expected)


def test_positions_that_count_the_padding_or_start_anew_behind_it():
    """A dense model defines what positions mean: those that count the padding, and those of `generate`, which count
    on from a padding's 0."""
    model, dense = converted.make_converted(warm_up=True), converted.make_dense()
    ids, mask = tokens(5, LENGTH), gaps()
    expected = dense(ids, attention_mask=mask).logits
    assert_close(model(ids, attention_mask=mask).logits[mask], expected[mask])
    at = torch.arange(LENGTH, device=DEVICE)[None]
    assert_close(model(ids, attention_mask=mask, position_ids=at).logits[mask], expected[mask])
    prompt = mask[:3].clone()
    prompt[:, 48:] = False
    written = model.generate(ids[:3], attention_mask=prompt.long(), max_new_tokens=8, do_sample=False)
    mask = torch.cat([prompt, torch.ones(3, 8, dtype=torch.bool, device=DEVICE)], dim=1)
    at = torch.cat([counted(prompt), torch.arange(1, 9, device=DEVICE).expand(3, 8)], dim=1)
    # The first is of the logits of a padding, which is nothing to compare.
    chosen = dense(written, attention_mask=mask, position_ids=at).logits[:, LENGTH:-1].argmax(-1)
    assert written[:, LENGTH + 1 :].equal(chosen)


def test_more_of_minimax_m3_against_its_own_attention():
    """With all blocks selected, transformers' own M3 does not count blocks, so it is right with padding anywhere where
    positions count it."""
    eager, model = (m3.make_m3(name, index_topk_blocks=99) for name in ("eager", "flexmsa"))
    ids, mask = tokens(5, LENGTH), gaps()
    assert_close(model(ids, attention_mask=mask).logits[mask], eager(ids, attention_mask=mask).logits[mask])


def test_documents_with_padding_between_and_inside_them(model):
    ids = tokens(1, 57)
    mask = torch.ones(1, 57, dtype=torch.bool, device=DEVICE)
    mask[0, 20:27] = mask[0, 40:43] = False
    at = torch.cat([torch.arange(n, device=DEVICE) for n in (20, 7, 13, 3, 14)])[None]
    at[0, 43:] += 13
    logits = model(ids, attention_mask=mask, position_ids=at).logits
    assert_close(logits[:, :20], model(ids[:, :20]).logits)
    second = torch.cat([ids[:, 27:40], ids[:, 43:]], dim=1)
    assert_close(torch.cat([logits[:, 27:40], logits[:, 43:]], dim=1), model(second).logits)


@each_cache
def test_padding_behind_rows_without_positions_is_not_behind_documents(model, new_cache):
    ids, mask, cache = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.bool, device=DEVICE), new_cache(model)
    mask[0, :5] = mask[1, 35:40] = False
    model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
    logits = model(ids[:, 30:], attention_mask=mask, past_key_values=cache).logits
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    assert_close(logits[mask[:, 30:]], expected[:, 30:][mask[:, 30:]])


@pytest.mark.parametrize("on_the_right", [False, True])
def test_padding_behind_several_documents_in_a_cache_is_refused(model, on_the_right):
    ids, cache = tokens(1, 40), DynamicCache(config=model.config)
    at = torch.cat([torch.arange(n, device=DEVICE) for n in (13, 17, 10)])[None]
    mask = torch.ones_like(ids)
    mask[0, (25 if on_the_right else 32) : 33] = 0
    model(ids[:, :30], attention_mask=mask[:, :30], position_ids=at[:, :30], past_key_values=cache)
    with pytest.raises(ValueError, match="after several documents of a row in the cache"):
        model(ids[:, 30:], attention_mask=mask, position_ids=at[:, 30:], past_key_values=cache)


@each_cache
@pytest.mark.parametrize("with_offsets", [False, True])
def test_documents_that_came_one_by_one_or_by_offsets_are_refused_too(model, new_cache, with_offsets):
    """Until the cache is used for other tokens."""
    ids, cache = tokens(1, 40), new_cache(model)
    at = torch.cat([torch.arange(n, device=DEVICE) for n in (13, 27)])[None]
    if with_offsets:
        offsets = torch.tensor([0, 13, 30], dtype=torch.int32, device=DEVICE)
        documents = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 17, "max_length_k": 17}
        model(ids[:, :30], position_ids=at[:, :30], past_key_values=cache, **documents)
    else:
        model(ids[:, :13], past_key_values=cache)
        model(ids[:, 13:30], position_ids=at[:, 13:30], past_key_values=cache)
    mask = torch.ones_like(ids)
    mask[0, 33:35] = 0
    with pytest.raises(ValueError, match="after several documents of a row in the cache"):
        model(ids[:, 30:], attention_mask=mask, position_ids=at[:, 30:], past_key_values=cache)
    if isinstance(cache, StaticCache):
        cache.reset()
        model(ids[:, :30], past_key_values=cache)
        logits = model(ids[:, 30:], attention_mask=mask, past_key_values=cache).logits
        expected = model(ids, attention_mask=mask, use_cache=False).logits[:, 30:]
        assert_close(logits[mask[:, 30:] == 1], expected[mask[:, 30:] == 1])


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_losses_and_gradients(make):
    """Those of the same rows padded on the right."""
    ids, mask = tokens(2, LENGTH), gaps()[:2]
    model = make().train()

    def gradients(ids, mask):
        losses = {"index_losses": IndexLosses()} if make is MODELS["m3"] else {}
        model.zero_grad()
        with torch.enable_grad():
            out = model(ids, attention_mask=mask, position_ids=counted(mask), use_cache=False, **losses)
            scores = out.logits[mask].logsumexp(-1).sum()
            index_loss = out.index_loss
            (scores + index_loss).backward()
        return scores, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    found = gradients(ids, mask)
    expected = gradients(ids.gather(1, order), mask.gather(1, order))
    torch.testing.assert_close(found, expected)


def test_measuring_a_selection():
    model, ids, mask = converted.make_converted(), tokens(2, LENGTH), gaps()[:2]
    model.flexmsa.with_health = True
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    reports = []
    for x, m in ((ids, mask), (ids.gather(1, order), mask.gather(1, order))):
        model(x, attention_mask=m, position_ids=counted(m))
        reports.append(model.flexmsa.report)
    assert reports[0].health
    torch.testing.assert_close(reports[0].health, reports[1].health)


def test_measuring_a_checkpointed_layer():
    model, ids, mask = converted.make_converted().train(), tokens(2, LENGTH), gaps()[:2]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for model.flexmsa.with_health in (False, True):
        model.zero_grad()
        with torch.enable_grad():
            out = model(ids, attention_mask=mask, position_ids=counted(mask), use_cache=False)
            (out.logits.sum() + out.index_loss).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(model.flexmsa.report.health) == 2
    converted.assert_same(*gradients)


@pytest.mark.parametrize("make", [lambda: m3.make_m3("flexmsa", **m3.SMALL), converted.make_converted], ids=MODELS)
def test_generating_into_a_static_cache_compiles_once(make):
    model, ids, mask = make(), tokens(3, LENGTH), gaps()[:3].long()
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **settings)
    compiling = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = model.generate(ids, **settings, cache_implementation="static", compile_config=compiling)
    assert actual.equal(expected)


def test_a_graph_fails_where_no_earlier_forward_has_found_the_padding():
    model, ids, mask = converted.make_converted(), tokens(5, LENGTH), gaps()
    step = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match="got padding between tokens, which no eager forward"):
        step(ids, attention_mask=mask, use_cache=False)


def test_a_table_of_gathered_rows():
    filled = torch.tensor([[1, 0, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0, 0, 0]], device=DEVICE).bool()
    position_ids = torch.tensor([[2, 3, 0, 4], [3, 0, 0, 0]], device=DEVICE)
    rows = gathered_rows(filled, position_ids, tokens(2, 4), past=4)
    assert rows.keys.tolist() == [[0, 2, 4, 5, 7, 1, 3, 6], [1, 2, 3, 4, 0, 5, 6, 7]]
    assert rows.queries.tolist() == [[0, 1, 3, 2], [0, 1, 2, 3]]
    assert rows.table.tolist() == [[0, 0, 3, 0, 5], [0, 3, 4, 0, 0], [1, 0, 1, 0, 4], [1, 1, 4, 0, 0]]
    x = torch.arange(8, device=DEVICE)[None, None, :, None].expand(2, 3, 8, 2)
    assert rows.gather_keys(x)[0, 2, :, 1].tolist() == rows.keys[0].tolist()
    assert rows.restore(rows.gather_queries(x[:, :, :4])).equal(x[:, :, :4])
