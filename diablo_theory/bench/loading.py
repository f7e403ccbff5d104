"""Loading an adapter and merging it, beside plainly reading and writing bytes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from diablo_theory.bench.measuring import MIB
from diablo_theory.bench.workloads import TARGETS, llama_config
from diablo_theory.tuner import DiaBloConfig

BLOCKS = (64, 16, 8)


def loading(
    advance: Callable[[int], None],
    shape: str = "llama-3.2-1b",
    layers: int = 16,
    num_blocks: Sequence[int] = BLOCKS,
    rounds: int = 5,
    dtype: torch.dtype = torch.bfloat16,
) -> pd.DataFrame:
    """Time from an adapter's file to a plain model with it merged in, on the CPU.

    Args:
        advance: Told the number of rounds finished; in all ``work(num_blocks, rounds)``.
        shape: A name in ``workloads.SHAPES``.
        layers: Decoder layers.
        num_blocks: N, an adapter each; its blocks are float32.
        rounds: Rounds of each; in every one the adapter's bytes are read and written in turn with the work.
        dtype: Of the model.

    Returns:
        One row for each N: num_blocks, parameters (of the model), model_mib, adapter_mib (file), load_seconds
        (``PeftModel.from_pretrained`` with ``low_cpu_mem_usage``), merge_seconds (``merge_and_unload``),
        adapter_seconds (reading the adapter's file and writing its bytes to another), over_adapter (loading and
        merging as a ratio to that), all medians over the rounds; model_seconds (the same of all the model's bytes,
        once, at the end) and over_model. Files come from and go to the system's file cache, as they do for a file that
        was just fetched.
    """
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(llama_config(shape, layers, 32)).to(dtype)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    parameters = sum(p.numel() for p in model.parameters())
    model_bytes = sum(p.nbytes for p in model.parameters())
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in num_blocks:
            adapted = get_peft_model(
                model, DiaBloConfig(num_blocks=count, target_modules=list(TARGETS), init_weights=False)
            )
            adapted.save_pretrained(folder / str(count))
            model = adapted.unload()
            saved = folder / str(count) / "adapter_model.safetensors"
            times = []
            for _ in range(rounds + 1):
                began = time.perf_counter()
                adapted = PeftModel.from_pretrained(model, folder / str(count), low_cpu_mem_usage=True)
                loaded = time.perf_counter()
                model = adapted.merge_and_unload()
                merged = time.perf_counter()
                times.append((loaded - began, merged - loaded, _copied(saved, folder / "copy")))
                advance(1)
            table = pd.DataFrame(times[1:], columns=["load", "merge", "adapter"])
            both = table["load"] + table["merge"]
            rows.append(
                {"num_blocks": count, "parameters": parameters}
                | {"model_mib": model_bytes / MIB, "adapter_mib": saved.stat().st_size / MIB}
                | {f"{column}_seconds": table[column].median() for column in table}
                | {"over_adapter": (both / table["adapter"]).median()}
            )
        # At the end: the system goes on writing gigabytes to the disk after the call, beside whatever follows it.
        whole = folder / "model"
        with whole.open("wb") as file:
            for parameter in model.parameters():
                file.write(parameter.detach().view(torch.uint8).numpy())
        seconds = _copied(whole, folder / "copy")
    found = pd.DataFrame(rows)
    whole_way = found["load_seconds"] + found["merge_seconds"]
    return found.assign(model_seconds=seconds, over_model=whole_way / seconds)


def work(num_blocks: Sequence[int] = BLOCKS, rounds: int = 5) -> int:
    """The units that :func:`loading` advances by; the first round of each N is not counted."""
    return len(num_blocks) * (rounds + 1)


def _copied(source: Path, target: Path) -> float:
    began = time.perf_counter()
    target.write_bytes(source.read_bytes())
    return time.perf_counter() - began
