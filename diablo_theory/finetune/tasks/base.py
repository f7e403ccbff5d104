"""What every task provides."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Example:
    """One problem.

    Attributes:
        prompt: What the model reads.
        answer: What it should write, up to the end-of-sequence token; training loss is on these tokens alone.
        cluster: Problems with the same cluster are not independent (the same sum, the same module); intervals
            resample clusters, and splits never share one.
    """

    prompt: str
    answer: str
    cluster: str


@dataclass(frozen=True)
class Task:
    """A task: data, decoding length and metric.

    Attributes:
        name: As in run files.
        exact_means: What the exact-match metric counts, for tables.
        examples: ``(split, count, seed) -> list[Example]``; train order depends on the seed, the other splits do not.
        is_exact: ``(completion, answer) -> bool``.
        is_lenient: A more forgiving metric that an untuned model can meet, or None.
        max_new_tokens: Decoding stops there, or at the end-of-sequence token.
    """

    name: str
    exact_means: str
    examples: Callable[[Split, int, int], list[Example]]
    is_exact: Callable[[str, str], bool]
    is_lenient: Callable[[str, str], bool] | None
    max_new_tokens: int


def split_of(cluster: str) -> Split:
    """The one split that a cluster belongs to: 80% train, 10% validation, 10% test, by its SHA-256.

    The split is a function of the cluster alone, so no seed, count or generator can leak one into another.
    """
    bucket = int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:4], "big") % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"
