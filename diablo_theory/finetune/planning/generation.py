"""Time of decoding: every token reads all weights once for the whole batch, so memory sets the pace."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diablo_theory.finetune.planning.devices import Device, Range
from diablo_theory.finetune.planning.flops import attention_forward
from diablo_theory.finetune.planning.quantised import dense_bytes, stored_bytes
from diablo_theory.finetune.planning.shapes import Shapes
from diablo_theory.finetune.planning.work import DTYPE_BYTES, Scored, Work


@dataclass(frozen=True)
class Decoding:
    """The work of decoding all evaluation problems on one device.

    Attributes:
        batches: Batches of sequences.
        prompt_flops: Operations of all prompts' forward passes, every beam its own, as transformers does it.
        token_flops: Operations of all decoded tokens.
        read_bytes: Weights and cache read for all decoded tokens (of integers, their dense copies written as well).
    """

    batches: int
    prompt_flops: float
    token_flops: float
    read_bytes: float


def decoding(shapes: Shapes, work: Work) -> Decoding:
    """Count it, every answer at the full ``new_tokens`` of its task."""
    tasks = [_of_task(shapes, work, task) for task in work.scored]
    return Decoding(
        batches=sum(task.batches for task in tasks),
        prompt_flops=sum(task.prompt_flops for task in tasks),
        token_flops=sum(task.token_flops for task in tasks),
        read_bytes=sum(task.read_bytes for task in tasks),
    )


def _of_task(shapes: Shapes, work: Work, task: Scored) -> Decoding:
    sequences = task.items * task.samples * task.beams
    batches = math.ceil(task.items * task.samples / task.batch_size)
    prompt = work.eval_prompt
    half_way = prompt + task.new_tokens / 2
    products = 2 * shapes.layer_products
    head = 2 * shapes.embedding
    size = DTYPE_BYTES[work.dtype]
    read_weights = (shapes.parameters - (0 if shapes.tied else shapes.embedding)) * size
    if work.stores_integers:  # beside the integers, dense copies are written and read as well
        read_weights += shapes.layers * (stored_bytes(shapes, work) + dense_bytes(shapes, work))
    cache = 2 * shapes.kv_heads * shapes.head_dim * shapes.layers * half_way * size
    return Decoding(
        batches=batches,
        prompt_flops=sequences * (shapes.layers * (products * prompt + attention_forward(shapes, prompt)) + head),
        token_flops=sequences
        * task.new_tokens
        * (shapes.layers * (products + attention_forward(shapes, half_way, 1)) + head),
        read_bytes=batches * task.new_tokens * (read_weights + cache * task.at_once),
    )


def decoding_seconds(found: Decoding, device: Device, dtype: str) -> Range:
    """From the best to the worst of the assumed rates; reading or arithmetic, whichever is slower, sets the pace."""
    peak = device.flops_per_second[dtype]
    low, high = (
        found.prompt_flops / (peak * computing)
        + max(found.read_bytes / (device.bandwidth_bytes_per_second * reading), found.token_flops / (peak * computing))
        for computing, reading in zip(reversed(device.training), reversed(device.decoding), strict=True)
    )
    return low, high
