import json
import sys
import time

import pytest

from diablo_theory.errors import ConfigError, SweepError
from diablo_theory.files import locked, write_json
from diablo_theory.finetune import cluster, sweep
from diablo_theory.finetune.folder import state
from diablo_theory.records import ERROR

LIMIT = {"timeout_min": 5}


@pytest.fixture
def planned(tmp_path, tiny_model):
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "lora.yaml").write_text(f"method: lora\nmodel: {tiny_model}\n")
    tiny = {"num_blocks": 6, "steps": 2, "batch_size": 2, "warmup_steps": 0, "eval_items": 2, "device": "cpu"}
    part = sweep.Part(files=(folder / "lora.yaml",), set=tiny, vary={"seed": (0, 1)})

    def plan(**overrides):
        return sweep.planned(sweep.SweepFile(parts=(part,)), overrides)

    return plan


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm as far as submitit calls it: jobs get a number and never run; sacct tells what a file says."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    commands = {
        "srun": "",
        "sbatch": f"if [ -f {folder}/refuse ]; then echo 'invalid partition' >&2; exit 1; fi\n"
        f"echo . >> {folder}/count; echo Submitted batch job $(wc -l < {folder}/count)",
        "sacct": f"cat {folder}/states",
    }
    for name, script in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def jobs(slurm, states):
    """What sacct says from now on; submitit asks at most every few seconds, unless told to forget."""
    import submitit

    lines = [f"{job}|{found}|" for job, found in states.items()]
    (slurm / "states").write_text("\n".join(["JobID|State|NodeList", *lines]))
    submitit.SlurmJob.watcher.clear()


def outcomes(runs, out, name="slurm"):
    return [(outcome.state, outcome.note) for outcome in cluster.submit(runs, out, name, LIMIT)]


def test_a_job_that_waits_is_not_submitted_again_and_one_that_ended_is(planned, slurm, tmp_path):
    runs, out = planned(), tmp_path / "out"
    assert outcomes(runs, out) == [("submitted", "job 1"), ("submitted", "job 2")]
    jobs(slurm, {1: "PENDING", 2: "CANCELLED by 0"})
    assert outcomes(runs, out) == [("queued", "job 1"), ("submitted", "job 3")]
    jobs(slurm, {1: "TIMEOUT", 3: "RUNNING"})
    assert outcomes(runs, out) == [("submitted", "job 4"), ("queued", "job 3")]
    jobs(slurm, {})  # long forgotten
    assert outcomes(runs, out) == [("submitted", "job 5"), ("submitted", "job 6")]


def test_a_job_that_waits_with_another_configuration_is_told(planned, slurm, tmp_path):
    outcomes(planned(), tmp_path)
    jobs(slurm, {1: "PENDING", 2: "FAILED"})
    first, second = outcomes(planned(steps=3), tmp_path)
    assert first[0] == "failed"
    assert "waits for job 1 with another configuration: cancel that, or choose" in first[1]
    assert not list(tmp_path.rglob(ERROR))
    assert second == ("submitted", "job 3")


def test_what_is_finished_or_at_work_or_belongs_to_others_is_not_submitted(planned, slurm, tmp_path, board):
    runs, out = planned(), tmp_path / "out"
    sweep.run_all(runs[:1], out, board)
    with locked(out / runs[1].name):
        assert outcomes(runs, out) == [("before", ""), ("running", "")]
    other, mine = outcomes(planned(steps=3), out)
    assert other[0] == "failed"
    assert "belongs to a run with steps=2, not 3" in other[1]
    assert mine == ("submitted", "job 1")


def test_a_job_that_the_cluster_refuses_is_a_failed_run(planned, slurm, tmp_path):
    (slurm / "refuse").touch()
    runs = planned()
    found = outcomes(runs, tmp_path)
    assert [outcome[0] for outcome in found] == ["failed"] * 2
    assert "cluster 'slurm' refused the job: " in found[0][1]
    assert "invalid partition" in found[0][1]
    assert state(tmp_path / runs[0].name)["note"] == found[0][1]


def test_a_run_in_the_background_is_done(planned, tmp_path):
    run, out = planned()[:1], tmp_path / "out"
    assert outcomes(run, out, "local")[0][0] == "submitted"
    assert outcomes(run, out, "local")[0][0] in ("queued", "running")
    end = time.monotonic() + 300
    while state(out / run[0].name)["state"] != "finished" and time.monotonic() < end:
        time.sleep(0.5)
    assert outcomes(run, out, "local") == [("before", "")]


def test_a_job_that_fails_says_why_in_the_runs_folder_and_fails(planned, tmp_path):
    (run, _) = planned(num_blocks=100)
    with pytest.raises(SweepError, match="num_blocks"):
        cluster.run_one(run.name, run.config.model_dump(mode="json"), str(tmp_path))
    assert "num_blocks" in state(tmp_path)["note"]


def test_several_runs_at_once_on_this_machine_are_refused(planned, tmp_path):
    with pytest.raises(ConfigError, match="'local' would start all 2 runs at once"):
        cluster.submit(planned(), tmp_path, "local", LIMIT)
    assert not list(tmp_path.rglob(cluster.JOB))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("local", {}, r"cluster 'local' needs timeout_min=MINUTES"),
        ("slurm", {"slurm_partition": "gpu"}, r"cluster 'slurm' needs timeout_min=MINUTES"),
        ("local", LIMIT | {"gpu_count": 3}, r"cluster 'local' with .*'gpu_count': 3"),
        ("local", {"timeout_min": "long"}, r"cluster 'local' with .*expected type <class 'int'>"),
        ("pbs", LIMIT, "cluster must be slurm or local, got 'pbs'"),
    ],
)
def test_options_that_cannot_be(planned, tmp_path, name, options, message):
    with pytest.raises(ConfigError, match=message):
        cluster.submit(planned(), tmp_path, name, options)


def test_a_job_of_another_cluster_is_none_of_this_one(planned, tmp_path, slurm):
    runs = planned()
    write_json(tmp_path / runs[0].name / cluster.JOB, {"cluster": "local", "id": "1", "run": runs[0].config.identity})
    assert outcomes(runs, tmp_path)[0] == ("submitted", "job 1")
    assert json.loads((tmp_path / runs[0].name / cluster.JOB).read_text())["cluster"] == "slurm"


def test_without_submitit_the_message_says_what_to_install(planned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"pip install 'diablo-theory\[cluster\]'"):
        cluster.submit(planned(), tmp_path, "slurm", LIMIT)
