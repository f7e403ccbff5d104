import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from diablo_theory.errors import ConfigError, NonFiniteError
from diablo_theory.finetune import runs
from diablo_theory.tune import tunable, tune

SMALL = {"num_blocks": 6, "steps": 2, "batch_size": 2, "warmup_steps": 0, "eval_items": 2, "device": "cpu"}


@pytest.fixture
def search(tiny_model, tmp_path, board):
    def do(task="word_problems", grid=(1e-3, 1e-2), **changes):
        return tune(task, ["lora"], grid, {**SMALL, "model": str(tiny_model), **changes}, tmp_path / "out", board)

    return do


def test_a_task_without_run_files_is_told_from_those_with_some(search):
    assert {"word_problems", "docstrings"} <= set(tunable())
    with pytest.raises(
        ConfigError, match=r"no run files for task 'gsm8k' in experiments/gsm8k; there are for .*boolq"
    ):
        search("gsm8k")


def test_a_rate_that_diverges_loses_and_the_others_go_on(search, monkeypatch):
    execute = runs.execute

    def diverging(config, folder, board):
        if config.learning_rate > 5e-3:
            folder.mkdir(parents=True)
            (folder / "failed.json").write_text(json.dumps({"label": "LoRA", "error": "loss nan"}))
            raise NonFiniteError("loss nan")
        return execute(config, folder, board)

    monkeypatch.setattr(runs, "execute", diverging)
    table = search()
    assert table["chosen"].tolist() == [True, False]
    assert table["valid_loss"].tolist()[1] == float("inf")


def test_a_model_that_cannot_be_quantised_is_no_rate_that_diverges(search, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("DIABLO_THEORY_CACHE", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    for file in tiny_model.glob("token*"):
        (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(NonFiniteError, match=r"up_proj.*its weight holds a NaN"):
        search(model=str(tmp_path / "bad"), quantise={"method": "rtn", "bits": 4, "group_size": 12})
