"""The work that a run file describes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from diablo_theory import methods
from diablo_theory.errors import ConfigError, DataUnavailableError
from diablo_theory.finetune.config import RunConfig
from diablo_theory.finetune.planning.datasets import DATASETS
from diablo_theory.finetune.planning.work import Scored, Sharding, Work
from diablo_theory.finetune.tasks import TASKS, Example, Split, Wanted

#: Where no tokenizer is asked: English text has about so many characters a token.
CHARACTERS = 4
#: Examples that lengths are taken from, where a training set's are not known.
LOOKED_AT = 200


def work_of(config: RunConfig, devices: int = 1, sharding: Sharding = "ddp") -> Work:
    """What a run does.

    Args:
        config: The run.
        devices: How many share it.
        sharding: ``ddp`` or ``fsdp``.

    Raises:
        ConfigError: If the data's size is not known and they are not at hand, or an option does not go with the
            method.
    """
    methods.check_options(config.method, alpha=config.alpha, dropout=config.dropout)
    return Work(
        model=config.model,
        method=config.method,
        num_blocks=config.num_blocks,
        rank=config.rank,
        target_modules=config.target_modules,
        epochs=config.epochs or 1.0,
        steps=config.steps,
        drop_last=config.drop_last,
        batch_size=config.batch_size,
        micro_batch=config.micro_batch_size,
        dtype=config.dtype,
        adapter_dtype=config.adapter_dtype,
        dropout=config.dropout,
        gradient_checkpointing=config.gradient_checkpointing,
        logits="answers" if config.loss_on == "answer" else "all",
        quantise=config.quantise,
        devices=devices,
        sharding=sharding,
        scored=tuple(_scored(config, name) for name in config.evaluate_on),
        **_sizes(config),
    )


def _scored(config: RunConfig, name: str) -> Scored:
    """What a run decodes of a task; samples are drawn a problem at a time."""
    decoding = TASKS[name].decoding[config.protocol]
    return Scored(
        items=_items(config, name),
        new_tokens=decoding.max_new_tokens,
        beams=decoding.beams,
        samples=decoding.samples,
        batch_size=decoding.samples if decoding.temperature > 0 else config.eval_batch_size,
    )


def _items(config: RunConfig, name: str) -> int:
    """Problems of a task that a run scores."""
    task, most = TASKS[name], config.eval_items
    if config.eval_split == "test" and "test" in task.sizes:
        scored = task.scored(task.sizes["test"], config.protocol)
        return min(scored, most or scored)
    if most is not None and not task.bounded:
        return most
    return len(_read(config, name, config.eval_split, most, scoring=True))


def _sizes(config: RunConfig) -> dict[str, Any]:
    """Examples and their lengths: stated ones, or those of the data at hand."""
    known, stated = DATASETS.get(config.train_on), _stated(config)
    count = config.train_limit if stated is None else min(stated, LOOKED_AT)
    read = [] if known and stated else _read(config, config.train_on, "train", count)
    sizes: dict[str, Any] = {"examples": stated or len(read)}
    by_name = known is not None and stated == known.examples and "train" not in TASKS[config.train_on].sizes
    sizes["examples_assumed"] = by_name
    if known is not None:
        lengths = _cut(known.prompt_tokens, known.answer_tokens, config.max_length)
        most = min(known.max_tokens, config.max_length)
        padding = max(1.0, min(known.padding, most / sum(lengths)))
        sizes |= {"padding": padding, "max_tokens": max(2, most), "eval_prompt_tokens": known.prompt_tokens}
    else:
        looked_at = read[:LOOKED_AT]
        prompt, answer = (_tokens([getattr(one, part) for one in looked_at]) for part in ("prompt", "answer"))
        lengths = _cut(prompt, 1 + answer, config.max_length)
        sizes |= {"max_tokens": None, "eval_prompt_tokens": prompt}
    return sizes | dict(zip(("prompt_tokens", "answer_tokens"), lengths, strict=True))


def _stated(config: RunConfig) -> int | None:
    """Training examples that a run reads, where that is known without them."""
    known, most = DATASETS.get(config.train_on), config.train_limit
    if not TASKS[config.train_on].bounded:
        return most
    if known is None:
        return None
    if (there := known.trained_on(config.protocol)) is not None:
        return min(there, most or there)
    # The clean protocol holds a tenth back, by chance a little more or less, and never half.
    return most if most is not None and most <= known.examples // 2 else None


def _read(
    config: RunConfig, name: str, split: Split, count: int | None, *, scoring: bool = False
) -> Sequence[Example]:
    whole = config.scale == "full"
    wanted = Wanted(split, count, config.seed, config.protocol, scoring, config.data_root, whole)
    try:
        found = TASKS[name].examples(wanted)
    except DataUnavailableError as error:
        raise ConfigError(
            f"{name}: without the data it is not known how many problems there are, nor how long: {error}"
        ) from error
    if not found:
        raise ConfigError(f"{name} has no {split} problems")
    return found


def _tokens(texts: Sequence[str]) -> float:
    return fmean(map(len, texts)) / CHARACTERS


def _cut(prompt: float, answer: float, most: int) -> tuple[float, float]:
    """Lengths of an example that is cut as :func:`finetune.data.encode` does: its answer's end, then its prompt."""
    answer = min(answer, max(1.0, most - prompt))
    return min(prompt, max(1.0, most - answer)), answer
