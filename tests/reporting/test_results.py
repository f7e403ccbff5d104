import json
import subprocess
import sys

import pandas as pd
import pytest

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.results import COLUMNS, collect, tidy_rows, validate_rows


@pytest.fixture(scope="module")
def rows(full_results):
    return tidy_rows(collect(full_results))


def test_everything_is_collected(full_results):
    data = collect(full_results)
    assert list(data.runs["label"].unique()) == ["Untouched model", "Full fine-tuning", "DiaBlo N=64", "LoRA r=5"]
    assert len(data.runs) == 14
    assert len(data.logs) == 12
    assert len(data.items) == 14 * 60
    assert "<script>" in data.items["completion"][0]
    assert not data.unfinished


def test_a_manifest_alone_is_enough(make, tmp_path):
    make.manifest(tmp_path)
    data = collect(tmp_path)
    assert data.runs.empty
    assert tidy_rows(data).empty


def test_no_results_folder(tmp_path):
    with pytest.raises(ResultsError, match=r"holds no manifest.json.*diablo-theory reproduce"):
        collect(tmp_path)


def test_another_schema_version_is_refused(make, tmp_path):
    make.manifest(tmp_path, schema_version=1, package_version="0.9.0")
    with pytest.raises(ResultsError, match=r"schema version 1; this version .* reads 2\. .*diablo-theory 0\.9\.0"):
        collect(tmp_path)


@pytest.mark.parametrize("name", ["metrics.json", "config.json"])
def test_truncated_json(one_run, name):
    path = one_run / name
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ResultsError, match=rf"{name} is truncated or damaged.*Delete .*{name} and run"):
        collect(one_run.parents[1])


def test_json_of_the_wrong_kind(one_run):
    (one_run / "metrics.json").write_text("[1]")
    with pytest.raises(ResultsError, match="holds a list; a JSON object is needed"):
        collect(one_run.parents[1])


def test_missing_keys_are_named(one_run):
    metrics = json.loads((one_run / "metrics.json").read_text())
    del metrics["label"], metrics["seed"], metrics["trainable_pct"]
    (one_run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ResultsError, match="lack label, trainable_pct"):
        collect(one_run.parents[1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines[:-5], "holds 55 problems where metrics.json says 60"),
        (lambda lines: [], "cannot be read"),
        (lambda lines: [lines[0].replace("exact", "exakt"), *lines[1:]], r"lacks the column\(s\) exact"),
        (lambda lines: [*lines[:-1], lines[-1].replace(",1,1,", ",0,0,")], "gives exact=.* where metrics.json says"),
        (lambda lines: [lines[0].replace("tokens", "tokenz"), *lines[1:]], r"lacks the column\(s\) tokens"),
    ],
)
def test_truncated_items(one_run, damage, message):
    path = one_run / "predictions" / "word_problems.csv"
    frame = pd.read_csv(path)
    frame["prompt"] = "p"
    frame.to_csv(path, index=False)
    path.write_text("".join(damage(path.read_text().splitlines(keepends=True))))
    with pytest.raises(ResultsError, match=message):
        collect(one_run.parents[1])


def test_truncated_verdicts(results):
    path = results / "theory" / "verdicts.csv"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ResultsError, match=r"verdicts.csv, line 21: tolerance is '1e'; allowed: a number.* Delete"):
        collect(results)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("claim_margin", "x", r"verdicts.csv, line 4: claim_margin is 'x'; allowed: a number"),
        ("role", "clam", "verdicts.csv, line 4: role is 'clam'; allowed: claim, control"),
        ("check", "L22", "verdicts.csv, line 4: check is 'L22'; allowed: G1, "),
        ("passed", "yes", "verdicts.csv, line 4: passed is 'yes'; allowed: True or False"),
        ("instance", None, "verdicts.csv, line 4: instance is nan; allowed: text"),
    ],
)
def test_a_cell_of_verdicts_that_no_check_gives_is_told(results, column, value, message):
    path = results / "theory" / "verdicts.csv"
    frame = pd.read_csv(path).astype({column: object})
    frame.loc[2, column] = value
    frame.to_csv(path, index=False)
    with pytest.raises(ResultsError, match=message):
        collect(results)


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("theory/map.csv", "in_theorem", "no", "line 4: in_theorem is 'no'; allowed: True or False"),
        ("bench/step_times.csv", "seconds", 0, "line 4: seconds is 0.*; allowed: a number above 0"),
        ("bench/step_times.csv", "method", "LoRA r=6", "round 0, is not of the methods of memory.csv.*: LoRA r=5 is"),
        (
            "bench/step_times.csv",
            "round",
            99,
            "round 0, is not of the methods of memory.csv.*: LoRA r=5 is in one alone",
        ),
        ("bench/memory.csv", "method", "DiaBlo N=64", "lines 3 and 4, are both of method DiaBlo N=64"),
        ("learning_rates.csv", "exact", 1.5, "line 4: exact is 1.5.*; allowed: a number from 0 to 1"),
        ("learning_rates.csv", "method", "lorra", "line 4: method is 'lorra'; allowed: none, full, diablo"),
        ("learning_rates.csv", "chosen", "perhaps", "line 4: chosen is 'perhaps'; allowed: True or False"),
        ("learning_rates.csv", "n", "many", "line 4: n is 'many'; allowed: a number"),
        ("learning_rates.csv", "learning_rate", 1e-3, r"lines 2 and 4, are both of .* learning_rate 0\.001"),
    ],
)
def test_a_cell_that_no_command_writes_is_told(results, name, column, value, message):
    frame = pd.read_csv(results / name).astype({column: object})
    frame.loc[2, column] = value
    frame.to_csv(results / name, index=False)
    with pytest.raises(ResultsError, match=f"{name}, {message}"):
        collect(results)


MANIFEST = [
    *(("scale", value) for value in (None, "tiny", 3)),
    *(("profile", value) for value in (None, [], 3, "qick")),
    *(("settings", value) for value in (None, "x", {"overrides": None}, {"overrides": "steps=3"})),
    *(("model", value) for value in (None, "small", {"name": None}, {"sha256": 3})),
    *(("stages", value) for value in (None, [], "x", {"theory": "long"}, {"theory": -1.0})),
    *(("seconds", value) for value in ("x", [], True, -1)),
    *(("memory_gib", value) for value in ("x", {})),
    *(("peak_rss_gib", value) for value in ("x", {})),
    *(("threads", value) for value in ("two", 2.5, [])),
    *(("commits", value) for value in (None, 3, "abc", [3])),
    *(("dirty", value) for value in ("no", 1)),
    *((name, 3) for name in ("commit", "torch", "cpu", "device", "started", "finished", "package_version")),
]


@pytest.mark.parametrize(("key", "value"), MANIFEST)
def test_a_manifest_that_no_command_writes_is_told_by_its_key(make, tmp_path, key, value):
    make.manifest(tmp_path, **{key: value})
    with pytest.raises(ResultsError, match=rf"manifest.json was edited, or is of another version: {key}.* is not all"):
        collect(tmp_path)


RUN = [
    *(("scores", value) for value in ([], "x", {"word_problems": None}, {"word_problems": {"n": "many"}})),
    ("scores", {"word_problems": {"n": 60, "loss_per_token": 1.0, "means": None}}),
    ("scores", {"word_problems": {"n": 60, "loss_per_token": 1.0, "means": {"exact": 3}}}),
    ("scores", {"word_problems": {"n": 60, "loss_per_token": "low"}}),
    *(("label", value) for value in (3, ["LoRA"])),
    ("method", "lorra"),
    *(("seed", value) for value in ("0", 0.5, -1, [0])),
    *(("trainable_params", value) for value in ("many", 1.5, -1)),
    *(("trainable_pct", value) for value in ("x", 101)),
    *(("steps", value) for value in ("x", [], 1.5)),
    *(("train_seconds", value) for value in ("x", -1)),
    *(("final_train_loss", value) for value in ("x", {})),
]


@pytest.mark.parametrize(("key", "value"), RUN)
def test_metrics_that_no_run_writes_are_told_by_their_key(one_run, key, value):
    path = one_run / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ResultsError, match=rf"metrics.json was edited, or is of another version: {key}.* is not all"):
        collect(one_run.parents[1])


@pytest.mark.parametrize(
    ("key", "value"), [("model", 3), ("scale", "tiny"), ("num_blocks", "x"), ("learning_rate", -1)]
)
def test_a_configuration_that_no_run_has_is_told_by_its_key(one_run, key, value):
    path = one_run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(
        ResultsError, match=rf"config.json was edited, or is of another version: {key}=.* is not allow"
    ):
        collect(one_run.parents[1])


def test_verdicts_of_another_schema_version_are_refused(results):
    path = results / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 1}))
    with pytest.raises(ResultsError, match="schema version 1; this version"):
        _ = Evidence(results, results).verdicts


def test_unfinished_runs_are_listed_and_ignored(make, one_run):
    other = make.run(one_run.parents[1], "LoRA r=5")
    (other / "metrics.json").unlink()
    (other / "predictions" / "half.csv").write_text("half")
    data = collect(one_run.parents[1])
    assert data.unfinished == (other.name,)
    assert list(data.runs["run_id"]) == [one_run.name]


def test_two_runs_that_no_table_could_tell_apart(make, one_run):
    one_run.rename(one_run.parent / "first")
    make.run(one_run.parents[1], "DiaBlo N=64")
    with pytest.raises(ResultsError, match="are all DiaBlo N=64 on word_problems with seed 0"):
        collect(one_run.parents[1])


def test_two_models_are_not_compared(make, one_run):
    other = make.run(one_run.parents[1], "LoRA r=5")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model": "another"}))
    with pytest.raises(ResultsError, match="used different models"):
        collect(one_run.parents[1])


def test_rows_fit_the_schema(rows):
    assert tuple(rows.columns) == COLUMNS
    assert set(rows["scale"]) == {"small"}
    assert set(rows["suite"]) == {"theory", "finetune", "bench"}
    exact = rows[(rows["metric"] == "exact_match") & (rows["method"] == "diablo")]
    assert len(exact) == 4
    assert (exact["ci_low"] < exact["value"]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "guessed"}, r"Row 0: source is 'guessed'; allowed: one of published, reproduced"),
        ({"scale": "tiny"}, r"Row 0: scale is 'tiny'; allowed: one of full, small"),
        ({"trainable_pct": 101.0}, r"Row 0: trainable_pct is .*101.*; allowed: a percentage from 0 to 100"),
        ({"metric": "exact_match", "value": -1.0}, r"Row 0: value is .*-1.*; allowed: a percentage"),
        ({"value": "many"}, r"Row 0: value is 'many'; allowed: a number"),
        ({"value": float("nan")}, r"Row 0: value is .*nan.*; allowed: a number"),
        ({"metric": ""}, r"Row 0: metric is ''"),
        ({"schema_version": 7}, r"Row 0: schema_version is .*7.*; allowed: 3"),
        ({"certainty": "sure"}, r"Row 0: certainty is 'sure'; allowed: one of computed, printed, quoted, measured"),
        ({"certainty": "printed"}, r"Row 0: certainty is 'printed'; allowed: computed, for a reproduced number"),
        ({"source": "published"}, r"Row 0: certainty is 'computed'; allowed: printed, quoted, measured for a pub"),
        ({"source": "published", "certainty": "printed"}, r"Row 0: origin is ''; allowed: where a published number"),
        ({"n": 0}, r"Row 0: n is 0; allowed: 1 or more"),
        ({"stderr": -1.0}, r"Row 0: stderr is -1\.0; allowed: nought or more"),
        ({"methd": "x"}, r"Unknown column 'methd' .* Did you mean 'method'\?"),
    ],
)
def test_bad_rows_are_named(rows, change, message):
    with pytest.raises(ResultsError, match=message):
        validate_rows(rows.assign(**change))


def test_rows_of_two_schema_versions_are_not_mixed(rows):
    mixed = pd.concat([rows, rows.assign(schema_version=2)], ignore_index=True)
    with pytest.raises(ResultsError, match=rf"Row {len(rows)}: schema_version is 2; allowed: 3"):
        validate_rows(mixed)


def test_missing_and_repeated(rows):
    with pytest.raises(ResultsError, match=r"lack the column\(s\) seed, note"):
        validate_rows(rows.drop(columns=["seed", "note"]))
    with pytest.raises(ResultsError, match=r"repeats an earlier one \(source='reproduced'"):
        validate_rows(pd.concat([rows, rows.tail(1)], ignore_index=True))


def test_reporting_loads_no_torch():
    code = (
        "import sys, diablo_theory.reporting.report, diablo_theory.reporting.plots\n"
        "ours = {f'diablo_theory.{name}' for name in ('theory', 'finetune', 'tuner')}\n"
        "sys.exit(', '.join(({'torch', 'transformers', 'peft'} | ours) & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
