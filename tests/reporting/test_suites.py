import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from diablo_theory.errors import NonFiniteError, ResultsError
from diablo_theory.finetune import runs, train
from diablo_theory.finetune.config import resolve
from diablo_theory.progress import Board
from diablo_theory.reporting.comparisons import differences, experiments, scores
from diablo_theory.reporting.suite_tables import build_sections, readable_section
from diablo_theory.reporting.suites import (
    CONFIGS,
    OUTCOMES,
    ROWS,
    TRAINING,
    Suites,
    collect_suites,
    read_suites,
    save_suites,
)

TINY = {
    "suite": "word_problems",
    "num_blocks": 6,
    "steps": 3,
    "batch_size": 2,
    "warmup_steps": 0,
    "eval_items": 8,
    "device": "cpu",
    "learning_rate": 1e-2,
}
DONE = [("diablo", 0, 1e-2), ("diablo", 1, 1e-2), ("lora", 0, 3e-3), ("lora", 1, 3e-3), ("none", 0, 1e-2)]


@pytest.fixture(scope="module")
def done(tiny_model, tmp_path_factory):
    """A folder of finished runs: two methods with two seeds, the untouched model, and one run of other blocks."""
    root = tmp_path_factory.mktemp("runs")
    for method, seed, rate in DONE:
        config = resolve(TINY, {"model": str(tiny_model), "method": method, "seed": seed, "learning_rate": rate})
        runs.execute(config, root / "word_problems" / f"{method}-seed={seed}", Board(Console(quiet=True)))
    other = resolve(TINY, {"model": str(tiny_model), "num_blocks": 3, "suite": "blocks"})
    runs.execute(other, root / "blocks" / "diablo-num_blocks=3", Board(Console(quiet=True)))
    return root


def test_everything_is_collected_and_comes_back_as_it_was(done, tmp_path):
    suites = collect_suites(done)
    assert len(suites.configs) == 6
    assert len(suites.outcomes) == 6 * 8
    assert len(suites.training) == 5 * 3
    assert suites.training.loc[suites.training["run_id"].str.contains("lora"), "grad_norm/B"].gt(0).all()
    assert set(suites.rows["metric"]) == {"exact_match", "lenient_match", "loss_per_token", "train_seconds"}
    files = save_suites(suites, tmp_path)
    before = [file.read_bytes() for file in files]
    again = read_suites(tmp_path)
    pd.testing.assert_frame_equal(scores(again), scores(suites))
    save_suites(suites, tmp_path)
    assert before == [file.read_bytes() for file in files]


def test_a_run_that_diverged_is_collected_too(tiny_model, tmp_path, monkeypatch):
    config = resolve(TINY, {"model": str(tiny_model), "method": "none"})
    runs.execute(config, tmp_path / "word_problems" / "none", Board(Console(quiet=True)))
    loss = train.AdapterTrainer.compute_loss
    monkeypatch.setattr(train.AdapterTrainer, "compute_loss", lambda self, *a, **k: loss(self, *a, **k) * float("nan"))
    with pytest.raises(NonFiniteError):
        runs.execute(
            resolve(TINY, {"model": str(tiny_model)}),
            tmp_path / "word_problems" / "diablo",
            Board(Console(quiet=True)),
        )
    suites = collect_suites(tmp_path)
    assert dict(suites.configs[["method", "state"]].to_numpy()) == {"none": "finished", "diablo": "diverged"}
    save_suites(suites, tmp_path / "kept")
    for kept in (suites, read_suites(tmp_path / "kept")):
        row = readable_section(build_sections(kept)["methods"]).set_index("Method").loc["DiaBlo N=6"]
        assert (row["Held-out loss, nats/token"], row["Seeds"]) == ("—", "0 of 1, all diverged")
        assert int(row["Trainable"].replace(",", "")) > 0


def test_no_text_of_a_problem_is_kept(done, tmp_path):
    suites = collect_suites(done)
    save_suites(suites, tmp_path)
    prompt = pd.read_csv(done / "word_problems" / "lora-seed=0" / "predictions" / "word_problems.csv")["prompt"][0]
    whole = "".join(frame.to_csv() for frame in (suites.rows, suites.configs, suites.outcomes))
    assert prompt.split("\n")[0][10:] not in whole


def test_seeds_are_one_experiment_and_methods_are_comparable(done):
    named = experiments(collect_suites(done)).set_index("run_id")
    assert (
        named.loc["word_problems/diablo-seed=0", "experiment"]
        == named.loc["word_problems/diablo-seed=1", "experiment"]
    )
    assert named["experiment"].nunique() == 4
    assert named.loc["word_problems/diablo-seed=0", "alike"] == named.loc["word_problems/lora-seed=1", "alike"]
    assert set(named["alike"]) == {0}


def test_what_differs_in_more_than_the_method_is_not_comparable(done):
    suites = collect_suites(done)
    longer = suites.configs["run_id"].str.contains("lora")
    suites.configs.loc[longer, "steps"] = 4
    named = experiments(suites).set_index("run_id")
    assert named.loc["word_problems/diablo-seed=0", "alike"] != named.loc["word_problems/lora-seed=1", "alike"]
    assert set(differences(suites)["experiment"]).isdisjoint(named.loc["word_problems/lora-seed=1", ["experiment"]])


def test_scores_are_means_over_seeds_and_differences_are_paired(done):
    suites = collect_suites(done)
    found = scores(suites).set_index(["method", "num_blocks", "metric"])
    one = suites.rows[(suites.rows["metric"] == "loss_per_token") & suites.rows["run_id"].str.contains("lora")]
    assert found.loc[("lora", 6, "loss_per_token"), "value"] == pytest.approx(one["value"].mean(), rel=1e-9)
    assert found.loc[("lora", 6, "loss_per_token"), "seeds"] == 2
    pairs = differences(suites).merge(scores(suites)[["experiment", "method", "num_blocks"]].drop_duplicates())
    assert set(zip(pairs["method"], pairs["num_blocks"], strict=True)) == {("lora", 6), ("none", 6), ("diablo", 3)}
    gap = pairs[(pairs["metric"] == "loss_per_token") & (pairs["method"] == "lora")].iloc[0]
    mean = {m: found.loc[(m, 6, "loss_per_token"), "value"] for m in ("diablo", "lora")}
    assert gap["value"] == pytest.approx(mean["lora"] - mean["diablo"], rel=1e-6)
    assert gap["low"] < gap["value"] < gap["high"]


def test_of_several_rates_the_task_s_own_suite_has_the_reference(done):
    suites = collect_suites(done)
    suites.configs["suite"] = "learning_rate"  # two experiments with DiaBlo, none in a suite of the task's name
    assert differences(suites).empty


def test_what_is_missing_or_damaged_is_told(done, tmp_path):
    with pytest.raises(ResultsError, match="holds no finished runs"):
        collect_suites(tmp_path)
    with pytest.raises(ResultsError, match="nowhere is no folder"):
        collect_suites(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match=r"rows.csv cannot be read .*diablo-theory collect"):
        read_suites(tmp_path)
    save_suites(collect_suites(done), tmp_path)
    (tmp_path / "outcomes.csv.gz").write_bytes((tmp_path / "outcomes.csv.gz").read_bytes()[:100])
    with pytest.raises(ResultsError, match=r"outcomes.csv.gz cannot be read"):
        read_suites(tmp_path)


def test_files_of_two_collections_are_refused(done, tmp_path):
    suites = collect_suites(done)
    files = save_suites(suites, tmp_path)
    suites.rows[suites.rows["run_id"] != "word_problems/none-seed=0"].to_csv(files[0], index=False)
    with pytest.raises(
        ResultsError,
        match=r"rows.csv, configs.csv, outcomes.csv.gz and training.csv.gz in .* are not of the same runs",
    ):
        read_suites(tmp_path)
    suites.configs.drop(columns="state").to_csv(files[1], index=False)
    with pytest.raises(ResultsError, match=r"configs.csv lacks the column\(s\) state; `diablo-theory collect`"):
        read_suites(tmp_path)


def test_digests_of_digits_alone_stay_texts(done, tmp_path):
    suites = collect_suites(done)
    suites.outcomes["answer"] = "012345678901"
    save_suites(suites, tmp_path)
    assert set(read_suites(tmp_path).outcomes["answer"]) == {"012345678901"}


def test_the_command_tells_of_runs_that_have_not_ended(done, shell, tmp_path):
    root = tmp_path / "some"
    shutil.copytree(done, root)
    (root / "word_problems" / "lora-seed=1" / "metrics.json").unlink()
    status, out, _ = shell("collect", root, "--out", tmp_path / "kept")
    assert status == 0
    assert out.split("left out, since they have not ended")[1].splitlines()[0].endswith(": word_problems/lora-seed=1")


def test_a_narrow_terminal_cuts_no_number_off(done, shell, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = shell("collect", done, "--out", tmp_path / "kept")
    table = readable_section(build_sections(read_suites(tmp_path / "kept"))["methods"])
    assert set(table["Held-out loss, nats/token"]) <= {cell.strip() for cell in out.split("|")}


def test_the_command_writes_and_tells(done, shell, tmp_path):
    status, out, _ = shell("collect", done, "--out", tmp_path / "kept")
    assert status == 0
    assert "wrote" in out
    assert "Methods at equal" in out
    assert (tmp_path / "kept" / "rows.csv").is_file()


def damaged(name, column, value):
    """A change of one cell of a collection's file."""

    def change(suites):
        frame = suites.frames()[name].astype({column: object})
        frame.loc[frame.index[1], column] = value
        return frame

    return name, change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged(CONFIGS, "scale", "huge"), "scale is 'huge'; allowed: full, small"),
        (
            damaged(CONFIGS, "learning_rate", "fast"),
            r"configs.csv, line 3: learning_rate is 'fast'; allowed: a number",
        ),
        (damaged(CONFIGS, "seed", None), r"line 3: seed is nan; allowed: a number"),
        (damaged(CONFIGS, "model", None), r"line 3: model is nan; allowed: text"),
        (damaged(CONFIGS, "method", "lorra"), "line 3: method is 'lorra'; allowed: none, full, diablo"),
        (damaged(CONFIGS, "device", None), "line 3: device is nan; allowed: text"),
        (damaged(CONFIGS, "dirty", "no"), "line 3: dirty is 'no'; allowed: True, False or nothing"),
        (damaged(CONFIGS, "data", "{"), r"data is '\{'; allowed: digests by task, as JSON"),
        (damaged(CONFIGS, "evaluate_on", "3"), "evaluate_on is .*; allowed: a list of tasks, as JSON"),
        (damaged(CONFIGS, "quantise", "{}"), "quantise is '{}'; allowed: method and bits, as JSON"),
        (damaged(CONFIGS, "run_id", "blocks/diablo-num_blocks=3"), "configs.csv, lines 2 and 3, are both of run_id"),
        (damaged(ROWS, "schema_version", 2), "rows.csv: Row 1: schema_version is 2; allowed: 3"),
        (damaged(ROWS, "n", -8), "rows.csv: Row 1: n is -8.*; allowed: 1 or more"),
        (damaged(OUTCOMES, "task", "word_problem"), "line 3: task is 'word_problem'; allowed: word_problems"),
        (damaged(OUTCOMES, "item", 0), "outcomes.csv.gz, lines 2 and 3, are both of run_id .*, item 0"),
        (damaged(OUTCOMES, "exact", 7), "exact is not a share from 0 to 1"),
        (damaged(OUTCOMES, "loss_sum", -100), "a loss_sum is below 0"),
        (damaged(OUTCOMES, "tokens", 0), "tokens is 0.*; allowed: a number above 0"),
        (damaged(TRAINING, "step", 1), "training.csv.gz, lines 2 and 3, are both of run_id .*, step 1"),
    ],
)
def test_a_cell_that_no_run_gives_is_told(done, tmp_path, damage, message):
    suites = collect_suites(done)
    name, change = damage
    frames = suites.frames() | {name: change(suites)}
    save_suites(Suites(*frames.values()), tmp_path)
    with pytest.raises(ResultsError, match=message):
        read_suites(tmp_path)


def test_none_of_a_collection_is_replaced_before_all_of_it_is_written(done, tmp_path, monkeypatch):
    suites = collect_suites(done)
    before = [file.read_bytes() for file in save_suites(suites, tmp_path)]
    write, written = Path.write_bytes, []

    def full(path, content):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_suites(replace(suites, rows=suites.rows[:1]), tmp_path)
    assert [(tmp_path / name).read_bytes() for name in suites.frames()] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(suites.frames())
