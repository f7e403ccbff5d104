"""Run folders that were cut short or changed by hand: each is refused in words that name file, value and remedy."""

import json
import shutil

import pandas as pd
import pytest

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.ended_runs import ended, not_ended, read_outcomes, read_record, read_training

NAMES = {"suite": "word_problems", "model": "small", "method": "diablo", "seed": 1}
CONFIG = NAMES | {"protocol": "clean", "dtype": "float32", "quantise": None, "num_blocks": 64, "learning_rate": 0.01}
CONFIG |= {"evaluate_on": ["word_problems"], "eval_split": "test", "scale": "small"}
METRICS = NAMES | {"label": "DiaBlo N=64", "model_sha256": "ab", "trainable_params": 10, "trainable_pct": 1.5}
METRICS |= {"steps": 60, "train_seconds": 9.5, "data": {"train": "cd", "word_problems": "ef"}}
MADE = {"date": "2030-01-01", "cpu": "c", "device": "cpu", "torch": "2", "transformers": "5", "peft": "0"}
MADE |= {"commit": "abc", "dirty": False}
METRICS |= {"provenance": MADE}
SCORES = {"n": 2, "exact": 0.5, "loss_per_token": 0.6, "means": {"exact": "right"}}
ITEMS = pd.DataFrame(
    {"item": [0, 1], "cluster": "c", "prompt": ["p", "q"], "answer": "1", "gold": "", "completion": ""}
)
ITEMS = ITEMS.assign(exact=[1.0, 0.0], loss_sum=[1.0, 2.0], tokens=[2, 3])


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "diablo-seed=1"
    (run / "predictions").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(CONFIG))
    (run / "metrics.json").write_text(json.dumps(METRICS | {"scores": {"word_problems": SCORES}}))
    ITEMS.to_csv(run / "predictions" / "word_problems.csv", index=False)
    return run


def changed(path, changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))


def test_a_whole_run_is_read_as_it_is(folder):
    record = read_record(folder)
    assert record.finished
    assert record.config == CONFIG
    items = read_outcomes(folder / "predictions" / "word_problems.csv", record.metrics["scores"]["word_problems"])
    pd.testing.assert_frame_equal(items, ITEMS, check_dtype=False)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "config.json",
            {"seed": "gone"},
            "config.json was edited, or is of another version: seed is missing. Put it back",
        ),
        ("config.json", {"seed": 1.5}, "seed=1.5 is not allowed: Input should be a valid integer"),
        ("config.json", {"seed": None}, "seed=None is not allowed"),
        ("config.json", {"seed": 0}, "config.json says seed=0, metrics.json beside it 1"),
        ("config.json", {"method": "lora"}, "config.json says method='lora', metrics.json beside it 'diablo'"),
        (
            "config.json",
            {"method": "dibalo"},
            "method='dibalo' is not allowed: unknown method 'dibalo'. Did you mean 'diab",
        ),
        ("config.json", {"eval_split": "tset"}, "eval_split='tset' is not allowed: Input should be 'test' or 'valid"),
        ("config.json", {"learning_rate": "fast"}, "learning_rate='fast' is not allowed"),
        ("config.json", {"quantise": {"bits": 4}}, "quantise.method is missing"),
        ("config.json", {"evaluate_on": ["boolq"]}, "metrics.json has no scores of boolq, which config.json lists"),
        ("metrics.json", {"label": "gone"}, "metrics.json was edited, or is of another version: label is missing"),
        ("metrics.json", {"scores": "gone"}, "scores is missing"),
        ("metrics.json", {"scores": {}}, "metrics.json has no scores of word_problems"),
        ("metrics.json", {"scores": {"word_problems": {"n": 2}}}, "scores.word_problems.loss_per_token is missing"),
        ("metrics.json", {"scores": {"word_problems": SCORES | {"n": 0}}}, "scores.word_problems.n=0 is not allowed"),
        ("metrics.json", {"scores": {"word_problems": SCORES | {"exact": "x"}}}, "scores.word_problems.exact='x' is"),
        ("metrics.json", {"trainable_pct": 400}, "trainable_pct=400 is not allowed"),
        ("metrics.json", {"train_seconds": -1}, "train_seconds=-1 is not allowed"),
        ("metrics.json", {"data": {"train": "cd"}}, "metrics.json has no data of word_problems"),
        ("metrics.json", {"provenance": None}, "provenance=None is not allowed"),
        ("metrics.json", {"provenance": {}}, "provenance.cpu is missing"),
        ("metrics.json", {"provenance": MADE | {"date": 3}}, "provenance.date=3 is not allowed"),
        ("metrics.json", {"provenance": MADE | {"date": "soon"}}, "provenance.date='soon' is not allowed"),
        ("metrics.json", {"provenance": MADE | {"device": None}}, "provenance.device=None is not allowed"),
        ("metrics.json", {"provenance": MADE | {"dirty": "no"}}, "provenance.dirty='no' is not allowed"),
    ],
)
def test_what_no_run_writes_is_refused(folder, file, changes, message):
    changed(folder / file, changes)
    with pytest.raises(ResultsError) as refused:
        read_record(folder)
    assert message in str(refused.value)
    assert str(folder) in str(refused.value)


def test_a_file_cut_short_is_not_to_be_deleted(folder):
    (folder / "config.json").write_text('{"suite": ')
    with pytest.raises(ResultsError, match=r"config.json is truncated or damaged .* Put it back as it was, or move"):
        read_record(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ResultsError, match=r"holds metrics.json, but no config.json says which run that is"):
        read_record(folder)


def test_a_diverged_run_needs_its_names_alone(folder):
    (folder / "metrics.json").unlink()
    named = {key: METRICS[key] for key in ("label", "model_sha256", "trainable_params", "trainable_pct")}
    (folder / "failed.json").write_text(json.dumps(named | {"error": "nan"}))
    assert not read_record(folder).finished
    changed(folder / "failed.json", {"label": "gone"})
    with pytest.raises(ResultsError, match=r"failed.json was edited, or is of another version: label is missing"):
        read_record(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exact": [7.0, 0.0]}, "exact of problem 0 (row 1) is 7.0; allowed: a number from 0 to 1"),
        ({"exact": [1.0, None]}, "exact of problem 1 (row 2) is ''; allowed: a number from 0 to 1"),
        ({"loss_sum": [1.0, -2.0]}, "loss_sum of problem 1 (row 2) is -2.0; allowed: a number of nats, 0 or more"),
        ({"loss_sum": [1.0, float("inf")]}, "is inf; allowed: a number of nats, 0 or more"),
        ({"loss_sum": ["x", 2.0]}, "loss_sum of problem 0 (row 1) is 'x'"),
        ({"tokens": [0, 3]}, "tokens of problem 0 (row 1) is 0; allowed: a number, 1 or more"),
        ({"item": [0, None]}, "(row 2) is ''; allowed: a number, 0 or more"),
        ({"item": [1, 1]}, "holds problem 1 twice"),
        ({"exact": [1.0, 1.0]}, "gives exact=1 where metrics.json says 0.5"),
        ({"tokens": [2, 4]}, "gives loss_per_token=0.5 where metrics.json says 0.6"),
    ],
)
def test_outcomes_that_cannot_be_or_are_others_are_refused(tmp_path, changes, message):
    file = tmp_path / "word_problems.csv"
    ITEMS.assign(**changes).to_csv(file, index=False)
    with pytest.raises(ResultsError) as refused:
        read_outcomes(file, SCORES)
    assert message in str(refused.value)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("column", list(ITEMS.columns))
def test_a_column_that_is_missing_is_named(tmp_path, column):
    file = tmp_path / "word_problems.csv"
    ITEMS.drop(columns=column).to_csv(file, index=False)
    with pytest.raises(
        ResultsError, match=rf"lacks the column\(s\) {column}\. Put it back .* `diablo-theory evaluate "
    ):
        read_outcomes(file, SCORES)


def test_outcomes_cut_short_are_refused(tmp_path):
    file = tmp_path / "word_problems.csv"
    with pytest.raises(ResultsError, match=r"word_problems.csv cannot be read"):
        read_outcomes(file, SCORES)
    ITEMS[:1].to_csv(file, index=False)
    with pytest.raises(ResultsError, match=r"holds 1 problems where metrics.json says 2"):
        read_outcomes(file, SCORES)


def test_columns_that_were_not_scored_are_left_out(tmp_path):
    file = tmp_path / "word_problems.csv"
    ITEMS.assign(safe=1.0).to_csv(file, index=False)
    assert list(read_outcomes(file, SCORES)) == list(ITEMS)


def test_runs_that_have_ended_and_those_that_have_not(folder):
    root = folder.parent
    for name, file in (("begun", "config.json"), ("no-start", "error.txt"), (".partial-x", "metrics.json")):
        (root / name).mkdir()
        (root / name / file).write_text("{}")
    shutil.copytree(folder, root / "lost")
    (root / "lost" / "metrics.json").unlink()
    (root / "lost" / "failed.json").write_text("{}")
    assert [run.name for run in ended(root)] == ["diablo-seed=1", "lost"]
    assert [run.name for run in not_ended(root)] == ["begun", "no-start"]


LOG = pd.DataFrame(
    {"step": [1, 2], "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0, "grad_norm/A": 0.0, "seconds": 3}
)


def test_the_course_of_training_is_read_without_its_times(folder):
    LOG.to_csv(folder / "log.csv", index=False)
    pd.testing.assert_frame_equal(read_training(folder, 2), LOG.drop(columns="seconds"))


def test_what_never_trained_has_no_course(folder):
    assert read_training(folder, 0).empty
    assert read_training(folder, None).empty


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (None, r"log\.csv cannot be read"),
        (LOG.drop(columns="loss"), r"log\.csv has no whole column loss"),
        (LOG[:1], "does not hold the steps 1 to 2"),
        (pd.concat([LOG, LOG]), "does not hold the steps 1 to 2"),
    ],
)
def test_a_damaged_course_is_refused(folder, log, message):
    if log is not None:
        log.to_csv(folder / "log.csv", index=False)
    with pytest.raises(ResultsError, match=message):
        read_training(folder, 2)
