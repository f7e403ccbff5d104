"""math_10k and the four test sets that models trained on it are scored on, as ApiQ has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from diablo_theory.finetune.tasks import gsm8k
from diablo_theory.finetune.tasks.base import Decoding, Example, Judge, Protocol, Task, Wanted, in_both
from diablo_theory.finetune.tasks.drawing import record_task
from diablo_theory.finetune.tasks.extraction import is_number, last_letter, letter_after_phrase, paper_letter
from diablo_theory.finetune.tasks.judges import NUMBER_METRICS, final_number, stated_number
from diablo_theory.finetune.tasks.records import Record, Source
from diablo_theory.finetune.tasks.templates import alpaca, clean, clean_answer

PLACE = "AGI-Edgerunners/LLM-Adapters"
LICENCE = "ODC-By 1.0; the underlying sets keep their own terms"

#: Source: ApiQ's multi-task evaluation.
DECODING = in_both(Decoding(max_new_tokens=512))
LETTER_METRICS = {
    "exact": "the letter after 'the answer is' is right (paper: the first capital A to E of the completion)",
    "lenient": "the last A to E that stands alone is right",
    "likelihood": "said at once, the right letter is the likeliest of those that the instruction lists",
}
NUMBER_JUDGES: dict[Protocol, Judge] = {"clean": stated_number, "paper": final_number}


def example(question: str, answer: str, wanted: Wanted, gold: str = "") -> Example:
    """A problem in either protocol.

    Source: the Alpaca template without input of ApiQ's multi-task training, the same in training and scoring.
    """
    if wanted.protocol == "clean":
        return Example(clean(question), clean_answer(answer), cluster=question, gold=gold)
    return Example(alpaca(question), answer, cluster=question, gold=gold)


def training_example(record: Record, wanted: Wanted) -> Example:
    """One of math_10k's, with the working that a language model wrote for it."""
    return example(record["instruction"], record["output"], wanted)


def number_example(record: Record, wanted: Wanted) -> Example:
    """One whose answer is a number; the test sets' own outputs are a language model's, often wrong, and not used."""
    gold = record["answer"].strip().removesuffix(".0")
    if not is_number(gold):
        raise record.error(f"answer must be a number, got {record['answer']!r}")
    return example(record["instruction"], f"The answer is {gold}.", wanted, gold)


def letter_example(record: Record, wanted: Wanted) -> Example:
    """One whose answer is a letter of the options that the instruction ends with: "Answer Choices: (A) 60 m (B) ...".

    Likelihood chooses among the same sentence with each letter, without working before it: the published working is a
    language model's, and often ends in another letter.
    """
    instruction, gold = record["instruction"], record["answer"].strip()
    listed = list(dict.fromkeys(re.findall(r"\(([A-E])\)", instruction.partition("Answer Choices:")[2])))
    if gold not in listed:
        raise record.error(f"the answer is {record['answer']!r}, the instruction lists {', '.join(listed) or 'none'}")
    made = {letter: example(instruction, f"The answer is ({letter}).", wanted, letter) for letter in listed}
    return replace(made[gold], choices=tuple(each.answer for each in made.values()))


def gsm8k_example(record: Record, wanted: Wanted) -> Example:
    """One of GSM8K's."""
    if wanted.protocol == "clean":
        return gsm8k.clean_example(record)
    working, gold = gsm8k.solution(record)
    return example(record["question"], f"{working}\nThe answer is {gold}.", wanted, gold)


def letter_judge(example: Example, completions: Sequence[str]) -> dict[str, float]:
    """The clean rule: a letter that stands alone, named as the answer."""
    (completion,) = completions
    return _letters(example, completion, letter_after_phrase(completion))


def paper_letter_judge(example: Example, completions: Sequence[str]) -> dict[str, float]:
    """ApiQ's rule: the first capital A to E anywhere, so "But", "Each" and "Answer" count as letters."""
    (completion,) = completions
    return _letters(example, completion, paper_letter(completion))


def _letters(example: Example, completion: str, stated: str | None) -> dict[str, float]:
    return {"exact": float(stated == example.gold), "lenient": float(last_letter(completion) == example.gold)}


def _test_set(name: str, folder: str, size: int, build: Callable[[Record, Wanted], Example]) -> Task:
    source = Source(
        place=PLACE,
        host="github",
        fields=("instruction", "answer"),
        splits={"test": f"dataset/{folder}/test.json"},
        folders=tuple(dict.fromkeys((f"math/{folder}", folder, f"dataset/{folder}", name))),
        licence=LICENCE,
        sizes={"test": size},
    )
    letters = build is letter_example
    return record_task(
        name,
        source,
        build,
        splits=("test",),
        metrics=LETTER_METRICS if letters else NUMBER_METRICS,
        decoding=DECODING,
        judge={"clean": letter_judge, "paper": paper_letter_judge} if letters else NUMBER_JUDGES,
    )


MATH_10K = record_task(
    "math_10k",
    Source(
        place=PLACE,
        host="github",
        fields=("instruction", "output"),
        splits={"train": "ft-training_set/math_10k.json"},
        folders=("math_10k", "math/math_10k"),
        files={"train": ("math_10k.json", "ft-training_set/math_10k.json")},
        licence=LICENCE,
    ),
    training_example,
    splits=("train", "validation"),
)

GSM8K = record_task(
    "gsm8k_math10k",
    gsm8k.SOURCE,
    gsm8k_example,
    splits=("test",),
    metrics=NUMBER_METRICS,
    decoding=DECODING,
    judge=NUMBER_JUDGES,
)

TASKS = (
    MATH_10K,
    GSM8K,
    _test_set("svamp", "SVAMP", 1000, number_example),
    _test_set("mawps", "mawps", 238, number_example),
    _test_set("aqua", "AQuA", 254, letter_example),
)
