"""Instructions and answers to learn from, without a benchmark of their own: CodeAlpaca and SaferPaca.

DEVIATION(lori-precision): LoRI's authors, whose training the run files have, hold the weights in float32, train in
FSDP's mixed bfloat16 and decode HumanEval in float32; the run files hold frozen weights in bfloat16 throughout.
"""

from __future__ import annotations

from diablo_theory.finetune.tasks.base import Example, Task, Wanted
from diablo_theory.finetune.tasks.drawing import record_task
from diablo_theory.finetune.tasks.records import Record, Source
from diablo_theory.finetune.tasks.templates import alpaca


def build(record: Record, wanted: Wanted) -> Example:
    """One instruction in Alpaca's template, in both protocols; what is asked of the same input stays in one split.

    Source: LoRI's tasks for code and safety.
    """
    instruction, context = record["instruction"], record["input"]
    return Example(alpaca(instruction, context), record["output"], cluster=f"{instruction}\n{context}".strip())


def _training_set(name: str, source: Source) -> Task:
    return record_task(name, source, build, splits=("train", "validation"))


CODE_ALPACA = _training_set(
    "code_alpaca",
    Source(
        place="sahil2801/CodeAlpaca-20k",
        fields=("instruction", "output"),
        optional=("input",),
        splits={"train": "train"},
        folders=("code_alpaca", "CodeAlpaca-20k", "sahil2801/CodeAlpaca-20k"),
        files={"train": ("code_alpaca_20k.json", "CodeAlpaca-20k/code_alpaca_20k.json")},
        licence="CC-BY-4.0 by the hub's card, CC-BY-NC-4.0 by its GitHub repository",
        sizes={"train": 20_022},
    ),
)

#: 20,000 instructions of Alpaca's and 2,000 about safety.
SAFERPACA = _training_set(
    "saferpaca",
    Source(
        place="vinid/safety-tuned-llamas",
        host="github",
        fields=("instruction", "output"),
        optional=("input",),
        splits={"train": "data/training/saferpaca_Instructions_2000.json"},
        folders=("saferpaca",),
        files={"train": ("saferpaca_Instructions_2000.json", "data/training/saferpaca_Instructions_2000.json")},
        licence="CC-BY-NC-4.0",
    ),
)

TASKS = (CODE_ALPACA, SAFERPACA)
