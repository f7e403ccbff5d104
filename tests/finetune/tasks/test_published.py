"""What holds for every task that is made from a published set."""

import dataclasses

import pytest

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.tasks import TASKS, Wanted, commonsense
from diablo_theory.finetune.tasks.base import split_of
from diablo_theory.finetune.tasks.records import digest

#: Source: protocols of LLM-Adapters, GSM8K and MATH.
TEST_SIZES = {
    "boolq": 3270,
    "piqa": 1838,
    "social_i_qa": 1954,
    "hellaswag": 10_042,
    "winogrande": 1267,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
    "gsm8k": 1319,
    "gsm8k_metamath": 1319,
    "gsm8k_math10k": 1319,
    "math": 5000,
    "svamp": 1000,
    "mawps": 238,
    "aqua": 254,
}
#: Generated here, or with programs and private prompts instead of answers.
OF_THEIR_OWN_KIND = {"word_problems", "docstrings", "humaneval", "hexphi"}
PUBLISHED = {name: task for name, task in TASKS.items() if name not in OF_THEIR_OWN_KIND}
EXPECTED = {
    *("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
    *("commonsense_170k", "gsm8k", "metamathqa", "gsm8k_metamath", "math"),
    *("math_10k", "gsm8k_math10k", "svamp", "mawps", "aqua", "code_alpaca", "saferpaca"),
}
SCORED = {name: task for name, task in PUBLISHED.items() if task.metrics}
LEARNT = {name: task for name, task in PUBLISHED.items() if "train" in task.splits}
all_tasks = pytest.mark.parametrize("task", PUBLISHED.values(), ids=PUBLISHED)
scored_tasks = pytest.mark.parametrize("task", SCORED.values(), ids=SCORED)


def in_all_protocols(tasks):
    pairs = [(task, protocol) for task in tasks.values() for protocol in task.protocols]
    return pytest.mark.parametrize(("task", "protocol"), pairs, ids=[f"{task.name}-{name}" for task, name in pairs])


def every(task, data_root, protocol="clean", scoring=False):
    """Examples of all the splits that the task has in a protocol."""
    for split in task.splits if protocol == "clean" else set(task.splits) - {"validation"}:
        yield from task.examples(Wanted(split=split, protocol=protocol, scoring=scoring, data_root=data_root))


def test_all_are_there():
    assert set(PUBLISHED) == EXPECTED
    assert all(name == task.name for name, task in TASKS.items())
    assert all(task.bounded for task in PUBLISHED.values())


@pytest.mark.parametrize("task", LEARNT.values(), ids=LEARNT)
def test_training_and_validation_share_no_cluster_and_leave_nothing_out(task, data_root):
    train, held_out = (task.examples(Wanted(split=split, data_root=data_root)) for split in ("train", "validation"))
    assert {split_of(example.cluster) for example in held_out} == {"validation"}
    assert "validation" not in {split_of(example.cluster) for example in train}
    assert len(train) + len(held_out) == 70


@all_tasks
def test_the_seed_orders_the_training_set_and_nothing_else(task, data_root):
    for split in task.splits:
        first, again, other = (
            task.examples(Wanted(split=split, seed=seed, data_root=data_root)) for seed in (0, 0, 1)
        )
        assert first == again
        assert (first == other) == (split != "train" and len(first) > 0)
        assert {example.prompt for example in first} == {example.prompt for example in other}


@all_tasks
def test_a_smaller_count_is_the_head_of_a_larger_one_and_no_head_of_the_file(task, data_root):
    for split in task.splits:
        few, more, whole = (
            task.examples(Wanted(split=split, count=count, data_root=data_root)) for count in (3, 30, None)
        )
        assert few == more[:3] == whole[:3]
        assert len(more) == min(30, len(whole))
    if "test" in task.splits:
        assert len(whole) == 70
        in_file = [f"{number} " in example.prompt for number, example in enumerate(whole)]
        assert not all(in_file)


@pytest.mark.parametrize("name", TEST_SIZES)
def test_a_cut_test_set_is_refused_where_the_whole_is_wanted(name, data_root):
    """By the same counts that plans go by."""
    message = rf"test\.jsonl? holds 70 records; the test split of \S+ has {TEST_SIZES[name]:,}: is it cut, or another"
    for count in (3, None):
        with pytest.raises(ConfigError, match=message):
            TASKS[name].examples(Wanted("test", count=count, data_root=data_root, whole=True))


@pytest.mark.parametrize(
    ("name", "size"),
    [("gsm8k", 7473), ("commonsense_170k", 170_420), ("metamathqa", 395_000), ("code_alpaca", 20_022)],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_cut_training_set_is_refused_where_the_whole_is_wanted(name, size, split, data_root):
    with pytest.raises(ConfigError, match=f"holds 70 records; the train split of .* has {size:,}"):
        TASKS[name].examples(Wanted(split, data_root=data_root, whole=True))


@in_all_protocols(PUBLISHED)
def test_a_prompt_holds_no_answer_and_reads_on_into_it(task, protocol, data_root):
    for scoring in (False, True):
        for example in every(task, data_root, protocol, scoring):
            assert example.answer.strip() not in example.prompt
            assert example.prompt[-1].isspace() or example.answer[0].isspace()
            assert example.cluster
            if example.choices:
                assert example.answer in example.choices
                assert len(set(example.choices)) == len(example.choices) > 1


@all_tasks
def test_the_clean_prompt_is_the_same_in_training_and_scoring(task, data_root):
    assert list(every(task, data_root)) == list(every(task, data_root, scoring=True))


@scored_tasks
def test_clean_prompts_do_not_end_in_white_space(task, data_root):
    for example in every(task, data_root):
        assert example.prompt == example.prompt.rstrip()
        assert example.answer.startswith(" ")
        assert not example.answer.startswith("  ")


@in_all_protocols(SCORED)
def test_the_gold_completion_is_right_and_others_are_not(task, protocol, data_root):
    judge = task.judge[protocol]
    for example in every(task, data_root, protocol, scoring=True):
        scores = judge(example, [example.answer])
        assert set(scores) == set(task.metrics) - {"likelihood"}
        assert set(scores.values()) == {1.0}
        assert judge(example, ["Nothing fits, the correct answer is 0.12345."])["exact"] == 0
        for other in example.choices:
            assert judge(example, [other])["exact"] == float(other == example.answer)


@in_all_protocols(SCORED)
def test_scored_tasks_say_how_to_decode(task, protocol):
    assert next(iter(task.metrics)) == "exact"
    assert task.decoding[protocol].samples == 1
    assert task.decoding[protocol].temperature == 0
    assert task.decoding["clean"].beams == 1


def test_every_task_has_two_protocols_and_commonsense_a_third():
    third = {name for name, task in TASKS.items() if "llm_adapters" in task.protocols}
    assert third == {*commonsense.BENCHMARKS, "commonsense_170k"}
    for name, task in TASKS.items():
        assert task.protocols[:2] == ("clean", "paper")
        assert task.protocols[2:] == (("llm_adapters",) if name in third else ())
        if task.metrics:
            assert set(task.judge) == set(task.decoding) == set(task.protocols)


def test_training_sets_have_nothing_to_score():
    for name in set(PUBLISHED) - set(SCORED):
        assert PUBLISHED[name].splits == ("train", "validation")
        assert not PUBLISHED[name].judge


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("svamp", "train", "svamp has no train split, only: test"),
        ("metamathqa", "test", "metamathqa has no test split, only: train, validation"),
    ],
)
def test_a_split_that_there_is_not_is_refused(name, split, message, data_root):
    with pytest.raises(ConfigError, match=message):
        TASKS[name].examples(Wanted(split=split, data_root=data_root))


def test_examples_have_a_digest(data_root):
    def of(seed):
        examples = TASKS["gsm8k"].examples(Wanted(split="train", seed=seed, data_root=data_root))
        return digest(map(dataclasses.asdict, examples))

    assert of(0) == of(0) != of(1)
