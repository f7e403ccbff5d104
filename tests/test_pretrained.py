"""On the real pretrained model (make test-model): it is what it claims to be, and every method teaches it."""

import hashlib
import json

import pytest
import torch
from peft import get_peft_model

from diablo_theory.files import experiments_folder
from diablo_theory.finetune import models, runs
from diablo_theory.finetune.config import load_run
from diablo_theory.tuner import DiaBloConfig, DiaBloLinear

pytestmark = pytest.mark.model
NAME = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def loaded():
    return models.load_model(NAME)


def test_cached_weights_are_the_recorded_ones():
    folder = models.packaged_model(NAME)
    recorded = json.loads((folder / "source.json").read_text())
    assert recorded["wheel_sha256"] == models.PACKAGED[NAME].wheel_sha256
    with (folder / "model.safetensors").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == recorded["sha256"]


def test_it_speaks_english(loaded):
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt").to(loaded.model.device)
    out = loaded.model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(out[0])
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008


def test_diablo_goes_in_changes_it_and_merges_to_the_same_function():
    loaded = models.load_model(NAME, "cpu")
    ids = loaded.tokenizer("Question: 2 + 2?\nAnswer:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = loaded.model(input_ids=ids).logits
        model = get_peft_model(loaded.model, DiaBloConfig(num_blocks=64, init_weights=False))
        layers = [module for module in model.modules() if isinstance(module, DiaBloLinear)]
        assert len(layers) == 150  # the paper's five projections in 30 layers
        changed = model(input_ids=ids).logits
        assert (changed - before).abs().max() > 0.1
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, before)
        # float32 through 30 layers: additive and merged round differently.
        for layer in layers:
            layer.diablo_mode["default"] = "additive"
        torch.testing.assert_close(model(input_ids=ids).logits, changed, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, changed, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["full", "lora", "diablo", "miss"])
def test_ten_steps_teach_the_real_model(method, tmp_path, board):
    shared = ["steps=10", "warmup_steps=1", "eval_items=24", "eval_split=validation", "keep_weights=false"]
    config = load_run(experiments_folder() / "word_problems" / f"{method}.yaml", shared)
    untouched = load_run(experiments_folder() / "word_problems" / "none.yaml", shared)
    done = [runs.execute(config, tmp_path / config.method, board) for config in (untouched, config)]
    before, after = (metrics["scores"]["word_problems"]["loss_per_token"] for metrics in done)
    assert before > 1.5
    assert after < 0.7 * before
