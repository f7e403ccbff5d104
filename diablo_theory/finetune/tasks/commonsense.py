"""Eight commonsense benchmarks and the training set over all of them, in the form of LLM-Adapters.

Every record is an instruction that lists the labels to choose from, and the sentence "the correct answer is LABEL".

Published numbers of LoRA and DoRA come from scripts of LLM-Adapters' and DoRA's authors: ``llm_adapters`` scores with
the prompt of training and reads the response alone, where ``paper`` has another prompt and falls back on it.

DEVIATION(llm-adapters): those scripts hold out 120 training examples and keep the checkpoint that does best on them;
here training takes all, and the last weights are kept. Their template is the same but for a stray remark behind its
first sentence and blanks on its empty lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from diablo_theory.finetune.tasks import extraction
from diablo_theory.finetune.tasks.base import Decoding, Example, Protocol, Task, Wanted
from diablo_theory.finetune.tasks.drawing import record_task
from diablo_theory.finetune.tasks.records import Record, Source
from diablo_theory.finetune.tasks.templates import alpaca, clean, clean_answer

TARGET = "the correct answer is "

#: Task to its folder in LLM-Adapters, what its labels look like, and the problems of its test set.
BENCHMARKS = {
    "boolq": ("boolq", "true|false", 3270),
    "piqa": ("piqa", "solution[12]", 1838),
    "social_i_qa": ("social_i_qa", "answer[1-5]", 1954),
    "hellaswag": ("hellaswag", "ending[1-4]", 10_042),
    "winogrande": ("winogrande", "option[12]", 1267),
    "arc_easy": ("ARC-Easy", "answer[1-5]", 2376),
    "arc_challenge": ("ARC-Challenge", "answer[1-5]", 1172),
    "openbookqa": ("openbookqa", "answer[1-5]", 500),
}
ANY_LABEL = "true|false|solution[12]|answer[1-5]|ending[1-4]|option[12]"
LICENCE = "ODC-By 1.0; the underlying sets keep their own terms"

#: The authors search prompt and completion together: without "the correct answer is" the first label that the prompt
#: names is taken, which is always the same one ("true", "answer1").
METRICS = {
    "exact": "the first label of the completion is right (paper: the first after the last 'the correct answer is')",
    "likelihood": "the right answer is the likeliest of those that the instruction lists",
}

#: Source: the authors' evaluator for commonsense; its sampling settings are without effect on a beam search.
DECODING: dict[Protocol, Decoding] = {
    "clean": Decoding(max_new_tokens=32),
    "paper": Decoding(max_new_tokens=32, beams=4),
    "llm_adapters": Decoding(max_new_tokens=32, beams=4),
}
PROTOCOLS = tuple(DECODING)


def cluster(instruction: str) -> str:
    """What makes questions dependent: the question, whatever its options; for WinoGrande both sentences of a pair.

    The sentences of a pair share their two options and differ in a word or two, rarely among the first three.
    """
    question, _, rest = instruction.partition("\n\n")
    options = re.match(r"Option1: (.*?)\s*Option2: (.*?)\s*Answer format", rest, re.DOTALL)
    if options is None:
        return question
    first_words = question.rpartition("sentence: ")[2].split()[:3]
    return " | ".join([*sorted(option.lower() for option in options.groups()), *first_words])


def build(labels: str, record: Record, wanted: Wanted) -> Example:
    """One question.

    But for the clean protocol the training prompt is Alpaca's template behind sixteen spaces; the paper's scoring
    prompt is the bare instruction.

    Args:
        labels: What they look like, as a regular expression.
        record: With instruction, output and perhaps answer.
        wanted: Protocol and purpose.

    Raises:
        ConfigError: If the gold label is missing or not among those that the instruction lists.

    Source: data processing and evaluator for commonsense in the authors' code; LLM-Adapters' scripts.
    """
    instruction = record["instruction"]
    gold = record["answer"].strip() or record["output"].rpartition(TARGET)[2].strip()
    listed = list(dict.fromkeys(re.findall(rf"\b(?:{labels})\b", instruction.rpartition("Answer format:")[2])))
    if gold not in listed:
        raise record.error(f"the answer is {gold!r}, the instruction lists {', '.join(listed) or 'no labels'}")
    answers = {label: f"{TARGET}{label}" for label in listed}
    if wanted.protocol == "clean":
        prompt = clean(instruction)
        answers = {label: clean_answer(answer) for label, answer in answers.items()}
    else:
        other = wanted.protocol == "paper" and wanted.scoring
        prompt = f"{instruction}\n" if other else alpaca(instruction, indent=16)
    return Example(prompt, answers[gold], cluster=cluster(instruction), gold=gold, choices=tuple(answers.values()))


def judge(labels: str, example: Example, completions: Sequence[str]) -> dict[str, float]:
    """The clean rule: the completion alone, labels as whole words."""
    (completion,) = completions
    return {"exact": float(extraction.label(completion, labels) == example.gold)}


def paper_judge(labels: str, example: Example, completions: Sequence[str]) -> dict[str, float]:
    """The authors' rule, on prompt and completion together."""
    (completion,) = completions
    return {"exact": float(extraction.paper_label(example.prompt + completion, labels) == example.gold)}


def llm_adapters_judge(labels: str, example: Example, completions: Sequence[str]) -> dict[str, float]:
    """LLM-Adapters' rule, on the response alone."""
    (completion,) = completions
    return {"exact": float(extraction.response_label(completion, labels) == example.gold)}


def _benchmark(name: str, folder: str, labels: str, size: int) -> Task:
    source = Source(
        place="AGI-Edgerunners/LLM-Adapters",
        host="github",
        fields=("instruction", "output"),
        optional=("answer",),
        splits={"train": f"dataset/{folder}/train.json", "test": f"dataset/{folder}/test.json"},
        folders=tuple(dict.fromkeys((f"commonsense/{folder}", folder, f"dataset/{folder}", name))),
        licence=LICENCE,
        sizes={"test": size},
    )
    rules = {"clean": judge, "paper": paper_judge, "llm_adapters": llm_adapters_judge}
    return record_task(
        name,
        source,
        partial(build, labels),
        protocols=PROTOCOLS,
        metrics=METRICS,
        decoding=DECODING,
        judge={protocol: partial(rules[protocol], labels) for protocol in PROTOCOLS},
    )


TRAINING = record_task(
    "commonsense_170k",
    Source(
        place="zwhe99/commonsense_170k",
        fields=("instruction", "output"),
        optional=("answer",),
        splits={"train": "train"},
        folders=("commonsense_170k", "commonsense/commonsense_170k"),
        files={"train": ("commonsense_170k.json", "ft-training_set/commonsense_170k.json")},
        licence=LICENCE,
        sizes={"train": 170_420},
    ),
    partial(build, ANY_LABEL),
    splits=("train", "validation"),
    protocols=PROTOCOLS,
)

TASKS = (*(_benchmark(name, *rest) for name, rest in BENCHMARKS.items()), TRAINING)
