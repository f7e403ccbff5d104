"""What every task provides, whether its problems are generated here, read from a folder or fetched from a hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

Split = Literal["train", "validation", "test"]
#: ``paper``: as the authors' code, or the code that a quoted number comes from, does it, quirks included.
#: ``clean``: the same prompt in training and evaluation, every item trained on and scored.
#: ``llm_adapters``: as LLM-Adapters and DoRA do it, whose numbers for commonsense are quoted beside the paper's own.
Protocol = Literal["clean", "paper", "llm_adapters"]


@dataclass(frozen=True)
class Example:
    """One problem.

    Attributes:
        prompt: What the model reads.
        answer: What it should write, up to the end-of-sequence token; training loss is on these tokens alone.
        cluster: Problems with the same cluster are not independent (the same sum, the same module); intervals
            resample clusters, and splits that are made here never share one.
        gold: What a completion is judged by, where that is not the answer's text: a label, a number, a test program.
        choices: Where likelihood can choose too: all possible answers, the right one among them.
        bare: The model reads the prompt without the special tokens that its tokenizer puts around a text, such as a
            token for its beginning.
    """

    prompt: str
    answer: str
    cluster: str
    gold: str = ""
    choices: tuple[str, ...] = ()
    bare: bool = False


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn.

    Attributes:
        max_new_tokens: Decoding stops there, or at the end-of-sequence token.
        beams: Of a beam search; 1 is greedy, or sampling where ``temperature`` is above zero.
        samples: Completions of each problem.
        temperature: 0 takes the likeliest token.
        top_p: Sampling's share of the probability.
        stop: Text at which a completion is cut, itself left out.
    """

    max_new_tokens: int
    beams: int = 1
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """Which problems of a task.

    Attributes:
        split: The training problems depend on the seed; validation and test problems are always the same.
        count: How many at most; None for all.
        seed: Of the training order.
        protocol: See :data:`Protocol`.
        scoring: The prompts are to be answered, not learnt: the paper's protocol writes them differently.
        data_root: A folder with a subfolder for each set in its public form; None fetches from the hub.
        whole: Refuse files that have not the published number of records; a slice (``count``) may still be taken.
    """

    split: Split
    count: int | None = None
    seed: int = 0
    protocol: Protocol = "clean"
    scoring: bool = False
    data_root: Path | None = None
    whole: bool = False


#: What completions of one problem score, by metric: shares from 0 to 1, whose mean is the score.
Judge = Callable[[Example, Sequence[str]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A task: problems, decoding and metrics.

    Attributes:
        name: As in run files.
        examples: The problems that are wanted. Fewer than the count only where there are no more.
        metrics: Metric to what it counts, for tables; the first is the one that is compared. Empty where there is
            nothing to score but the loss (a training set). ``likelihood`` is measured by the evaluation itself.
        decoding: Protocol to how completions are drawn.
        judge: Protocol to how completions are scored.
        bounded: Has an end, so that a run may count epochs.
        splits: Those that there are.
        protocols: Those that it can be learnt or scored by.
        sizes: Split to how many records it has as published, where that is known exactly.
        ready: Called before anything is computed; raises where the task may not or cannot be scored here. What it
            returns is kept with the run.
        private: The problems' text may not be kept: whatever a run writes holds a SHA-256 in place of each prompt and
            completion.
        paper_batch: The evaluator behind the paper's protocol takes whole batches of this size and leaves the rest of
            the test problems out.
    """

    name: str
    examples: Callable[[Wanted], list[Example]]
    metrics: Mapping[str, str] = field(default_factory=dict)
    decoding: Mapping[Protocol, Decoding] = field(default_factory=dict)
    judge: Mapping[Protocol, Judge] = field(default_factory=dict)
    bounded: bool = True
    splits: tuple[Split, ...] = ("train", "validation", "test")
    protocols: tuple[Protocol, ...] = ("clean", "paper")
    sizes: Mapping[Split, int] = field(default_factory=dict)
    ready: Callable[[], dict[str, bool]] | None = None
    private: bool = False
    paper_batch: int = 1

    def scored(self, problems: int, protocol: Protocol) -> int:
        """How many of so many test problems a protocol scores."""
        return whole_batches(problems, self.paper_batch) if protocol == "paper" else problems


def whole_batches(items: int, size: int) -> int:
    """Items that fill batches of a size."""
    return items // size * size


Choice = TypeVar("Choice")


def in_both(choice: Choice) -> dict[Protocol, Choice]:
    """The same in the two protocols that every task has."""
    return {"clean": choice, "paper": choice}


def split_of(cluster: str) -> Split:
    """The one split that a cluster belongs to: 80% train, 10% validation, 10% test, by its SHA-256.

    The split is a function of the cluster alone, so no seed, count or generator can leak one into another.
    """
    bucket = int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:4], "big") % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"
