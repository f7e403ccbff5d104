import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from diablo_theory.errors import ConfigError
from diablo_theory.files import experiments_folder
from diablo_theory.finetune.config import load_run, resolve
from diablo_theory.finetune.data import encode, length, number_of_steps
from diablo_theory.finetune.planning import header, of_run, plan, work_of
from diablo_theory.finetune.planning.datasets import DATASETS
from diablo_theory.finetune.planning.generation import decoding
from diablo_theory.finetune.planning.shapes import model_shapes
from diablo_theory.finetune.planning.work import Scored
from diablo_theory.finetune.setup import training_data
from diablo_theory.finetune.tasks import TASKS, Example, Wanted

FULL = {
    str(file.relative_to(experiments_folder())): config
    for file in sorted(experiments_folder().glob("*/*.yaml"))
    if file.parent.name != "sweeps" and (config := load_run(file)).scale == "full"
}
#: What the evaluators behind the paper's protocol leave of the published test sets.
SCORED_IN_PAPER = {"gsm8k": 82 * 16, "hexphi": 5 * 64}


def work(**changes):
    return work_of(resolve({"steps": None, "epochs": 1, "eval_items": None, "protocol": "paper"} | changes))


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def arc_record(number, labels="answer1/answer2"):
    return {
        "instruction": f"Question {number}?\n\nAnswer1: a Answer2: b\n\nAnswer format: {labels}",
        "input": "",
        "output": "the correct answer is answer1",
        "answer": "answer1",
    }


@pytest.fixture
def arc(tmp_path):
    """A hundred training questions and thirty test questions in the published form."""
    folder = tmp_path / "ARC-Easy"
    folder.mkdir()
    for split, count in (("train", 100), ("test", 30)):
        (folder / f"{split}.json").write_text(json.dumps([arc_record(f"{split} {n}") for n in range(count)]))
    return {"train_on": "arc_easy", "evaluate_on": ["arc_easy"], "data_root": tmp_path}


@pytest.mark.parametrize("name", FULL)
def test_full_runs_take_the_steps_and_score_the_items_that_are_planned(name):
    config = FULL[name]
    planned, batch = work_of(config), config.batch_size
    examples = DATASETS[config.train_on].examples
    steps = config.steps or (
        int(config.epochs) * (examples // batch) if config.drop_last else math.ceil(config.epochs * examples / batch)
    )
    assert planned.total_steps == steps
    if config.epochs:
        assert steps == number_of_steps(planned.examples, config.epochs, batch, drop_last=config.drop_last)
    cut = SCORED_IN_PAPER if config.protocol == "paper" else {}
    sizes = [cut.get(task, TASKS[task].sizes["test"]) for task in config.evaluate_on]
    assert planned.eval_items == sum(min(size, config.eval_items or size) for size in sizes)


def test_sizes_are_the_published_ones():
    tests = [name for name, task in TASKS.items() if "test" in task.splits and task.bounded and name != "docstrings"]
    assert sum(TASKS[name].sizes["test"] for name in tests) == 22_419 + 3 * 1319 + 5000 + 1000 + 238 + 254 + 164 + 330
    for name, known in DATASETS.items():
        assert TASKS[name].sizes.get("train", known.examples) == known.examples


def test_the_steps_of_the_known_files():
    assert work_of(FULL["arithmetic/gsm8k_llama2-7b_diablo.yaml"]).total_steps == 1401
    assert work_of(FULL["commonsense/llama-13b_dora.yaml"]).total_steps == 31_954
    assert work_of(FULL["commonsense/llama2-7b_diablo-n64.yaml"]).total_steps == 31_953


@pytest.mark.parametrize(("protocol", "drop_last"), [("clean", False), ("paper", False), ("paper", True)])
@pytest.mark.parametrize("epochs", [1, 1.5, 3])
def test_the_run_takes_as_many_steps_as_planned(protocol, epochs, drop_last, arc, tokenizer):
    config = resolve(arc | {"steps": None, "epochs": epochs, "protocol": protocol, "drop_last": drop_last})
    examples = TASKS["arc_easy"].examples(Wanted("train", protocol=protocol, data_root=arc["data_root"]))
    data = training_data(config, examples, tokenizer)
    planned = work_of(config)
    assert planned.examples == len(examples)
    assert planned.total_steps == len(data) // config.batch_size
    assert (planned.examples < 100) is (protocol == "clean")


def test_both_protocols_score_what_the_task_leaves(arc):
    assert work(train_on="gsm8k", evaluate_on=["gsm8k"], protocol="clean").eval_items == 1319
    assert work(train_on="gsm8k", evaluate_on=["gsm8k"]).eval_items == 1312
    assert work(train_on="saferpaca", evaluate_on=["hexphi"]).eval_items == 320
    assert work(train_on="gsm8k", evaluate_on=["gsm8k", "hexphi"], eval_items=315).eval_items == 315 + 315
    held_out = len(TASKS["arc_easy"].examples(Wanted("validation", data_root=arc["data_root"])))
    assert work(**arc, protocol="clean", eval_split="validation").eval_items == held_out < 30
    assert work(**arc, protocol="clean", eval_split="validation", eval_items=1).eval_items == 1


@pytest.mark.parametrize(("name", "problems", "scored"), [("gsm8k", 37, 32), ("hexphi", 130, 128)])
def test_what_a_task_leaves_is_what_it_says(name, problems, scored, tmp_path):
    records = [{"question": f"{n}?", "answer": f"So\n#### {n}", "prompt": f"Please {n}."} for n in range(problems)]
    folder = tmp_path / {"gsm8k": "gsm8k", "hexphi": "hex_phi"}[name]
    folder.mkdir()
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, records)))
    for protocol, left in (("paper", scored), ("clean", problems)):
        found = TASKS[name].examples(Wanted("test", protocol=protocol, scoring=True, data_root=tmp_path))
        assert len(found) == TASKS[name].scored(problems, protocol) == left


def test_sets_without_an_end_score_what_is_asked_for():
    assert work(steps=3, epochs=None, warmup_steps=0, eval_items=70).eval_items == 70


def test_samples_are_drawn_a_problem_at_a_time():
    planned = work(train_on="code_alpaca", evaluate_on=["humaneval"], eval_batch_size=8)
    assert planned.scored == (Scored(items=164, new_tokens=512, samples=20, batch_size=20),)
    assert decoding(model_shapes("SmolLM2-135M"), planned).batches == 164
    assert work(train_on="gsm8k", evaluate_on=["gsm8k"], eval_batch_size=8).scored[0].batch_size == 8


def test_each_task_is_decoded_to_its_own_length():
    config = FULL["arithmetic/llama2-7b_lora.yaml"]
    assert work_of(config).scored == (
        Scored(items=1319, new_tokens=256, beams=4, batch_size=32),
        Scored(items=5000, new_tokens=512, beams=4, batch_size=32),
    )


def test_examples_are_those_that_the_run_reads():
    def examples(**changes):
        return work(train_on="gsm8k", evaluate_on=["gsm8k"], **changes).examples

    assert [examples(), examples(protocol="clean")] == [7473, 6686]
    assert [examples(train_items=500), examples(steps=10, epochs=None)] == [500, 160]
    assert examples(steps=10_000, epochs=None, train_items=7000) == 7000


def test_a_number_of_examples_that_nobody_has_published_is_marked():
    for name in DATASETS:
        planned = work(train_on=name, evaluate_on=["gsm8k"])
        assert planned.examples_assumed is (name in ("math_10k", "saferpaca")), name
        assert ("examples (assumed) of" in header(plan(planned, "L40"))) is planned.examples_assumed
    assert not work(train_on="math_10k", evaluate_on=["gsm8k"], train_items=500).examples_assumed


def test_the_clean_part_of_a_large_set_is_counted_and_not_guessed(tmp_path):
    large = {"train_on": "math_10k", "evaluate_on": ["svamp"], "protocol": "clean"}
    assert work(**large, train_items=5000).examples == 5000
    records = [{"instruction": f"{n} + 1?", "output": f"The answer is {n + 1}."} for n in range(200)]
    (tmp_path / "math_10k.json").write_text(json.dumps(records))
    left = len(TASKS["math_10k"].examples(Wanted("train", data_root=tmp_path)))
    assert work(**large, data_root=tmp_path).examples == left < 200


def test_data_that_must_be_counted_and_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="arc_easy: without the data it is not known how many problems there are"):
        work(train_on="arc_easy", evaluate_on=["arc_easy"], data_root=tmp_path)


def test_a_task_without_problems(monkeypatch):
    monkeypatch.setattr(of_run, "TASKS", TASKS | {"docstrings": TASKS["docstrings"].__class__("x", lambda wanted: [])})
    with pytest.raises(ConfigError, match="docstrings has no train problems"):
        work(train_on="docstrings", evaluate_on=["humaneval"])


@pytest.mark.parametrize("name", DATASETS)
@given(most=st.integers(1, 3000))
def test_lengths_are_cut_where_the_run_cuts_them(name, most):
    planned = work(train_on=name, evaluate_on=["gsm8k"], max_length=most)
    assert planned.length <= planned.max_tokens + 1e-6
    assert planned.max_tokens <= max(2, most)
    assert planned.eval_prompt_tokens == DATASETS[name].prompt_tokens
    assert planned.prompt_tokens <= DATASETS[name].prompt_tokens
    assert planned.answer_tokens <= DATASETS[name].answer_tokens


@pytest.mark.parametrize("most", [1, 2, 3, 9, 10, 12, 15, 20])
def test_a_cut_example_is_as_long_as_planned(most, tokenizer):
    (whole,) = encode([Example("a b c d e", "f g h", "")], tokenizer)
    (cut,) = encode([Example("a b c d e", "f g h", "")], tokenizer, most)
    prompt, answer = of_run._cut(len(whole["prompt_ids"]), len(whole["answer_ids"]), most)
    assert (prompt, answer) == (len(cut["prompt_ids"]), len(cut["answer_ids"]))
    assert prompt + answer == length(cut)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "miss", "alpha": 2.0}, "alpha=2.0 does not go with method miss"),
        ({"method": "bone", "dropout": 0.1}, "dropout=0.1 does not go with method bone"),
    ],
)
def test_options_that_the_run_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        work(train_on="gsm8k", evaluate_on=["gsm8k"], **changes)
