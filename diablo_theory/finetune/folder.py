"""A run folder: configuration first, metrics last, and whatever was finished in between is not done again.

Holds config.json, inputs.json (digests of weights and data), environment.json (an entry an attempt: versions, machine,
commit), checkpoints/ while it trains, log.csv, trainable.safetensors, adapter/ (peft's own layout, where loading it on
the base named there gives the trained model), quantised.csv (a row a layer, for a quantised base),
predictions/TASK.csv, and when all is done metrics.json; failed.json after a divergence, error.txt after anything else
that ended its last attempt in a sweep, job.json for its last job on a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState

from diablo_theory.errors import ResultsError
from diablo_theory.files import is_held, locked, read_json, remove_partial
from diablo_theory.finetune.checkpoints import last_whole_checkpoint
from diablo_theory.finetune.config import ELSEWHERE, RunConfig
from diablo_theory.finetune.models import pick_device
from diablo_theory.finetune.saved import PUT_BACK, read_failure
from diablo_theory.finetune.train import WEIGHTS
from diablo_theory.records import CONFIG, ERROR, FAILED, LOG, METRICS, PREDICTIONS, Metrics, read_checked

ENVIRONMENT, ADAPTER, CHECKPOINTS, INPUTS = "environment.json", "adapter", "checkpoints", "inputs.json"
QUANTISED = "quantised.csv"
#: What a run makes when it owns its folder; somebody else's must be neither taken for it nor replaced.
RESULTS = (METRICS, FAILED, LOG, WEIGHTS, PREDICTIONS, ADAPTER, CHECKPOINTS)


def finished(folder: Path) -> dict[str, Any] | None:
    """The metrics of a finished run, or None; they are written last."""
    path = folder / METRICS
    return read_checked(path, Metrics) if path.is_file() else None


def check_owner(folder: Path, config: RunConfig) -> None:
    """Raise ResultsError if a folder belongs to a run with another configuration, or may do so."""
    path = folder / CONFIG
    if not path.is_file():
        if found := [name for name in RESULTS if (folder / name).exists()]:
            raise ResultsError(f"{folder} holds {found[0]}, but no {CONFIG} says of which run: choose another folder")
        return
    there = {key: value for key, value in read_json(path, PUT_BACK).items() if key not in ELSEWHERE}
    wanted = config.identity
    if different := sorted(key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key)):
        key = different[0]
        raise ResultsError(
            f"{folder} belongs to a run with {key}={there.get(key)!r}, not {wanted.get(key)!r}: "
            "choose another folder, or move that one away"
        )


def check_inputs(folder: Path, found: dict[str, Any]) -> None:
    """Raise ResultsError if a run was begun with other weights or data.

    Args:
        folder: Of the run; one that has noted nothing yet is fine.
        found: Names to digests, of what is there now.
    """
    path = folder / INPUTS
    before = read_json(path) if path.is_file() else {}
    for name in before.keys() & found.keys():
        if before[name] != found[name]:
            raise ResultsError(
                f"{folder} was begun with other contents of {name}: SHA-256 {before[name]}, now {found[name]}. "
                "Put back what was there, or choose another folder"
            )


@contextmanager
def held(folder: Path, device: str) -> Iterator[None]:
    """Hold a run folder; of the processes that a launcher has started the first does, and the others wait for it.

    Args:
        folder: Made if need be.
        device: As in a run's configuration: the processes find each other through it.

    Raises:
        ResultsError: If another run holds it.
    """
    first = PartialState(cpu=pick_device(device).type == "cpu").is_main_process
    with locked(folder) if first else nullcontext():
        if first:
            remove_partial(folder)
            if (folder / PREDICTIONS).is_dir():
                remove_partial(folder / PREDICTIONS)
        PartialState().wait_for_everyone()
        yield


def state(folder: Path) -> dict[str, Any]:
    """How far a run is, for people.

    Returns:
        state (finished, failed, running, stopped), step and steps (done and planned; None where not known), metrics
        (None unless finished), split (that it is scored on; "" where not known), note (the error of a failed run, or
        what is damaged; its first line says most).
    """
    known = {"step": None, "steps": None, "metrics": None, "split": "", "note": ""}
    try:
        split = read_json(folder / CONFIG).get("eval_split", "") if (folder / CONFIG).is_file() else ""
        return known | {"split": split} | _state(folder)
    except ResultsError as error:
        return known | {"state": "failed", "note": str(error)}


def _state(folder: Path) -> dict[str, Any]:
    if metrics := finished(folder):
        return {"state": "finished", "step": metrics["steps"], "steps": metrics["steps"], "metrics": metrics}
    steps = read_json(folder / ENVIRONMENT).get("steps") if (folder / ENVIRONMENT).is_file() else None
    known = {"step": _step(folder, steps), "steps": steps}
    if (folder / FAILED).is_file():
        return known | {"state": "failed", "note": read_failure(folder / FAILED)}
    if is_held(folder):
        return known | {"state": "running"}
    if (folder / ERROR).is_file():
        return known | {"state": "failed", "note": (folder / ERROR).read_text(encoding="utf-8", errors="replace")}
    return known | {"state": "stopped"}


def _step(folder: Path, steps: int | None) -> int | None:
    if (folder / WEIGHTS).is_file() and (folder / LOG).is_file():
        return steps
    checkpoint = last_whole_checkpoint(folder / CHECKPOINTS)
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def run_folders(root: Path) -> list[Path]:
    """All run folders below a folder, itself included, in the order of their names."""
    return sorted({path.parent for name in (CONFIG, METRICS, FAILED, ERROR) for path in root.rglob(name)})
