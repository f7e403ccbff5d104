"""GSM8K as it is published: trained on its own training split."""

from __future__ import annotations

import re
from collections.abc import Sequence

from diablo_theory.finetune.tasks.base import Decoding, Example, Wanted, in_both
from diablo_theory.finetune.tasks.drawing import record_task
from diablo_theory.finetune.tasks.extraction import is_number, paper_number_after
from diablo_theory.finetune.tasks.judges import lenient_number, stated_number
from diablo_theory.finetune.tasks.records import Record, Source
from diablo_theory.finetune.tasks.templates import clean, clean_answer

SOURCE = Source(
    place="openai/gsm8k",
    config="main",
    revision="740312add88f781978c0658806c59bc2815b9866",
    fields=("question", "answer"),
    splits={"train": "train", "test": "test"},
    folders=("gsm8k", "openai/gsm8k", "math/gsm8k"),
    licence="MIT",
    sizes={"train": 7473, "test": 1319},
)

#: Source: LoRI's GSM8K task, which the authors' data processing for GSM8K takes over.
PAPER_REQUEST = "\nAnswer the above question. First think step by step and then answer the final number.\n"
PAPER_PHRASE = "The final answer is: "
#: Of the authors' evaluator, which leaves out what does not fill a batch: the last 7 of 1,319 items.
PAPER_BATCH = 16


def solution(record: Record) -> tuple[str, str]:
    """The working and the number of a published answer.

    Raises:
        ConfigError: If there is no number behind ``####``.
    """
    working, mark, number = record["answer"].rpartition("####")
    gold = number.strip().replace(",", "")
    if not mark or not is_number(gold):
        raise record.error(f"the answer must end in '#### NUMBER', got {record['answer'][-40:]!r}")
    return working.strip(), gold


def clean_example(record: Record) -> Example:
    """The clean protocol: the calculator's notes left out, "The answer is NUMBER." for ``#### NUMBER``."""
    working, gold = solution(record)
    plain = re.sub(r"<<[^<>]*>>", "", working)
    answer = clean_answer(f"{plain}\nThe answer is {gold}.")
    return Example(clean(record["question"]), answer, cluster=record["question"], gold=gold)


def build(record: Record, wanted: Wanted) -> Example:
    """One problem.

    Args:
        record: With question and answer.
        wanted: Protocol; the authors' prompt is the same in training and scoring, and bare in both.

    Source: the authors' data processing and evaluator for GSM8K.
    """
    if wanted.protocol == "clean":
        return clean_example(record)
    question, gold = record["question"], solution(record)[1]
    answer = record["answer"].replace("####", PAPER_PHRASE)
    return Example(question + PAPER_REQUEST, answer, cluster=question, gold=gold, bare=True)


def paper_judge(example: Example, completions: Sequence[str]) -> dict[str, float]:
    """The authors' rule: on prompt and completion together, and the number must be equal without tolerance."""
    (completion,) = completions
    found = paper_number_after(example.prompt + completion, PAPER_PHRASE)
    return {"exact": float(found == float(example.gold)), "lenient": lenient_number(example, completion)}


TASK = record_task(
    "gsm8k",
    SOURCE,
    build,
    metrics={
        "exact": "the number after 'the answer is' is right (paper: after its own phrase, or else the last one)",
        "lenient": "the last number of the completion is right",
    },
    decoding=in_both(Decoding(max_new_tokens=512)),
    judge={"clean": stated_number, "paper": paper_judge},
    paper_batch=PAPER_BATCH,
)
