"""Held-out loss per answer token and greedy exact match, an item at a time, so that intervals can be computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from diablo_theory.finetune.data import IGNORED, Encoded, collate, encode, pad_left
from diablo_theory.finetune.tasks import Example, Task


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    advance: Callable[[int], None],
) -> pd.DataFrame:
    """Score a model on unseen examples.

    Args:
        model: A causal language model; its mode (train or eval) is restored afterwards.
        tokenizer: Its tokenizer, padding on the left.
        task: Says what is right and how long to decode.
        examples: The problems, at least one.
        batch_size: Problems at once.
        advance: Told the number of problems finished.

    Returns:
        A row an example: item, cluster, prompt, answer, completion, exact (0 or 1), lenient (0, 1 or missing),
        loss_sum (nats over the answer tokens and the end token), tokens (how many those are).
    """
    was_training = model.training
    model.eval()
    rows: list[dict[str, Any]] = []
    try:
        for batch in _batches(examples, batch_size):
            encoded = encode(batch, tokenizer)
            losses, counts = answer_losses(model, encoded, tokenizer.pad_token_id)
            completions = greedy(model, tokenizer, encoded, task.max_new_tokens)
            for example, loss, count, completion in zip(batch, losses, counts, completions, strict=True):
                rows.append(_row(task, len(rows), example, completion) | {"loss_sum": loss, "tokens": count})
            advance(len(batch))
    finally:
        model.train(was_training)
    return pd.DataFrame(rows)


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _row(task: Task, item: int, example: Example, completion: str) -> dict[str, Any]:
    lenient = None if task.is_lenient is None else int(task.is_lenient(completion, example.answer))
    return {
        "item": item,
        "cluster": example.cluster,
        "prompt": example.prompt,
        "answer": example.answer,
        "completion": completion,
        "exact": int(task.is_exact(completion, example.answer)),
        "lenient": lenient,
    }


@torch.no_grad()
def answer_losses(model: nn.Module, encoded: Sequence[Encoded], pad_id: int) -> tuple[list[float], list[int]]:
    """Cross-entropy of each example's answer, with the right tokens before it (teacher forcing).

    Args:
        model: A causal language model.
        encoded: Tokenised examples.
        pad_id: Token id of the padding.

    Returns:
        For each example the sum over its answer tokens, in nats, and how many they are.
    """
    device = next(model.parameters()).device
    batch = collate(encoded, pad_id)
    inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits.float()
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    ).view(len(encoded), -1)
    return losses.sum(1).tolist(), (labels[:, 1:] != IGNORED).sum(1).tolist()


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, encoded: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """What the model writes after each prompt, without sampling, special tokens removed."""
    device = next(model.parameters()).device
    prompts = [example["prompt_ids"] for example in encoded]
    ids = pad_left(prompts, tokenizer.pad_token_id).to(device)
    mask = pad_left([[1] * len(prompt) for prompt in prompts], 0).to(device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return list(tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))
