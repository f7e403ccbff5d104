import ast
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.tasks import TASKS, docstrings, word_problems
from diablo_theory.finetune.tasks.base import split_of

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_splits_share_neither_clusters_nor_prompts(task):
    drawn = {split: task.examples(split, 400, seed) for split in SPLITS for seed in (0,)}
    for field in ("cluster", "prompt"):
        values = [{getattr(example, field) for example in drawn[split]} for split in SPLITS]
        assert all(values)
        assert sum(map(len, values)) == len(set.union(*values))
    assert all(split_of(example.cluster) == split for split in SPLITS for example in drawn[split])


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_seeds_change_the_training_order_and_nothing_else(task):
    assert task.examples("train", 50, 0) == task.examples("train", 50, 0) != task.examples("train", 50, 1)
    for split in ("validation", "test"):
        assert task.examples(split, 50, 0) == task.examples(split, 50, 1)
        assert task.examples(split, 20, 0) == task.examples(split, 50, 0)[:20]


@given(st.integers(0, 10_000))
def test_word_problem_answers_are_right(seed):
    for example in word_problems.examples("train", 5, seed):
        kind = example.cluster.split(":")[0]
        a, b = map(int, re.findall(r"\d+", example.prompt))
        assert int(example.answer) == {"add": a + b, "sub": a - b, "mul": a * b}[kind]
        assert int(example.answer) > 0
        assert word_problems.is_exact(example.answer, example.answer)


def test_commuted_sums_are_one_cluster():
    clusters = [example.cluster for example in word_problems.examples("train", 4000, 0)]
    for cluster in clusters:
        kind, numbers = cluster.split(":")
        a, b = map(int, numbers.split(","))
        assert kind == "sub" or a <= b


def test_too_many_word_problems_are_refused():
    with pytest.raises(ConfigError, match="at most 50000"):
        word_problems.examples("test", 50_001, 0)


@pytest.mark.parametrize(
    ("completion", "exact", "lenient"),
    [
        (" 42", True, True),
        ("42\n", True, True),
        (" 042", False, False),
        (" 42 apples", False, True),
        (" 20 + 22 = 42", False, True),
        (" 42 of 43", False, False),
        (" 4\n42", False, False),
        ("", False, False),
        (" -42", False, True),
        ("1,042", False, False),
    ],
)
def test_word_problem_metrics(completion, exact, lenient):
    assert word_problems.is_exact(completion, " 42") is exact
    assert word_problems.is_lenient(completion, " 42") is lenient


def test_docstring_examples_are_python():
    for example in docstrings.examples("test", 100, 0):
        assert isinstance(ast.parse(example.prompt + example.answer).body[0], ast.FunctionDef)


def test_docstring_metric_compares_the_first_line():
    assert docstrings.is_exact("    return x\n\ndef other", "    return x")
    assert not docstrings.is_exact("    return y", "    return x")
