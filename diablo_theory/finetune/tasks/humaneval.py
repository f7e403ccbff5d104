"""HumanEval: the body of a Python function from its docstring, right if the problem's tests pass.

The completions are programs that a model has written. They are run in :mod:`diablo_theory.finetune.sandbox`, and only
if the user has allowed it.

``paper`` is the protocol of the quoted numbers: the bare beginning of the function without blanks around it, 20
samples at temperature 0.2 and top-p 0.95, cut at the usual strings, 3 seconds for the tests, and the unbiased estimate
of pass@k. ``clean`` differs in one thing: the prompt is as published, with its last line break. It still is no prompt
of a training set; there is none of this form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from diablo_theory.errors import ConfigError, SandboxError
from diablo_theory.finetune import sandbox
from diablo_theory.finetune.tasks.base import Decoding, Example, Task, Wanted, in_both
from diablo_theory.finetune.tasks.drawing import drawn
from diablo_theory.finetune.tasks.records import Record, Source, load

SOURCE = Source(
    place="openai/openai_humaneval",
    fields=("task_id", "prompt", "canonical_solution", "test", "entry_point"),
    splits={"test": "test"},
    folders=("humaneval", "openai_humaneval"),
    files={"test": ("humaneval/HumanEval.jsonl", "HumanEval.jsonl")},
    licence="MIT",
    sizes={"test": 164},
)

#: Samples of each problem, and the k of pass@k.
SAMPLES, BUDGETS = 20, (1, 5, 10)
STOP = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")
LIMITS = sandbox.Limits(seconds=3.0)


def examples(wanted: Wanted) -> list[Example]:
    """The problems in one fixed shuffle, so that a slice is not the head of the file.

    Args:
        wanted: The split ``test`` and how many; the protocol decides on the prompt's last line break.

    Returns:
        Examples whose answer is the published solution and whose gold is the program that tests it.

    Raises:
        ConfigError: For another split, or records that are not HumanEval's.
        DataUnavailableError: If they are not to be had.
    """
    if wanted.split != "test":
        raise ConfigError(f"humaneval has one split, test; got {wanted.split!r}")
    rows = load(SOURCE, "test", wanted.data_root, whole=wanted.whole)
    found = [_example(row, stripped=wanted.protocol == "paper") for row in rows]
    if len({example.cluster for example in found}) < len(found):
        raise ConfigError(f"humaneval: expected problems that each have a task_id of their own, got {len(found)} rows")
    return drawn(found, wanted)


def _example(row: Record, stripped: bool) -> Example:
    name, prompt, entry = row["task_id"], row["prompt"], row["entry_point"]
    if f"def {entry}" not in prompt or "def check(" not in row["test"]:
        raise row.error(f"{name}: the prompt must define {entry!r}, and the test a function check")
    answer = row["canonical_solution"]
    if stripped:
        answer, prompt = prompt[len(prompt.rstrip()) :] + answer, prompt.strip()
    return Example(prompt, answer, str(name), gold=f"{row['test']}\ncheck({entry})\n")


def pass_at(k: int, samples: int, passed: int) -> float:
    """The unbiased estimate of the chance that one of k samples passes, from more samples than k.

    Args:
        k: How many are drawn.
        samples: How many there are.
        passed: How many of those pass.

    Returns:
        1 - C(samples - passed, k) / C(samples, k), rounded once.

    Raises:
        ConfigError: Unless 1 <= k <= samples and 0 <= passed <= samples.

    Source: Chen et al., Evaluating Large Language Models Trained on Code, equation 1.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise ConfigError(
            f"pass@{k} needs at least {k} samples and 0 to all of them passed, got {passed} of {samples}"
        )
    every = math.comb(samples, k)
    return (every - math.comb(samples - passed, k)) / every


def judge(example: Example, completions: Sequence[str]) -> dict[str, float]:
    """Run every completion against the problem's tests.

    DEVIATION(humaneval-sandbox): the harness behind the quoted numbers lets programs import whatever is installed,
    read files and use any memory; here they have the standard library, no files and 1 GiB.

    Args:
        example: The problem.
        completions: What followed the prompt, any number of samples.

    Returns:
        pass@k for each k of :data:`BUDGETS` up to the number of samples; from fewer than k samples there is no
        unbiased estimate, so pass@k is left out.

    Raises:
        ConfigError: Without permission to run generated code.
        SandboxError: If a program could not be started: this is an error, and no wrong answer.
    """
    programs = [f"{example.prompt}{completion}\n{example.gold}" for completion in completions]
    try:
        outcomes = sandbox.run_all(programs, LIMITS)
    except SandboxError as error:
        raise SandboxError(f"{example.cluster}: {error}") from error
    passed = sum(outcome.finished for outcome in outcomes)
    return {f"pass@{k}": pass_at(k, len(outcomes), passed) for k in BUDGETS if k <= len(outcomes)}


def _metric(k: int) -> str:
    return (
        f"one of {k} samples passes the problem's tests (unbiased estimate)" if k > 1 else "a sample passes the tests"
    )


#: DEVIATION(humaneval-length): 512 new tokens; the harness behind the quoted numbers counts the prompt's as well.
DECODING = Decoding(max_new_tokens=512, samples=SAMPLES, temperature=0.2, top_p=0.95, stop=STOP)


def ready() -> dict[str, bool]:
    """The sandbox's layers, once the user's permission is there; see :mod:`diablo_theory.finetune.sandbox`."""
    sandbox.require_permission()
    return sandbox.protections()


TASK = Task(
    name="humaneval",
    examples=examples,
    metrics={f"pass@{k}": _metric(k) for k in BUDGETS},
    decoding=in_both(DECODING),
    judge=in_both(judge),
    splits=("test",),
    sizes=SOURCE.sizes,
    ready=ready,
)
