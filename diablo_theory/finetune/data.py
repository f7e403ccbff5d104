"""Examples as token batches: padded on the left, loss and logits on the answer alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.tasks import Example

IGNORED = -100
#: Batches among which examples of similar length are gathered: enough for little padding, few enough to stay random.
WINDOW = 32
#: Examples in a whole training, epochs included: their order is held in memory, and this many take some GB.
MOST = 10**8

Ids = NDArray[np.int32]


class Encoded(TypedDict):
    """Token ids of one example; the answer ends in the end-of-sequence token unless its end was cut off."""

    prompt_ids: Ids
    answer_ids: Ids
    cut: bool


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int | None = None) -> list[Encoded]:
    """Tokenise prompts and answers apart, so that decoding sees exactly the prompt tokens that training saw.

    DEVIATION(prompt-limit): the authors' data processing for GSM8K, and LoRI's for code and safety, cuts a prompt at
    256 tokens as well; here an example has a limit as a whole.

    Args:
        examples: Any number.
        tokenizer: A transformers tokenizer.
        max_length: Tokens at which an example is cut: first its answer's end, then its prompt's beginning, of which
            one token and an answer of one token are left in any case.

    Raises:
        ConfigError: If the tokenizer has no end-of-sequence token.
    """
    if (end := tokenizer.eos_token_id) is None:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token, so no answer could end: "
            "set eos_token in its tokenizer_config.json"
        )
    prompts: list[list[int]] = [[] for _ in examples]
    for bare in sorted({example.bare for example in examples}):
        places = [place for place, example in enumerate(examples) if example.bare == bare]
        texts = [examples[place].prompt for place in places]
        for place, ids in zip(places, _ids(texts, tokenizer, special=not bare), strict=True):
            prompts[place] = ids
    answers = _ids([example.answer for example in examples], tokenizer, special=False)
    return [_cut(prompt, [*answer, end], max_length) for prompt, answer in zip(prompts, answers, strict=True)]


def _ids(texts: list[str], tokenizer: Any, *, special: bool) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []
    return ids


def _cut(prompt: list[int], answer: list[int], max_length: int | None) -> Encoded:
    whole = len(prompt) + len(answer)
    if max_length is not None:
        answer = answer[: max(1, max_length - len(prompt))]
        prompt = prompt[-max(1, max_length - len(answer)) :]
    cut = len(prompt) + len(answer) < whole
    return Encoded(prompt_ids=np.array(prompt, np.int32), answer_ids=np.array(answer, np.int32), cut=cut)


def length(encoded: Encoded) -> int:
    """Tokens of an example."""
    return len(encoded["prompt_ids"]) + len(encoded["answer_ids"])


class Ordered(Dataset[Encoded]):
    """Encoded examples in the order in which a run meets them, each as often as it does.

    Attributes:
        examples: Each once.
        order: Which of them each place in training takes.
        cut: How many of the examples were too long, and lost a part.
    """

    def __init__(self, examples: Sequence[Encoded], order: Sequence[int]) -> None:
        self.examples, self.order = examples, order
        self.cut = sum(example["cut"] for example in examples)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Encoded:
        return self.examples[self.order[index]]


def number_of_steps(examples: int, epochs: float, batch_size: int, *, drop_last: bool) -> int:
    """Steps in a number of epochs; at least one.

    Args:
        examples: Of one epoch.
        epochs: Not necessarily whole.
        batch_size: Examples a step.
        drop_last: An epoch has whole batches only, and the rest of it is left out.
    """
    each = examples // batch_size if drop_last else examples / batch_size
    return max(1, math.ceil(epochs * each))


def training_order(
    lengths: Sequence[int], steps: int, batch_size: int, seed: int, *, by_length: bool, drop_last: bool
) -> list[int]:
    """Which example each place in training takes: a function of its arguments alone, so that resuming changes nothing.

    The first epoch takes the examples as they come (a task shuffles them itself), later ones anew in random order.

    Args:
        lengths: Tokens of each example.
        steps: Updates.
        batch_size: Examples an update.
        seed: Of everything random.
        by_length: Batches of similar lengths, in random order within ``WINDOW`` batches.
        drop_last: Leave out what does not fill a batch in every epoch; otherwise batches go on into the next one.

    Returns:
        ``steps x batch_size`` indices.

    Raises:
        ValueError: If there is no example, or with ``drop_last`` fewer than one batch; if they are more than
            ``MOST``.
    """
    if steps * batch_size > MOST:
        raise ValueError(f"{steps:,} steps of {batch_size:,} examples are too many: at most {MOST:,} examples in all")
    epoch = len(lengths) // batch_size * batch_size if drop_last else len(lengths)
    if epoch == 0:
        raise ValueError(f"{len(lengths)} training examples do not fill a batch of {batch_size}")
    rng = np.random.default_rng([seed, len(lengths)])
    places: list[int] = list(range(epoch))
    while len(places) < steps * batch_size:
        places += rng.permutation(len(lengths))[:epoch].tolist()
    places = places[: steps * batch_size]
    return list(_gathered(places, lengths, batch_size, rng)) if by_length else places


def _gathered(places: list[int], lengths: Sequence[int], batch_size: int, rng: np.random.Generator) -> Iterator[int]:
    for start in range(0, len(places), WINDOW * batch_size):
        window = sorted(places[start : start + WINDOW * batch_size], key=lambda place: lengths[place])
        for batch in rng.permutation(len(window) // batch_size):
            yield from window[batch * batch_size : (batch + 1) * batch_size]


def pad_left(rows: Sequence[Sequence[int] | Ids], value: int) -> Tensor:
    """Shape (rows, longest), int64, filled with ``value`` on the left."""
    padded = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for place, row in enumerate(rows):
        padded[place, padded.shape[1] - len(row) :] = row
    return torch.from_numpy(padded)


def collate(batch: Sequence[Encoded], pad_id: int, *, everything: bool = False) -> dict[str, Any]:
    """A training batch for a causal language model.

    With padding on the left all answers end at the right edge, so the last ``longest answer + 1`` positions hold every
    position whose logits the loss reads. Asking the model for those alone (``logits_to_keep``) saves the output
    matrix on the others, a fifth of a step on SmolLM2-135M.

    Args:
        batch: Encoded examples.
        pad_id: Token id of the padding; masked everywhere.
        everything: The loss reads the prompts too.

    Returns:
        input_ids, attention_mask, position_ids of shape (batch, length); labels of shape (batch, kept), -100 outside
        what the loss reads; logits_to_keep = kept.
    """
    rows = [np.concatenate([example["prompt_ids"], example["answer_ids"]]) for example in batch]
    mask = pad_left([np.ones_like(row) for row in rows], 0)
    # A column at the left that is never predicted: the token that an answer begins after, or the first of all.
    learnt = [row[1:] for row in rows] if everything else [example["answer_ids"] for example in batch]
    labels = torch.nn.functional.pad(pad_left(learnt, IGNORED), (1, 0), value=IGNORED)
    return {
        "input_ids": pad_left(rows, pad_id),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": labels,
        "logits_to_keep": labels.shape[1],
    }
