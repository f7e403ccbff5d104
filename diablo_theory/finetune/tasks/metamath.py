"""MetaMathQA, and the two benchmarks that models trained on it are scored on.

DEVIATION(metamath-baselines): of the baselines' authors the run files have the optimiser's settings alone; prompts and
scoring in the paper's protocol are DiaBlo's for every method. MiLoRA's authors train without "Let's think step by
step", decode greedily up to 1,024 (GSM8K) and 2,048 tokens (MATH), and count only what follows "The answer is: ".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from diablo_theory.finetune.tasks import gsm8k
from diablo_theory.finetune.tasks.base import Decoding, Example, Wanted
from diablo_theory.finetune.tasks.drawing import record_task
from diablo_theory.finetune.tasks.expressions import equivalent
from diablo_theory.finetune.tasks.extraction import after_phrase, boxed
from diablo_theory.finetune.tasks.judges import NUMBER_METRICS, final_number, stated_number
from diablo_theory.finetune.tasks.records import Record, Source
from diablo_theory.finetune.tasks.templates import alpaca, clean, clean_answer

LEAD = " Let's think step by step."
PHRASE = "The answer is: "
#: The authors' templates differ: training is indented by 12 spaces, scoring by 16.
TRAINING_INDENT, SCORING_INDENT = 12, 16


def paper_prompt(question: str, wanted: Wanted) -> str:
    """Source: the authors' data processing for MetaMathQA (training) and evaluator for mathematics (scoring)."""
    return alpaca(question, indent=SCORING_INDENT if wanted.scoring else TRAINING_INDENT, lead=LEAD)


def example(question: str, answer: str, wanted: Wanted, cluster: str, gold: str = "") -> Example:
    """A problem in either protocol; the paper's target ends in its template's last line."""
    if wanted.protocol == "clean":
        return Example(clean(question), clean_answer(answer), cluster, gold)
    return Example(paper_prompt(question, wanted), f"{answer}\n{' ' * TRAINING_INDENT}", cluster, gold)


def training_example(record: Record, wanted: Wanted) -> Example:
    """One of MetaMathQA's; what was made from the same problem stays in one split."""
    return example(record["query"], record["response"], wanted, cluster=record["original_question"])


def gsm8k_example(record: Record, wanted: Wanted) -> Example:
    """One of GSM8K's."""
    if wanted.protocol == "clean":
        return gsm8k.clean_example(record)
    working, gold = gsm8k.solution(record)
    return example(record["question"], f"{working}\n{PHRASE}{gold}", wanted, record["question"], gold)


def math_example(record: Record, wanted: Wanted) -> Example:
    r"""One of MATH's; gold is what the last ``\boxed`` of the solution holds.

    Raises:
        ConfigError: If nothing is boxed.
    """
    gold = boxed(record["solution"])
    if gold is None:
        raise record.error(f"the solution has no closed \\boxed answer: {record['solution'][-40:]!r}")
    return example(record["problem"], f"{record['solution']}\n{PHRASE}{gold}", wanted, record["problem"], gold)


def stated_expression(completion: str) -> str | None:
    """What follows the last "answer is", up to the end of its sentence; a box around it is opened."""
    rest = after_phrase(completion)
    return None if rest is None else _sentence(rest)


def paper_expression(completion: str) -> str | None:
    """The same after the last "The answer is: ", to the letter."""
    _, phrase, rest = completion.rpartition(PHRASE)
    return rest.split(".\n")[0].strip().removesuffix(".").strip() if phrase else None


def _sentence(text: str) -> str:
    first = re.split(r"\n|\.\s", text.strip())[0]
    return boxed(first) or first.strip().removesuffix(".").strip()


def math_judge(example: Example, completions: Sequence[str]) -> dict[str, float]:
    """The clean rule."""
    (completion,) = completions
    return _scores(example, completion, stated_expression(completion))


def paper_math_judge(example: Example, completions: Sequence[str]) -> dict[str, float]:
    """The authors' rule, from MetaMath's evaluation."""
    (completion,) = completions
    return _scores(example, completion, paper_expression(_last_response(completion)))


def paper_number_judge(example: Example, completions: Sequence[str]) -> dict[str, float]:
    """The authors' rule: the last number behind the last heading of a response."""
    (completion,) = completions
    return final_number(example, [_last_response(completion)])


def _last_response(completion: str) -> str:
    return completion.split("### Response:")[-1]


def _scores(example: Example, completion: str, stated: str | None) -> dict[str, float]:
    exact = equivalent(stated, example.gold)
    return {"exact": float(exact), "lenient": float(exact or equivalent(boxed(completion), example.gold))}


METAMATHQA = record_task(
    "metamathqa",
    Source(
        place="meta-math/MetaMathQA",
        revision="aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18",
        fields=("query", "response", "original_question"),
        splits={"train": "train"},
        folders=("MetaMathQA", "metamathqa", "meta-math/MetaMathQA"),
        files={"train": ("MetaMathQA-395K.json", "MetaMathQA/MetaMathQA-395K.json")},
        licence="MIT now, earlier cards Apache-2.0 and CC-BY-NC-4.0",
        sizes={"train": 395_000},
    ),
    training_example,
    splits=("train", "validation"),
)

GSM8K = record_task(
    "gsm8k_metamath",
    gsm8k.SOURCE,
    gsm8k_example,
    splits=("test",),
    metrics=NUMBER_METRICS,
    decoding={"clean": Decoding(max_new_tokens=512), "paper": Decoding(max_new_tokens=256, beams=4)},
    judge={"clean": stated_number, "paper": paper_number_judge},
)

MATH = record_task(
    "math",
    Source(
        place="hendrycks/competition_math",
        fields=("problem", "solution"),
        aliases={"problem": "instruction", "solution": "output"},
        splits={"test": "test"},
        folders=("MATH", "competition_math", "hendrycks/competition_math"),
        files={"test": ("MATH_test.json", "MATH_test.jsonl", "MATH/MATH_test.json", "MATH/MATH_test.jsonl")},
        licence="MIT by its card, but the hub has withdrawn it after a DMCA notice: use a copy that you have",
        sizes={"test": 5000},
    ),
    math_example,
    splits=("test",),
    metrics={
        "exact": "the expression after 'the answer is' is the gold one, in one form",
        "lenient": "that, or the last boxed expression",
    },
    decoding={"clean": Decoding(max_new_tokens=512), "paper": Decoding(max_new_tokens=512, beams=4)},
    judge={"clean": math_judge, "paper": paper_math_judge},
)

TASKS = (METAMATHQA, GSM8K, MATH)
