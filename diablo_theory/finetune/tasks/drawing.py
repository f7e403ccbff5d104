"""Tasks out of records: which of them a split has, in which order."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.tasks.base import (
    Decoding,
    Example,
    Judge,
    Protocol,
    Split,
    Task,
    Wanted,
    split_of,
    whole_batches,
)
from diablo_theory.finetune.tasks.records import Record, Source, load

#: From one record to one problem, in the protocol and for the purpose that is wanted.
Build = Callable[[Record, Wanted], Example]


def record_task(
    name: str,
    source: Source,
    build: Build,
    *,
    splits: tuple[Split, ...] = ("train", "validation", "test"),
    protocols: tuple[Protocol, ...] = ("clean", "paper"),
    metrics: Mapping[str, str] | None = None,
    decoding: Mapping[Protocol, Decoding] | None = None,
    judge: Mapping[Protocol, Judge] | None = None,
    paper_batch: int = 1,
) -> Task:
    """A task whose problems are the records of a published set.

    Args:
        name: As in run files.
        source: The set.
        build: See :data:`Build`.
        splits: Those that there are; validation is a part of the published training split.
        protocols: See :class:`Task`.
        metrics: See :class:`Task`.
        decoding: See :class:`Task`.
        judge: See :class:`Task`.
        paper_batch: See :class:`Task`.
    """
    return Task(
        name=name,
        examples=partial(draw, name, source, build, splits, paper_batch),
        metrics=metrics or {},
        decoding=decoding or {},
        judge=judge or {},
        splits=splits,
        protocols=protocols,
        sizes=source.sizes,
        paper_batch=paper_batch,
    )


def draw(
    name: str, source: Source, build: Build, splits: tuple[Split, ...], paper_batch: int, wanted: Wanted
) -> list[Example]:
    """The problems that are wanted.

    The test split is the published one, whole. Validation is the tenth of the published training split whose clusters
    :func:`split_of` sends there. The training order depends on the seed; the order of the others is one fixed
    shuffle, so that a smaller count takes the head of a larger one and not the head of a sorted file.

    DEVIATION(validation-cut): in the clean protocol. The authors train on everything, so in the other protocols
    training takes the whole split too, and there is no validation.

    Args:
        name: The task's, for messages.
        source: The set.
        build: See :data:`Build`.
        splits: Those that there are.
        paper_batch: See :func:`record_task`.
        wanted: Which problems.

    Raises:
        ConfigError: If there is no such split, or no record in it.
    """
    if wanted.split not in splits:
        raise ConfigError(f"{name} has no {wanted.split} split, only: {', '.join(splits)}")
    if wanted.split == "validation" and wanted.protocol != "clean":
        raise ConfigError(f"{name}: protocol {wanted.protocol} trains on all there is; validate with protocol=clean")
    records = load(source, "test" if wanted.split == "test" else "train", wanted.data_root, whole=wanted.whole)
    if wanted.split == "test" and wanted.protocol == "paper":
        records = records[: whole_batches(len(records), paper_batch)] or records
    examples = [build(record, wanted) for record in records]
    if wanted.split != "test" and wanted.protocol == "clean":
        held_out = wanted.split == "validation"
        examples = [example for example in examples if (split_of(example.cluster) == "validation") == held_out]
    if not examples:
        raise ConfigError(f"{name}: none of the {len(records):,} records of {records[0].file} is in {wanted.split}")
    return drawn(examples, wanted)


def drawn(examples: list[Example], wanted: Wanted) -> list[Example]:
    """As many as are wanted, in the order of :func:`draw`: by the seed for training, else one fixed shuffle.

    Args:
        examples: All of a split, in the order of the file.
        wanted: Split, seed and count.
    """
    order = f"train-{wanted.seed}" if wanted.split == "train" else f"{wanted.split}-fixed"
    shuffled = list(examples)
    random.Random(order).shuffle(shuffled)
    return shuffled[: wanted.count]
