import itertools
import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.errors import ConfigError, SandboxError
from diablo_theory.finetune import sandbox
from diablo_theory.finetune.sandbox import Limits, Outcome
from diablo_theory.finetune.tasks import TASKS, humaneval
from diablo_theory.finetune.tasks.base import Wanted

PROMPT = '''from typing import List


def twice(numbers: List[int]) -> List[int]:
    """ Every number doubled.
    >>> twice([1, 2])
    [2, 4]
    """
'''
ROW = {
    "task_id": "Little/0",
    "prompt": PROMPT,
    "entry_point": "twice",
    "canonical_solution": "    return [2 * n for n in numbers]\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n"
    "    assert candidate([]) == []\n",
}
OTHER = ROW | {"task_id": "Little/1"}


@pytest.fixture
def data_root(tmp_path):
    write(tmp_path, ROW, OTHER)
    return tmp_path


def write(root, *rows):
    (root / "humaneval").mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "humaneval" / "test.jsonl").write_text(text, encoding="utf-8")


def test_the_task_is_registered_and_asks_for_permission_first(monkeypatch):
    task = TASKS["humaneval"]
    monkeypatch.delenv(sandbox.VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="programs that a model has written"):
        task.ready()
    assert list(task.metrics) == ["pass@1", "pass@5", "pass@10"]
    for decoding in task.decoding.values():
        assert (decoding.samples, decoding.temperature, decoding.top_p, decoding.beams) == (20, 0.2, 0.95, 1)
        assert max(humaneval.BUDGETS) <= decoding.samples


def test_a_slice_is_no_head_of_the_file(tmp_path):
    write(tmp_path, *(ROW | {"task_id": f"Little/{number}"} for number in range(60)))
    few, whole = (humaneval.examples(Wanted("test", count=count, data_root=tmp_path)) for count in (12, None))
    assert few == whole[:12] == humaneval.examples(Wanted("test", count=12, seed=3, data_root=tmp_path))
    numbers = [int(example.cluster.rpartition("/")[2]) for example in whole]
    assert sorted(numbers) == list(range(60))
    assert max(numbers[:12]) >= 40 > min(numbers[:12])


def test_a_cut_file_is_refused_where_the_whole_is_wanted(data_root):
    with pytest.raises(
        ConfigError, match=r"test\.jsonl holds 2 records; the test split of openai/openai_humaneval has 164"
    ):
        humaneval.examples(Wanted("test", data_root=data_root, whole=True))


def test_prompts_in_both_protocols(data_root):
    clean, paper = (
        humaneval.examples(Wanted("test", protocol=protocol, data_root=data_root)) for protocol in ("clean", "paper")
    )
    assert [example.cluster for example in clean] == [example.cluster for example in paper]
    assert clean[0].prompt == PROMPT
    assert paper[0].prompt == PROMPT.strip()
    assert clean[0].prompt + clean[0].answer == paper[0].prompt + paper[0].answer
    assert humaneval.examples(Wanted("test", count=1, data_root=data_root)) == clean[:1]


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_solutions_pass_and_wrong_ones_do_not(data_root, monkeypatch, protocol):
    monkeypatch.setenv(sandbox.VARIABLE, "anyway")
    monkeypatch.setattr(humaneval, "LIMITS", Limits(seconds=1))
    example = humaneval.examples(Wanted("test", protocol=protocol, data_root=data_root))[0]
    right = [example.answer, "\n    numbers = [n + n for n in numbers]\n    return numbers", example.answer + "\n\n#"]
    wrong = [
        "",
        "\n    return numbers",
        "\n    pass",
        "\n    while True: pass",
        "\n    import os; os._exit(0)",
        "\n    raise SystemExit(0)",
        "\n    return twice(numbers)",
        "\n    '''",
        "\nimport sys; sys.exit(0)",
        "\n    return numbers\ndef check(candidate): pass",
    ]
    for completion in right:
        assert humaneval.judge(example, [completion]) == {"pass@1": 1.0}
    for completion in wrong:
        assert humaneval.judge(example, [completion]) == {"pass@1": 0.0}
    scores = humaneval.judge(example, right + wrong[:2])
    assert scores == {"pass@1": pytest.approx(0.6), "pass@5": 1.0}


def test_samples_that_could_not_be_run_are_an_error(monkeypatch, data_root):
    def fail(*_):
        raise SandboxError("no memory")

    monkeypatch.setattr(humaneval.sandbox, "run_all", fail)
    example = humaneval.examples(Wanted("test", data_root=data_root))[1]
    with pytest.raises(SandboxError, match=f"{example.cluster}: no memory"):
        humaneval.judge(example, ["x"])


@pytest.mark.parametrize(("samples", "metrics"), [(1, 1), (4, 1), (5, 2), (9, 2), (10, 3), (20, 3)])
def test_what_the_samples_do_not_allow_is_left_out(monkeypatch, data_root, samples, metrics):
    outcome = Outcome(True, "finished", "", 0.0, ())
    monkeypatch.setattr(humaneval.sandbox, "run_all", lambda programs, _: [outcome] * len(programs))
    example = humaneval.examples(Wanted("test", data_root=data_root))[0]
    assert humaneval.judge(example, ["x"] * samples) == dict.fromkeys(["pass@1", "pass@5", "pass@10"][:metrics], 1.0)


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_passing_sample(samples):
    for passed in range(samples + 1):
        marks = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            draws = list(itertools.combinations(marks, k))
            assert humaneval.pass_at(k, samples, passed) == float(Fraction(sum(map(any, draws)), len(draws)))


@given(st.integers(1, 2000), st.data())
def test_pass_at_k_is_exact_for_many_samples(samples, data):
    k, passed = data.draw(st.integers(1, samples)), data.draw(st.integers(0, samples))
    exact = 1 - math.prod((Fraction(max(samples - passed - i, 0), samples - i) for i in range(k)), start=Fraction(1))
    assert humaneval.pass_at(k, samples, passed) == float(exact)


@pytest.mark.parametrize(("k", "samples", "passed"), [(2, 1, 1), (0, 1, 1), (1, 1, 2), (1, 1, -1)])
def test_pass_at_k_needs_enough_samples(k, samples, passed):
    with pytest.raises(ConfigError, match=f"pass@{k} needs at least {k} samples .* got {passed} of {samples}"):
        humaneval.pass_at(k, samples, passed)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, ROW], "a task_id of their own, got 2 rows"),
        ([ROW | {"entry_point": "thrice"}], "the prompt must define 'thrice'"),
        ([ROW | {"test": "assert True"}], "the test a function check"),
    ],
)
def test_other_rows_are_refused(tmp_path, rows, message):
    write(tmp_path, *rows)
    with pytest.raises(ConfigError, match=message):
        humaneval.examples(Wanted("test", data_root=tmp_path))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_there_is_one_split(split):
    with pytest.raises(ConfigError, match=f"one split, test; got '{split}'"):
        humaneval.examples(Wanted(split))
