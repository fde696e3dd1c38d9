"""transformers' exporters take the model as a graph: a forward, and a generation's prefill and decode step."""

import copy

import pytest
import torch
from integrations import converted, m3
from transformers import GenerationConfig
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.utils import decompose_for_generation

pytestmark = pytest.mark.usefixtures("no_grad")
MODELS = {"m3": lambda: m3.make_m3("flexmsa", **m3.SMALL), "converted": converted.make_converted}
STATIC = GenerationConfig(cache_implementation="static", max_cache_len=64, pad_token_id=0)
DYNAMIC = GenerationConfig(pad_token_id=0)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def prompt(batch=2, length=40):
    """The second row is padded on the left."""
    ids = converted.tokens(batch, length)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(run, inputs):
    # A static cache is written to.
    return run(**copy.deepcopy(inputs))["logits"]


def graphs_of(exported):
    """Name -> module; transformers 5.24 has a class for what 5.17 returned as it is."""
    if hasattr(exported, "components"):
        exported = {name: component.program for name, component in exported.components.items()}
    exported = exported if isinstance(exported, dict) else {"model": exported}
    return {name: program.module() for name, program in exported.items()}


def captured(model, given, settings):
    """What `generate` calls the model with, in a prefill and a step, without what exporters know themselves."""
    calls = decompose_for_generation(model, given, generation_config=settings)
    own = {"use_cache", "return_dict"}
    return {name: {key: x for key, x in inputs.items() if key not in own} for name, (_, inputs) in calls.items()}


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_forward(model, dynamic):
    exported = DynamoExporter().export(model, {**prompt(), "use_cache": False}, DynamoConfig(dynamic=dynamic))
    run = graphs_of(exported)["model"]
    for inputs in [prompt(), prompt(3, 57)] if dynamic else [prompt()]:
        inputs["attention_mask"][0, 33:] = 0
        mask = inputs["attention_mask"].bool()
        torch.testing.assert_close(logits(run, inputs)[mask], logits(model, inputs)[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_a_prefill_and_a_decode_step(model, settings):
    config = DynamoConfig(dynamic=settings is DYNAMIC)
    graphs = graphs_of(DynamoExporter().export_for_generation(model, prompt(), config, generation_config=settings))
    for given in [prompt(), prompt(3, 57)] if settings is DYNAMIC else [prompt()]:
        mask = given["attention_mask"].bool()
        for name, inputs in captured(model, given, settings).items():
            actual, expected = logits(graphs[name], inputs), logits(model, inputs)
            kept = mask if name == "prefill" else torch.ones_like(mask[:, :1])
            torch.testing.assert_close(actual[kept], expected[kept], atol=1e-4, rtol=0)


def test_the_inputs_are_those_of_the_model(model):
    for inputs in captured(model, prompt(), DYNAMIC).values():
        assert set(inputs) - {"cache", "past_key_values"} == {"input_ids", "attention_mask", "position_ids"}
