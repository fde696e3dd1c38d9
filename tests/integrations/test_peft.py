"""LoRA on the base of a converted model, its index branches trained whole: phases, save, reload, merge."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

from flexmsa.integrations.transformers import (
    INDEX_MODULES,
    begin_sparse,
    begin_warm_up,
    check_optimizer,
    clip_gradients,
    convert,
    from_pretrained,
    parameter_groups,
)

from .converted import DEVICE, make_converted, make_dense, tokens

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=[*INDEX_MODULES], task_type="CAUSAL_LM")


@pytest.fixture
def model(tmp_path):
    """With adapters, of a converted model that was saved."""
    make_converted().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    return get_peft_model(from_pretrained(tmp_path / "base").to(DEVICE), LORA).train()


def training(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def step(model, optimizer):
    ids = tokens(2, 40)
    model(input_ids=ids, labels=ids).loss.backward()
    base, index = clip_gradients(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return base.item(), index.item()


def test_phases_train_what_peft_trains(model):
    all_of_both = training(model)
    begin_warm_up(model)
    index = {name for name in all_of_both if "index_" in name}
    assert training(model) == index and len(index) == 8
    begin_sparse(model)
    assert training(model) == all_of_both and len(all_of_both) == 16


def test_what_is_trained_is_saved_loaded_and_merged(model, tmp_path):
    begin_warm_up(model)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    check_optimizer(model, optimizer)
    base, index = step(model, optimizer)
    assert base == 0.0 and index > 0.0
    begin_sparse(model)
    base, index = step(model, optimizer)
    assert base > 0.0 and index > 0.0
    ids = tokens(2, 40, seed=1)
    trained = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").to(DEVICE).eval()
    assert torch.equal(loaded(input_ids=ids).logits, trained)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for found in (merged, from_pretrained(tmp_path / "merged").to(DEVICE).eval()):
        torch.testing.assert_close(found(ids).logits, trained)
    untrained = make_converted()(ids).logits
    assert (trained - untrained).abs().max() > 1e-2


def test_phases_of_the_model_and_of_its_peft_model_are_the_same(model):
    all_of_both = training(model)
    begin_warm_up(model)
    begin_sparse(model.base_model.model)
    assert training(model) == all_of_both


def test_index_branches_that_peft_would_not_save_do_not_train():
    adapted = get_peft_model(make_converted(), LoraConfig(target_modules=["q_proj"])).train()
    with pytest.raises(ValueError, match=r"0\.self_attn\.index_q_proj\.weight outside .* modules_to_save"):
        begin_warm_up(adapted)
    with pytest.raises(ValueError, match="modules_to_save"):
        check_optimizer(adapted, torch.optim.SGD(adapted.parameters()))


def test_a_model_with_adapters_is_not_converted():
    adapted = get_peft_model(make_dense(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"expected one without adapters, got model\.layers\.0\.self_attn\.q_proj\.base"
    ):
        convert(adapted.base_model.model)
