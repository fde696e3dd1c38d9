"""Versions of transformers that rename what models hand on: wrappers follow the names they know, and refuse others."""

import functools

import pytest
from transformers import DynamicCache
from transformers.models.qwen3 import modeling_qwen3

from flexmsa.integrations.transformers import convert, minimax_m3
from flexmsa.integrations.transformers.versions import cache_name, check_parameters

from .converted import make_dense
from .m3 import make_m3, tokens


def renamed(hidden_states, position_embeddings=None, keys_of_the_past=None, **kwargs):
    attention_interface = print
    attention_interface(**kwargs)


def test_an_attention_whose_cache_has_another_name_is_not_converted(monkeypatch):
    monkeypatch.setattr(modeling_qwen3.Qwen3Attention, "forward", renamed)
    with pytest.raises(
        RuntimeError, match=r"the parameters hidden_states, cache, got hidden_states, .*keys_of_the_past"
    ):
        convert(make_dense())


def test_a_model_of_m3_whose_cache_has_another_name_is_not_registered(monkeypatch):
    monkeypatch.setattr(minimax_m3.modeling.MiniMaxM3VLTextModel, "forward", renamed)
    with pytest.raises(RuntimeError, match=r"expected the parameters self, input_ids, .*see docs/transformers\.md"):
        minimax_m3.register.__wrapped__()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_text_model_takes_the_cache_by_both_names(name):
    """And hands it on by the name that the wrapped function has."""
    seen = []
    signatures = {
        "cache": lambda self, cache=None, **kwargs: seen.append((cache, "past_key_values" in kwargs)),
        "past_key_values": lambda self, past_key_values=None, **kwargs: seen.append(
            (past_key_values, "cache" in kwargs)
        ),
    }
    model = make_m3("flexmsa").model
    cache = DynamicCache()
    for forward in signatures.values():
        functools.partial(minimax_m3._text_model_forward(forward), model)(tokens(1, 4), **{name: cache})
    assert seen == [(cache, False), (cache, False)]


def test_parameters_are_expected_in_order():
    check_parameters(lambda a, b, past_key_values, c: None, "a", "cache", "c")
    assert cache_name(lambda a, past_key_values=None, cache=None: None) == "cache"
    with pytest.raises(RuntimeError, match="got a, cache"):
        check_parameters(lambda a, cache: None, "cache", "a")
