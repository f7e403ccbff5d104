"""A run from its configuration to its scores, or what is left of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import transformers
from accelerate import PartialState
from peft import PeftModel

from diablo_theory import methods
from diablo_theory.errors import NonFiniteError, ResultsError
from diablo_theory.files import atomic_folder, read_json, write_json, write_tensors, write_with
from diablo_theory.finetune.config import RunConfig, moved, validated
from diablo_theory.finetune.data import Ordered
from diablo_theory.finetune.folder import (
    ADAPTER,
    CHECKPOINTS,
    ENVIRONMENT,
    INPUTS,
    check_inputs,
    check_owner,
    finished,
    held,
)
from diablo_theory.finetune.models import load_model
from diablo_theory.finetune.saved import read_attempts, read_config, read_failure
from diablo_theory.finetune.scoring import score_tasks
from diablo_theory.finetune.setup import Board, Load, Setup, put_trained, read_problems, set_up, trained_model
from diablo_theory.finetune.train import MEMORY, WEIGHTS, train
from diablo_theory.provenance import provenance
from diablo_theory.records import CONFIG, ERROR, FAILED, LOG, METRICS, read_log


def execute(config: RunConfig, folder: Path, board: Board, load: Load = load_model) -> dict[str, Any]:
    """Do a run, or what is left of it.

    Under a launcher all processes call this; the first writes.

    Args:
        config: The run.
        folder: Its folder, made if need be; see :mod:`diablo_theory.finetune.folder`.
        board: Shows progress.
        load: Gives the model; called only if there is something left to do.

    Returns:
        The metrics: run_id, suite, method, label, model and its source, seed, counts, seconds and peak memory of
        training, ``scores`` by task and the
        conditions that they were made under, provenance.

    Raises:
        ResultsError: If the folder belongs to another run, or another process is at work in it.
        ConfigError: If data are missing, or the method does not fit the model (num_blocks, target_modules).
        NonFiniteError: If training diverges, or did so in an earlier attempt.
        ModelUnavailableError: If the model is not to be had.
    """
    with held(folder, config.device):
        check_owner(folder, config)
        return finished(folder) or _execute(config, folder, board, load)


def add_scores(
    folder: Path,
    tasks: Sequence[str],
    board: Board,
    load: Load = load_model,
    *,
    elsewhere: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score a trained run on tasks, those of its own file or others; what is scored already is not done again.

    Args:
        folder: Of a run that has been trained, with its weights.
        tasks: Names; none for those of its own file.
        board: Shows progress.
        load: Gives the model.
        elsewhere: Keys that say where it is done now (see :func:`~diablo_theory.finetune.config.moved`), over those
            of its config.json, which stays as it is.

    Returns:
        The metrics, with the new scores in them and, under ``scored_later``, where and from which data they are.

    Raises:
        ResultsError: If the folder holds no finished run with its weights, or the base or data are others by now.
        ConfigError: If a task is unknown, its data are missing, or a key says more than where a run is done.
    """
    if not (folder / CONFIG).is_file():
        raise ResultsError(f"{folder} holds no run: there is no {CONFIG}")
    config = moved(read_config(folder / CONFIG), elsewhere or {})
    if tasks:
        config = validated(config.model_dump() | {"evaluate_on": list(tasks)})
    with held(folder, config.device):
        if config.method != "none" and not (folder / WEIGHTS).is_file():
            raise ResultsError(f"{folder} holds no trained parameters ({WEIGHTS}): train it first, with keep_weights")
        metrics = finished(folder)
        if metrics is None:
            raise ResultsError(f"{folder} is not finished: `diablo-theory train` goes on with it")
        # A start or a quantiser that looks at training data has to look at the same again.
        looks = config.method in methods.FAMILIES and bool(methods.FAMILIES[config.method].start)
        looks = looks or (config.quantise is not None and config.quantise.needs_calibration)
        problems = read_problems(config, train=looks)
        setup = trained_model(config, folder, board, load, problems.train, metrics["steps"])
        digests = {name: value for name, value in problems.digests().items() if looks or name != "train"}
        _note_inputs(folder, setup, digests)
        fresh = [name for name in problems.score if name not in metrics["scores"]]
        metrics["scores"] |= score_tasks(config, folder, board, setup, problems)
        metrics["data"] = metrics.get("data", {}) | digests
        if fresh:
            there = config.model_dump(mode="json", include={"data_root", "eval_batch_size"})
            later = dict.fromkeys(fresh, _environment(setup) | there)
            metrics["scored_later"] = metrics.get("scored_later", {}) | later
        metrics["conditions"] = metrics.get("conditions", {}) | problems.conditions
        if PartialState().is_main_process:
            write_json(folder / METRICS, metrics)
        return metrics


def _execute(config: RunConfig, folder: Path, board: Board, load: Load) -> dict[str, Any]:
    failed = folder / FAILED
    if failed.is_file():
        before = read_failure(failed)
        raise NonFiniteError(f"{before} (In an earlier attempt; delete {failed} to go on from the last checkpoint.)")
    first = PartialState().is_main_process
    if first:
        (folder / ERROR).unlink(missing_ok=True)  # of an earlier attempt
    problems = read_problems(config)
    setup = set_up(config, folder, board, load, problems.train)
    steps = 0 if setup.data is None else len(setup.data) // config.batch_size
    digests, named = problems.digests(), _named(setup)
    _note_inputs(folder, setup, digests)
    attempts = [*_attempts(folder), _environment(setup)]
    if first:  # only a run that can start owns the folder
        write_json(folder / CONFIG, config.model_dump(mode="json"))
        write_json(folder / ENVIRONMENT, {"steps": steps, "attempts": attempts})
    try:
        log = None if setup.data is None else _train(config, folder, board, setup, setup.data)
        if PartialState().num_processes > 1 and log is not None:
            # What training has wrapped or sharded is of no use for decoding: every process takes the model anew.
            del setup
            setup = trained_model(config, folder, board, load, problems.train)
        scores = score_tasks(config, folder, board, setup, problems)
    except NonFiniteError as error:
        if first:
            write_json(failed, named | {"error": str(error)})
        raise
    metrics = _metrics(config, folder, setup, log) | {
        "train_examples": len(problems.train),
        "cut_examples": 0 if setup.data is None else setup.data.cut,
        "scores": scores,
        "data": digests,
        "conditions": problems.conditions,
        "provenance": _over_all(attempts),
    }
    if first:
        _conclude(config, folder, setup.prepared, metrics)
    PartialState().wait_for_everyone()
    return metrics


def _note_inputs(folder: Path, setup: Setup, digests: dict[str, str]) -> None:
    """Note which weights and data a run has, or refuse to go on with others."""
    found = {"the base's weights": setup.loaded.sha256 or setup.loaded.source} | digests
    check_inputs(folder, found)
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        path = folder / INPUTS
        write_json(path, (read_json(path) if path.is_file() else {}) | found)


def _environment(setup: Setup) -> dict[str, Any]:
    return provenance(setup.loaded.model.device) | {"processes": PartialState().num_processes}


def _attempts(folder: Path) -> list[dict[str, Any]]:
    path = folder / ENVIRONMENT
    return read_attempts(path) if path.is_file() else []


def _over_all(attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """The last attempt's environment, and what is true of any of them: changed files, several commits."""
    commits = list(dict.fromkeys(str(attempt["commit"]) for attempt in attempts))
    several = {"commits": commits} if len(commits) > 1 else {}
    return attempts[-1] | several | {"attempts": len(attempts), "dirty": any(each["dirty"] for each in attempts)}


def _conclude(config: RunConfig, folder: Path, prepared: methods.Prepared, metrics: dict[str, Any]) -> None:
    if config.keep_weights and isinstance(prepared.model, PeftModel) and _loads_on_its_base(config):
        # The name that everybody knows the base by, not where it lies on this machine.
        for adapter in prepared.model.peft_config.values():
            adapter.base_model_name_or_path = config.model
        with atomic_folder(folder / ADAPTER) as aside:
            prepared.model.save_pretrained(str(aside), save_embedding_layers=False)
    # Before the metrics, so that a run that counts as finished has nothing left to clear.
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    write_json(folder / METRICS, metrics)
    if not config.keep_weights:
        (folder / WEIGHTS).unlink(missing_ok=True)


def _loads_on_its_base(config: RunConfig) -> bool:
    """Whether peft's files of this adapter, put on the model that they name, are the trained model.

    Not where the base was quantised on the way, nor where the start has taken something from data out of its weights
    (peft would start from other data, or none).
    """
    family = methods.FAMILIES[config.method]
    return config.quantise is None and not (family.start and family.changes_base)


def _named(setup: Setup) -> dict[str, Any]:
    """What trains on what, known before the first step: a run that diverges keeps it too."""
    loaded, prepared = setup.loaded, setup.prepared
    return {
        "label": prepared.label,
        "model_source": loaded.source,
        "model_sha256": loaded.sha256,
        "trainable_params": prepared.trainable_params,
        "trainable_pct": 100 * prepared.trainable_params / prepared.total_params,
    }


def _metrics(config: RunConfig, folder: Path, setup: Setup, log: pd.DataFrame | None) -> dict[str, Any]:
    return _named(setup) | {
        "run_id": folder.name,
        "suite": config.suite,
        "method": config.method,
        "model": config.model,
        "seed": config.seed,
        "learning_rate": None if log is None else config.learning_rate,
        "steps": 0 if log is None else len(log),
        "train_seconds": None if log is None else float(log["seconds"].sum()),
        # On a CPU a process's memory holds more than the run; `diablo-theory bench` measures it apart.
        "peak_memory_mib": None if log is None or MEMORY not in log else float(log[MEMORY].max()),
        "final_train_loss": None if log is None else float(log["loss"].iloc[-1]),
    }


def _train(config: RunConfig, folder: Path, board: Board, setup: Setup, data: Ordered) -> pd.DataFrame:
    prepared = setup.prepared
    log_file, weights = folder / LOG, folder / WEIGHTS
    with board.piece(f"train {prepared.label}", len(data) // config.batch_size) as advance:
        if log_file.is_file() and weights.is_file():  # training had ended before the interruption
            log = read_log(log_file, len(data) // config.batch_size)
            put_trained(prepared, weights)
            advance(len(log))
            return log
        # Also the seed of anything random that a model does while it trains.
        transformers.set_seed(config.seed)
        log, state = train(prepared, data, config, folder, setup.loaded.tokenizer.pad_token_id, advance)
        if PartialState().is_main_process:
            write_tensors(weights, state)
            write_with(log_file, lambda path: log.to_csv(path, index=False))
        PartialState().wait_for_everyone()
        return log
