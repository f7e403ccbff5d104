import pytest

from diablo_theory.errors import ConfigError, NonFiniteError
from diablo_theory.files import experiments_folder
from diablo_theory.finetune import runs, sweep
from diablo_theory.finetune.folder import run_folders, state
from diablo_theory.records import CONFIG, ERROR, METRICS

TINY = {
    "num_blocks": 6,
    "steps": 2,
    "batch_size": 2,
    "warmup_steps": 0,
    "eval_items": 2,
    "device": "cpu",
    "learning_rate": 1e-3,
}


@pytest.fixture
def spec(tmp_path, tiny_model):
    folder = tmp_path / "words"
    folder.mkdir()
    for name in ("lora", "diablo"):
        (folder / f"{name}.yaml").write_text(f"method: {name}\nmodel: {tiny_model}\n")
    files = (folder / "lora.yaml", folder / "diablo.yaml")
    return sweep.SweepFile(parts=(sweep.Part(files=files, set=TINY, vary={"seed": (0, 1)}),))


def test_a_sweep_plans_every_combination_and_names_what_varies(spec):
    planned = sweep.planned(spec, {"steps": 1})
    assert [run.name for run in planned] == [
        "words/lora-seed=0",
        "words/lora-seed=1",
        "words/diablo-seed=0",
        "words/diablo-seed=1",
    ]
    assert [(run.config.method, run.config.seed, run.config.steps) for run in planned][-1] == ("diablo", 1, 1)


def test_runs_are_done_once_and_a_failing_one_stops_nothing(spec, tmp_path, board, monkeypatch):
    execute = runs.execute

    def sometimes(config, folder, board):
        if config.method == "lora" and config.seed == 0:
            raise NonFiniteError("it diverged")
        if config.method == "lora":
            raise RuntimeError("out of memory")
        return execute(config, folder, board)

    planned, out = sweep.planned(spec), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "execute", sometimes)
        outcomes = sweep.run_all(planned, out, board)
    assert [outcome.state for outcome in outcomes] == ["failed", "failed", "finished", "finished"]
    assert outcomes[0].note == "it diverged"
    assert "RuntimeError: out of memory" in (out / planned[1].name / ERROR).read_text()
    assert [state(out / run.name)["note"].splitlines()[0] for run in planned[:2]] == [
        "it diverged",
        "RuntimeError: out of memory",
    ]
    assert [state(folder)["state"] for folder in run_folders(out)] == ["finished"] * 2 + ["failed"] * 2
    assert [outcome.state for outcome in sweep.run_all(planned, out, board)] == [
        "finished",
        "finished",
        "before",
        "before",
    ]
    assert [state(folder)["state"] for folder in run_folders(out)] == ["finished"] * 4
    assert not list(out.rglob(ERROR))


def test_a_folder_with_other_runs_is_told(spec, tmp_path, board):
    sweep.run_all(sweep.planned(spec)[:1], tmp_path / "out", board)
    (outcome,) = sweep.run_all(sweep.planned(spec, {"steps": 3})[:1], tmp_path / "out", board)
    assert outcome.state == "failed"
    assert "belongs to a run with steps=2, not 3" in outcome.note
    assert not list((tmp_path / "out").rglob(ERROR))
    (tmp_path / "out" / sweep.planned(spec)[0].name / METRICS).unlink()  # nor where it is not finished
    (outcome,) = sweep.run_all(sweep.planned(spec, {"steps": 3})[:1], tmp_path / "out", board)
    assert "belongs to a run with steps=2, not 3" in outcome.note
    assert not list((tmp_path / "out").rglob(ERROR))


def test_one_damaged_record_does_not_end_a_sweep(spec, tmp_path, board):
    planned, out = sweep.planned(spec)[1:3], tmp_path / "out"
    sweep.run_all(planned, out, board)
    damaged = out / planned[0].name
    (damaged / METRICS).write_text("{")
    outcomes = sweep.run_all(planned, out, board)
    assert [outcome.state for outcome in outcomes] == ["failed", "before"]
    assert "metrics.json is truncated or damaged" in outcomes[0].note
    assert "metrics.json is truncated or damaged" in state(damaged)["note"]
    (damaged / METRICS).unlink()
    assert [outcome.state for outcome in sweep.run_all(planned, out, board)] == ["finished", "before"]
    assert state(damaged)["state"] == "finished"
    assert not (damaged / ERROR).exists()


def test_a_run_that_cannot_start_is_listed_with_its_reason(spec, tmp_path, board):
    (run,) = sweep.planned(spec, {"num_blocks": 100})[2:3]
    (outcome,) = sweep.run_all([run], tmp_path, board)
    assert outcome.state == "failed"
    assert run_folders(tmp_path) == [tmp_path / run.name]
    found = state(tmp_path / run.name)
    assert (found["state"], found["note"]) == ("failed", outcome.note)
    assert "num_blocks" in found["note"]
    assert not (tmp_path / run.name / CONFIG).exists()


def test_who_looks_writes_nothing(tmp_path):
    (tmp_path / CONFIG).write_text("{}")
    assert state(tmp_path)["state"] == "stopped"
    assert [file.name for file in tmp_path.iterdir()] == [CONFIG]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_ctrl_c_and_a_full_disk_end_a_sweep(spec, tmp_path, board, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(sweep, "execute", fail)
    with pytest.raises(error if isinstance(error, type) else OSError):
        sweep.run_all(sweep.planned(spec), tmp_path, board)


def test_mistakes_are_told_before_the_first_run(spec, tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'step'"):
        sweep.planned(spec, {"step": 3})
    files = spec.parts[0].files
    twice = sweep.SweepFile(parts=(sweep.Part(files=files, set=TINY), sweep.Part(files=files, set={"steps": 9})))
    with pytest.raises(ConfigError, match="both called words/lora"):
        sweep.planned(twice)
    with pytest.raises(
        ConfigError, match=r"no such file: wordproblems/lora.yaml. Did you mean 'word_problems/lora.yaml'"
    ):
        sweep.planned(sweep.SweepFile(parts=(sweep.Part(files=("wordproblems/lora.yaml",)),)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parts:\n  - set: {seed: 1}\n", r"parts\.0\.files is missing"),
        ("parts:\n  - file: [a.yaml]\n", r"unknown key 'parts\.0\.file'. Did you mean 'parts\.0\.files'"),
        (
            "parts:\n  - {files: [a.yaml], very: {seed: [0]}}\n",
            "unknown key 'parts.0.very'. Did you mean 'parts.0.vary'",
        ),
        ("scal: small\nparts:\n  - files: [a.yaml]\n", "unknown key 'scal'. Did you mean 'scale'"),
    ],
)
def test_mistakes_in_a_sweep_file_name_the_nearest_key(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"bad\.yaml: {message}"):
        sweep.read_sweep(tmp_path / "bad.yaml")


def test_a_part_that_varies_over_nothing_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("parts:\n  - files: [a.yaml]\n    vary: {seed: []}\n")
    with pytest.raises(
        ConfigError, match=r"parts\.0\.vary\.seed=\[\] is not allowed: List should have at least 1 item"
    ):
        sweep.read_sweep(tmp_path / "bad.yaml")


@pytest.mark.parametrize("value", ["../../elsewhere", "m" * 300])
def test_a_run_s_folder_lies_in_the_sweep_s(spec, value):
    part = sweep.Part(files=spec.parts[0].files, set=TINY, vary={"data_root": (value,)})
    with pytest.raises(ConfigError, match="cannot be the name of a run's folder"):
        sweep.planned(sweep.SweepFile(parts=(part,)))


def test_a_mistake_says_in_which_run_it_is(spec):
    part = sweep.Part(files=spec.parts[0].files, set=TINY, vary={"seed": (0, -1)})
    with pytest.raises(ConfigError, match=r"^words/\w+-seed=-1: seed=-1 is not allowed"):
        sweep.planned(sweep.SweepFile(parts=(part,)))


@pytest.mark.parametrize(
    ("varied", "fixed"),
    [("seed", "seed"), ("quantise", "quantise.bits"), ("quantise.bits", "quantise")],
)
def test_what_is_varied_is_not_set(spec, varied, fixed):
    values = {"quantise": {"method": "rtn", "bits": 4}, "quantise.bits": 4, "seed": 7}
    alone = sweep.Part(files=spec.parts[0].files, vary={varied: (values[varied],)})
    with pytest.raises(ConfigError, match=rf"varies {varied}, and --set gives {fixed} one value: leave out one"):
        sweep.planned(sweep.SweepFile(parts=(alone,)), {fixed: values[fixed]})
    own = alone.model_copy(update={"set": {fixed: values[fixed]}})
    with pytest.raises(ConfigError, match=rf"varies {varied}, and its own set gives {fixed} one value"):
        sweep.planned(sweep.SweepFile(parts=(own,)))


def test_two_parts_of_a_key_are_two_keys(spec):
    files = spec.parts[0].files[:1]
    (file,) = files
    file.write_text(file.read_text() + "quantise: {method: rtn, bits: 4}\n")
    part = sweep.Part(files=files, set=TINY, vary={"quantise.bits": (3, 4)})
    planned = sweep.planned(sweep.SweepFile(parts=(part,)), {"quantise.group_size": 12})
    assert [(run.config.quantise.bits, run.config.quantise.group_size) for run in planned] == [(3, 12), (4, 12)]


def test_every_sweep_file_plans():
    files = [file for file in experiments_folder().rglob("*.yaml") if file.parent.name == "sweeps"]
    for file in files:
        assert sweep.planned(sweep.read_sweep(file))
