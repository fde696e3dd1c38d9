"""`benchmarks.transformers_tests` on a checkout of a few small tests, in place of transformers' own."""

import json

import pytest

from benchmarks import transformers_tests

TESTS = """
import copy, tempfile, unittest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

CONFIG = Qwen3Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=16, bos_token_id=None, eos_token_id=None)
IDS = torch.arange(1, 31)[None]


class Tests(unittest.TestCase):
    def test_forward(self):
        for _ in range(2):
            Qwen3ForCausalLM(CONFIG)(IDS)

    def test_that_only_a_dense_model_passes(self):
        self.assertFalse(hasattr(Qwen3ForCausalLM(CONFIG), "flexmsa"))

    def test_a_mask_for_each_query(self):
        Qwen3ForCausalLM(CONFIG)(IDS, attention_mask=torch.ones(1, 1, 30, 30, dtype=torch.bool))

    def test_a_model_whose_attention_is_named(self):
        for make in (Qwen3ForCausalLM._from_config, AutoModelForCausalLM.from_config):
            model = make(copy.deepcopy(CONFIG), attn_implementation="sdpa")
            self.assertFalse(hasattr(model, "flexmsa"))

    def test_saved(self):
        model = Qwen3ForCausalLM(CONFIG)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            for load in (Qwen3ForCausalLM, AutoModelForCausalLM):
                torch.testing.assert_close(load.from_pretrained(folder)(IDS).logits, model(IDS).logits)

    def test_sdpa_can_dispatch(self):
        self.assertEqual(Qwen3ForCausalLM(CONFIG).config._attn_implementation, "sdpa")

    def test_that_fails(self):
        self.fail()

    @unittest.skip("not here")
    def test_that_is_skipped(self): ...
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    path = tmp_path / "checkout" / transformers_tests.FILES["qwen3"]
    path.parent.mkdir(parents=True)
    path.write_text(TESTS)
    monkeypatch.setattr(transformers_tests, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(transformers_tests, "RESULT", tmp_path / "transformers.json")
    return tmp_path / "checkout"


def test_it_finds_what_only_flexmsa_fails(checkout, tmp_path, capsys):
    arguments = [str(checkout), "--models", "qwen3", "--processes", "1"]
    assert transformers_tests.main(arguments) == 1
    found = json.loads((tmp_path / "transformers.json").read_text())["models"]["qwen3"]
    assert found["failed"].keys() == {"Tests::test_that_only_a_dense_model_passes", "Tests::test_a_mask_for_each_query"}
    assert (found["passed"], found["attended"], found["failed_with_both"], found["skipped"]) == (3, 2, 1, [])
    said = capsys.readouterr().out
    assert "only_a_dense_model_passes: UNEXPLAINED\n    AssertionError: True is not false" in said
    assert "a_mask_for_each_query: a mask for each query is refused" in said
    (checkout / transformers_tests.FILES["qwen3"]).write_text("raise AssertionError('not run again')")
    assert transformers_tests.main([*arguments, "--reuse"]) == 1
    assert json.loads((tmp_path / "transformers.json").read_text())["models"]["qwen3"] == found


def test_what_follows_two_dashes_is_for_pytest(checkout):
    options = transformers_tests.parse([str(checkout), "--models", "qwen3", "--", "-k", "generate"])
    assert (options.models, options.pytest) == (["qwen3"], ["-k", "generate"])
    assert transformers_tests.parse([str(checkout), "--models", "qwen3"]).pytest == []


def test_a_folder_without_tests_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        transformers_tests.parse([str(tmp_path)])
    assert "expected a checkout of transformers" in capsys.readouterr().err
