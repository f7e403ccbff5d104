import json

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import save_file

from diablo_theory.tuner import DiaBloConfig
from diablo_theory.tuner.config import DEFAULT_NUM_BLOCKS, FORMAT_VERSION


def test_defaults():
    config = DiaBloConfig()
    assert config.num_blocks == DEFAULT_NUM_BLOCKS == 64
    assert (config.mode, config.dropout, config.bias, config.adapter_dtype) == ("auto", 0.0, "none", None)
    assert config.peft_type == "DIABLO"
    assert config.peft_type.value == "DIABLO"


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_blocks": 0}, ValueError, "num_blocks must be at least 1, got 0"),
        ({"num_blocks": -4}, ValueError, "num_blocks must be at least 1, got -4"),
        ({"num_blocks": 8.0}, TypeError, "num_blocks must be an integer, got 8.0 of type float"),
        ({"num_blocks": True}, TypeError, "num_blocks must be an integer, got True"),
        ({"num_blocks": [8]}, TypeError, r"num_blocks must be an integer, got \[8\]"),
        ({"parameter_budget": 0}, ValueError, "parameter_budget must be at least 1, got 0"),
        ({"num_blocks": 8, "parameter_budget": 100}, ValueError, "num_blocks or parameter_budget, not both"),
        ({"num_blocks_pattern": {"q_proj": 0}}, ValueError, r"num_blocks_pattern\['q_proj'\] must be at least 1"),
        ({"num_blocks_pattern": ["q_proj"]}, TypeError, "num_blocks_pattern must be a dictionary"),
        ({"mode": "merge"}, ValueError, "mode must be one of 'auto', 'additive', 'merged', got 'merge'. Did you mean"),
        ({"bias": "lora_only"}, ValueError, "bias must be one of 'none', 'all', 'diablo_only'"),
        ({"adapter_dtype": "float8"}, ValueError, "adapter_dtype must be one of .*got 'float8'"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout must be at least 0"),
        ({"dropout": float("nan")}, ValueError, "dropout must be at least 0"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number"),
        ({"dropout": 0.1, "mode": "merged"}, ValueError, "mode 'merged' has no dropout"),
        ({"init_weights": "random"}, TypeError, "init_weights must be True or False"),
        ({"format_version": FORMAT_VERSION + 1}, ValueError, "saved by a newer diablo-theory; upgrade"),
        ({"format_version": "1"}, TypeError, "format_version must be an integer"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, ValueError, "layers_to_transform cannot be used"),
        ({"target_modules": ".*q_proj", "layers_pattern": "h"}, ValueError, "layers_pattern cannot be used"),
        (
            {"target_modules": ["q_proj"], "layers_pattern": "h"},
            ValueError,
            "layers_pattern needs layers_to_transform",
        ),
        ({"task_type": "POETRY"}, ValueError, "Invalid task type: 'POETRY'"),
    ],
)
def test_bad_values_are_named(options, kind, message):
    with pytest.raises(kind, match=message):
        DiaBloConfig(**options)


def test_round_trip_through_a_folder(tmp_path):
    config = DiaBloConfig(
        num_blocks=16,
        num_blocks_pattern={"k_proj": 8},
        target_modules=["q_proj", "k_proj"],
        exclude_modules=["0.q_proj"],
        modules_to_save=["score"],
        bias="diablo_only",
        adapter_dtype="bfloat16",
        mode="additive",
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is DiaBloConfig
    assert again == config
    assert again.dtype == torch.bfloat16
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["format_version"]) == ("DIABLO", FORMAT_VERSION)


def test_a_newer_format_is_refused_when_loading(tmp_path):
    DiaBloConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99 is not known"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_weights_are_noticed_before_a_model_is_touched(tmp_path, damage):
    DiaBloConfig().save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.zeros(100)}, weights)
    DiaBloConfig.from_pretrained(tmp_path)
    whole = weights.read_bytes()
    weights.write_bytes({"truncated": whole[:-7], "empty": b"", "text": b"<html>not found</html>"}[damage])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is truncated or is not a safetensors file"):
        DiaBloConfig.from_pretrained(tmp_path)
