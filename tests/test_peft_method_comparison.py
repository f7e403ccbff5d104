"""The folder for peft's own benchmark: its script could load and train it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import diablo_theory
from diablo_theory import DiaBloConfig

HERE = Path(__file__).parents[1] / "experiments" / "peft_method_comparison"
SETTING = HERE / "MetaMathQA" / "experiments" / "diablo" / "llama-3.2-3B-n32"
LLAMA = {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8, "num_hidden_layers": 28}


def launched(folder, *arguments):
    command = [sys.executable, HERE / "MetaMathQA" / "run_with_diablo.py", *arguments]
    paths = os.pathsep.join(filter(None, [str(Path(diablo_theory.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_its_counts_are_those_that_its_readme_says():
    config = LlamaConfig(intermediate_size=8192, vocab_size=16, **LLAMA)
    setting = PeftConfig.from_pretrained(SETTING)
    assert isinstance(setting, DiaBloConfig)
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(config), setting, low_cpu_mem_usage=True)
    trainable, _ = model.get_nb_trainable_parameters()
    assert f"{trainable:,} parameters" in (HERE / "README.md").read_text()
    lora = 28 * 32 * ((3072 + 3072) + (3072 + 1024))
    assert f"the {lora:,} of its LoRA" in (HERE / "README.md").read_text()


def test_training_parameters_are_differences_of_the_known_kind():
    parameters = json.loads((SETTING / "training_params.json").read_text())
    assert set(parameters) <= {"optimizer_kwargs"}  # of keys that peft's default_training_params.json has
    assert set(parameters["optimizer_kwargs"]) == {"lr", "weight_decay"}


def test_a_script_in_the_place_of_peft_s_loads_the_folder(tmp_path):
    (tmp_path / "utils.py").write_text("from peft import PeftConfig\n")
    (tmp_path / "run.py").write_text(
        "import sys\nfrom utils import PeftConfig\nif __name__ == '__main__':\n"
        "    config = PeftConfig.from_pretrained(sys.argv[2])\n    print(sys.argv[1], config.num_blocks)\n"
    )
    done = launched(tmp_path, "run.py", "-v", SETTING)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["-v", "32"]


@pytest.mark.parametrize("arguments", [(), ("nowhere.py",)])
def test_without_a_script_it_says_how(tmp_path, arguments):
    done = launched(tmp_path, *arguments)
    assert done.returncode != 0
    assert "usage: python run_with_diablo.py run.py" in done.stderr
