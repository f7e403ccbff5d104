"""Scores on unseen problems, an item at a time, so that intervals can be computed and predictions read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from diablo_theory.finetune.data import IGNORED, Encoded, Ids, collate, encode, length, pad_left
from diablo_theory.finetune.tasks import Decoding, Example, Protocol, Task

#: The metric that the evaluation measures itself, where a task gives choices.
LIKELIHOOD = "likelihood"


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    advance: Callable[[int], None],
    *,
    protocol: Protocol = "clean",
    seed: int = 0,
) -> pd.DataFrame:
    """Score a model on problems.

    Problems of similar length are decoded together, which changes no score but for rounding; samples are drawn a
    problem at a time.

    Args:
        model: A causal language model; its mode (train or eval) is restored afterwards.
        tokenizer: Its tokenizer, padding on the left.
        task: Says what is right and how to decode.
        examples: The problems, at least one.
        batch_size: Problems at once.
        advance: Told the number of problems finished.
        protocol: Of decoding and scoring.
        seed: Of sampled completions.

    Returns:
        A row an example, in their order: item, cluster, prompt, answer, gold, completion (a JSON list of them where
        several were drawn), the task's metrics, loss_sum (nats over the answer tokens and the end token), tokens (how
        many those are). Of a private task the texts are SHA-256 sums.
    """
    was_training = model.training
    model.eval()
    decoding, judge = task.decoding[protocol], task.judge[protocol]
    lengths = [length(encoded) for encoded in encode(examples, tokenizer)]
    order = sorted(range(len(examples)), key=lambda item: -lengths[item])
    rows: dict[int, dict[str, Any]] = {}
    try:
        for items in _batches(order, batch_size):
            batch = [examples[item] for item in items]
            measured = measure(model, tokenizer, batch)
            drawn = _completions(model, tokenizer, batch, decoding, seed)
            for item, example, texts, found in zip(items, batch, drawn, measured, strict=True):
                rows[item] = _row(item, example, texts, private=task.private) | judge(example, texts) | found
            advance(len(batch))
    finally:
        model.train(was_training)
    return pd.DataFrame([rows[item] for item in range(len(examples))])


def _completions(
    model: Any, tokenizer: Any, batch: Sequence[Example], decoding: Decoding, seed: int
) -> list[list[str]]:
    """Samples are drawn a problem at a time, from a seed of its own: no other problem in the batch changes them."""
    if decoding.temperature == 0:
        return complete(model, tokenizer, batch, decoding)
    return [complete(model, tokenizer, [example], decoding, _seed_of(example, seed))[0] for example in batch]


def _seed_of(example: Example, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {example.prompt}".encode()).digest()[:4])


def _batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _row(item: int, example: Example, texts: Sequence[str], *, private: bool) -> dict[str, Any]:
    completion = texts[0] if len(texts) == 1 else json.dumps(texts)
    shown = {
        "cluster": example.cluster,
        "prompt": example.prompt,
        "answer": example.answer,
        "gold": example.gold,
        "completion": completion,
    }
    if private:
        shown = {key: hashlib.sha256(text.encode()).hexdigest() for key, text in shown.items()}
    return {"item": item, **shown}


@torch.no_grad()
def measure(model: nn.Module, tokenizer: Any, batch: Sequence[Example]) -> list[dict[str, float]]:
    """Loss of each example's answer and, where there are choices, whether the right one is the likeliest."""
    plain = [index for index, example in enumerate(batch) if not example.choices]
    found: dict[int, dict[str, float]] = {}
    if plain:
        losses, counts = answer_losses(
            model, encode([batch[index] for index in plain], tokenizer), tokenizer.pad_token_id
        )
        for index, loss, count in zip(plain, losses, counts, strict=True):
            found[index] = {"loss_sum": loss, "tokens": count}
    chosen = [index for index in range(len(batch)) if index not in found]
    if chosen:
        results = choice_losses(model, tokenizer, [batch[index] for index in chosen])
        found |= {index: _chosen(batch[index], result) for index, result in zip(chosen, results, strict=True)}
    return [found[index] for index in range(len(batch))]


def _chosen(example: Example, results: tuple[list[float], list[int]]) -> dict[str, float]:
    losses, counts = results
    right = example.choices.index(example.answer)
    return {
        "loss_sum": losses[right],
        "tokens": counts[right],
        LIKELIHOOD: float(min(losses) == losses[right] and losses.count(min(losses)) == 1),
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
    logits = model(**inputs, use_cache=False).logits
    return _sums(logits[:, :-1], labels[:, 1:])


def _sums(logits: Tensor, labels: Tensor) -> tuple[list[float], list[int]]:
    """Cross-entropy of each row, in nats, and its number of labels."""
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(len(labels), -1)
    return losses.sum(1).tolist(), (labels != IGNORED).sum(1).tolist()


@torch.no_grad()
def choice_losses(model: Any, tokenizer: Any, batch: Sequence[Example]) -> list[tuple[list[float], list[int]]]:
    """Cross-entropy of every choice of each example; the prompt is read once for all of them.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        batch: Examples with choices, which may be of different number.

    Returns:
        For each example the sums over each choice's tokens and its end token, in nats, and how many those are.
    """
    device = next(model.parameters()).device
    most = max(len(example.choices) for example in batch)
    # Rows beside the others' that an example with fewer choices lacks repeat its first.
    padded = [[*example.choices, *[example.choices[0]] * (most - len(example.choices))] for example in batch]
    variants = [replace(e, answer=choice) for e, choices in zip(batch, padded, strict=True) for choice in choices]
    encoded = encode(variants, tokenizer)
    prompts = [encoded[row * most]["prompt_ids"] for row in range(len(batch))]
    ids = pad_left(prompts, tokenizer.pad_token_id).to(device)
    mask = pad_left([np.ones_like(prompt) for prompt in prompts], 0).to(device)
    read = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = read.past_key_values
    cache.batch_repeat_interleave(most)
    labels = _pad_right([example["answer_ids"] for example in encoded], IGNORED).to(device)
    answers = labels.clamp(min=0)
    seen = torch.cat([mask.repeat_interleave(most, 0), (labels != IGNORED).long()], 1)
    rest = model(
        input_ids=answers,
        attention_mask=seen,
        position_ids=(seen.cumsum(1) - 1)[:, ids.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    )
    # The prompt's last logits predict an answer's first token, each of its tokens' the next.
    logits = torch.cat([read.logits.repeat_interleave(most, 0), rest.logits[:, :-1]], 1)
    losses, counts = _sums(logits, labels)
    return [
        (losses[row * most : row * most + len(e.choices)], counts[row * most : row * most + len(e.choices)])
        for row, e in enumerate(batch)
    ]


def _pad_right(rows: Sequence[Ids], value: int) -> Tensor:
    return pad_left([row[::-1] for row in rows], value).flip(1)


@torch.no_grad()
def complete(
    model: Any, tokenizer: Any, batch: Sequence[Example], decoding: Decoding, seed: int = 0
) -> list[list[str]]:
    """What the model writes after each prompt to the letter, special tokens removed, cut at the first stop text.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, padding on the left.
        batch: Examples.
        decoding: Greedy, beams or samples.
        seed: Of samples; torch's own generator is left as it was.

    Returns:
        For each example ``decoding.samples`` texts.
    """
    device = next(model.parameters()).device
    prompts = [example["prompt_ids"] for example in encode(batch, tokenizer)]
    ids = pad_left(prompts, tokenizer.pad_token_id).to(device)
    mask = pad_left([np.ones_like(prompt) for prompt in prompts], 0).to(device)
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    stops = {"stop_strings": list(decoding.stop), "tokenizer": tokenizer} if decoding.stop else {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.beams,
            num_return_sequences=decoding.samples,
            do_sample=decoding.temperature > 0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **(sampling if decoding.temperature > 0 else {}),
            **stops,
        )
    texts = [_until(text, decoding.stop) for text in continuations(tokenizer, out[:, ids.shape[1] :])]
    return [texts[row * decoding.samples : (row + 1) * decoding.samples] for row in range(len(batch))]


#: Text before a completion while it is decoded: a letter, so that it is a token of its own everywhere.
_LEAD = "x"


def continuations(tokenizer: Any, ids: Tensor) -> list[str]:
    """Texts as they go on after others.

    Tokenizers such as Llama 2's take a blank away where a text begins, which a completion does not do.

    Args:
        tokenizer: A transformers tokenizer.
        ids: Shape (texts, tokens).
    """
    lead = torch.tensor(tokenizer(_LEAD, add_special_tokens=False)["input_ids"], dtype=ids.dtype, device=ids.device)
    texts = tokenizer.batch_decode(torch.cat([lead.expand(len(ids), -1), ids], 1), skip_special_tokens=True)
    head = tokenizer.decode(lead, skip_special_tokens=True)  # nothing, where the letter is unknown
    return [text.removeprefix(head) for text in texts]


def _until(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
