"""Runs of a sweep as jobs of a cluster, through submitit (extra ``cluster``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil

from diablo_theory.errors import ConfigError, ResultsError, SweepError
from diablo_theory.files import is_held, read_json, write_json
from diablo_theory.finetune.config import RunConfig
from diablo_theory.finetune.runs import execute
from diablo_theory.finetune.sweep import Outcome, Planned, guarded, was_finished

Cluster = Literal["slurm", "local"]

#: Below the sweep's folder: submitit's own files. In a run's folder: its last job.
JOBS, JOB = ".jobs", "job.json"
#: Slurm's states of jobs that will run or do. One that it does not know, or knows no more, is submitted again: of two
#: jobs for one run the second finds it held or finished.
UNDER_WAY = ("PENDING", "CONFIGURING", "READY", "REQUEUED", "RUNNING", "SUSPENDED", "PREEMPTED", "COMPLETING")
#: Any of them says how long a job may take; submitit's own defaults are minutes, fewer than most runs take.
TIME_LIMITS = ("timeout_min", "slurm_timeout_min", "slurm_time", "local_timeout_min")


def submit(runs: Sequence[Planned], out: Path, cluster: Cluster, options: Mapping[str, Any]) -> list[Outcome]:
    """Hand runs to a cluster, a job each, unless they are finished, at work, or wait in its queue already.

    A job that is killed or times out is submitted again by the same command, and goes on from its last checkpoint.

    Args:
        runs: From :func:`diablo_theory.finetune.sweep.planned`.
        out: Run ``name`` goes into ``out / name``, on a disk that the cluster shares.
        cluster: ``slurm``, or ``local`` for a process in the background of this machine, which takes one run.
        options: submitit's parameters, such as ``slurm_partition``, ``gpus_per_node``; ``timeout_min`` is needed.

    Raises:
        ConfigError: If submitit is not installed, or refuses an option; without ``timeout_min``; if ``local`` would
            have to start several runs at once.
    """
    executor = _executor(out / JOBS, cluster, options)
    known = [_known(run, out, cluster) for run in runs]
    left = sum(outcome.state == "submitted" for outcome in known)
    if cluster == "local" and left > 1:
        raise ConfigError(
            f"cluster 'local' would start all {left} runs at once on this machine: leave it out, and they are done "
            "one after another"
        )
    return [
        guarded(run, out / run.name, partial(_submit, run, out / run.name, cluster, executor))
        if outcome.state == "submitted"
        else outcome
        for run, outcome in zip(runs, known, strict=True)
    ]


def _executor(folder: Path, cluster: Cluster, options: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError:
        raise ConfigError("a cluster needs submitit: pip install 'diablo-theory[cluster]'") from None
    if cluster not in ("slurm", "local"):
        raise ConfigError(f"cluster must be slurm or local, got {cluster!r}")
    if not any(name in options for name in TIME_LIMITS):
        raise ConfigError(f"cluster {cluster!r} needs timeout_min=MINUTES: how long a job may take at most")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**options)
    except (ValueError, TypeError, NameError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"cluster {cluster!r} with {dict(options)}: {error}") from error
    return executor


def _known(run: Planned, out: Path, cluster: Cluster) -> Outcome:
    """What has become of a run, ``submitted`` meaning that it is to be."""
    try:
        return _asked(run, out, cluster)
    except ResultsError as error:  # not noted in the folder, which may be another run's
        return Outcome(run.name, "failed", str(error))


def _asked(run: Planned, out: Path, cluster: Cluster) -> Outcome:
    folder = out / run.name
    if was_finished(run, folder):
        return Outcome(run.name, "before")
    if is_held(folder):
        return Outcome(run.name, "running")
    if not (folder / JOB).is_file():
        return Outcome(run.name, "submitted")
    job = read_json(folder / JOB)
    if not _under_way(out / JOBS, cluster, job):
        return Outcome(run.name, "submitted")
    if job["run"] != run.config.identity:
        raise ResultsError(
            f"{folder} waits for job {job['id']} with another configuration: cancel that, or choose another folder"
        )
    return Outcome(run.name, "queued", f"job {job['id']}")


def _under_way(folder: Path, cluster: Cluster, job: Mapping[str, Any]) -> bool:
    if job["cluster"] != cluster:
        return False
    if cluster == "local":  # of processes that another Python has started submitit knows nothing
        with suppress(psutil.Error):
            return any("submitit" in part for part in psutil.Process(int(job["id"])).cmdline())
        return False
    import submitit

    state: str = submitit.SlurmJob(folder=folder, job_id=job["id"]).state
    return state.split(" ")[0].upper() in UNDER_WAY  # "CANCELLED by 1000" has more words


def _submit(run: Planned, folder: Path, cluster: Cluster, executor: Any) -> Outcome:
    try:
        job = executor.submit(run_one, run.name, run.config.model_dump(mode="json"), str(folder.absolute()))
    except RuntimeError as error:  # what submitit makes of all that sbatch may say
        raise ConfigError(f"cluster {cluster!r} refused the job: {error}") from error
    write_json(folder / JOB, {"cluster": cluster, "id": job.job_id, "run": run.config.identity})
    return Outcome(run.name, "submitted", f"job {job.job_id}")


def run_one(name: str, config: dict[str, Any], folder: str) -> None:
    """A job of :func:`submit`: one run, with progress as plain lines in the job's log.

    Raises:
        SweepError: If it fails; why is in its folder too.
    """
    from rich.console import Console

    from diablo_theory.progress import Board

    run = Planned(name, RunConfig.model_validate(config))

    def work() -> Outcome:
        execute(run.config, Path(folder), Board(Console()))
        return Outcome(name, "finished")

    outcome = guarded(run, Path(folder), work)
    if outcome.state == "failed":
        raise SweepError(outcome.note)
