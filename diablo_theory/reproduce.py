"""The whole way through: theory, real model, cost, report. Each finished piece is a file and is not made again."""

from __future__ import annotations

import datetime
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diablo_theory import __version__, bench, methods
from diablo_theory.errors import ConfigError, NonFiniteError, ResultsError, nearest
from diablo_theory.files import (
    experiments_folder,
    locked,
    paper_results,
    read_json,
    remove_partial,
    write_json,
    write_with,
)
from diablo_theory.finetune import models, runs
from diablo_theory.finetune.config import RunConfig, read_run_file, resolve
from diablo_theory.finetune.folder import check_owner, finished
from diablo_theory.methods import Method
from diablo_theory.progress import Board
from diablo_theory.provenance import peak_rss_gib, provenance
from diablo_theory.reading import read_yaml
from diablo_theory.reporting.report import write_report
from diablo_theory.reporting.results import LAYOUT_VERSION
from diablo_theory.sweeps import sweep
from diablo_theory.theory.checks import CHECKS, run_checks
from diablo_theory.theory.maps import Grid, map_cells
from diablo_theory.tune import GRID, tune


class Profile(BaseModel):
    """One entry of ``experiments/reproduce.yaml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trials: int = Field(ge=1)
    tasks: tuple[str, ...] = Field(min_length=1)
    methods: tuple[Method, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    bench_rounds: int = Field(ge=1)
    tune: bool
    set: dict[str, Any]


def load_profile(name: str) -> Profile:
    """A profile by name.

    Raises:
        ConfigError: If there is no such profile or it is malformed.
    """
    path = experiments_folder() / "reproduce.yaml"
    profiles = read_yaml(path)
    if name not in profiles:
        raise ConfigError(f"no profile {name!r} in {path}.{nearest(name, profiles)}")
    try:
        return Profile.model_validate(profiles[name])
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{path}, {name}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


#: (task, method) -> learning rate
Rates = dict[tuple[str, str], float]


def planned_runs(profile: Profile, overrides: dict[str, Any], rates: Rates | None = None) -> dict[str, RunConfig]:
    """Run name to configuration, in order; the methods of a task and seed differ in their run files alone.

    Args:
        profile: What to run.
        overrides: Keys of a run, over the profile's.
        rates: Learning rates that a search has chosen; the run files' own where it has none.

    Raises:
        ConfigError: If a key or value is not allowed.
    """
    planned: dict[str, RunConfig] = {}
    for task, seed, method in itertools.product(profile.tasks, profile.seeds, profile.methods):
        differences = read_run_file(experiments_folder() / task / f"{method}.yaml")
        chosen = {"learning_rate": rates[task, method]} if rates and (task, method) in rates else {}
        # The untouched model has no seed: one run stands for all.
        if method != "none" or seed == profile.seeds[0]:
            config = resolve(differences, profile.set, overrides, {"seed": seed} | chosen)
            planned[f"{task}-{method}-seed{seed}"] = config
    return planned


#: Keys of a run that the plan itself sets: an override would make runs say what they are not.
PLANNED = ("suite", "train_on", "evaluate_on", "method", "seed", "scale")


class Reproduction:
    """A results folder being filled.

    Args:
        out: The folder; made if need be.
        name: The profile.
        overrides: Keys of a run that the command line sets for all runs.

    Attributes:
        failures: A line for each run that diverged, after :meth:`run`.

    Raises:
        ConfigError: If an override is not allowed.
    """

    def __init__(self, out: Path, name: str, overrides: dict[str, Any]) -> None:
        self.out = out
        self.name = name
        self.profile = load_profile(name)
        taken = [*PLANNED, *(["learning_rate"] if self.profile.tune else [])]
        if owned := [key for key in overrides if key in taken]:
            raise ConfigError(
                f"{owned[0]} cannot be set here: profile {name!r} decides it. Use `diablo-theory train`."
            )
        self.overrides = overrides
        self.planned = planned_runs(self.profile, overrides)
        self.failures: list[str] = []
        self.manifest: dict[str, Any] = {}

    def run(self, board_of: Callable[[dict[str, float]], Board]) -> Path:
        """Do everything that is not done yet; returns the HTML report.

        Args:
            board_of: Makes the progress board from the seconds that each stage is expected to take.

        Raises:
            ResultsError: If the folder was begun by another version or with other settings (it is left as it is), or
                another process is at work in it.
            ModelUnavailableError: If the pretrained model is not to be had.
            ConfigError: If a method does not fit the model.
        """
        with locked(self.out):
            remove_partial(self.out)
            return self._run(board_of(self._expected()))

    def _run(self, board: Board) -> Path:
        manifest = self._read_manifest()
        started = time.monotonic()
        found = self._check_model(board)
        self.manifest = manifest or self._new_manifest()
        self.manifest["model"] = found
        self._spent("model", time.monotonic() - started)
        self._theory(board)
        if self.profile.tune:
            self.planned = planned_runs(self.profile, self.overrides, self._tuned(board))
        for name, config in self.planned.items():
            self._one_run(name, config, board)
        self._bench(board)
        if self.manifest["finished"] is None and not self.failures:
            self.manifest["finished"] = _now()
            self._save()
        with self._timed("report", board), board.piece("draw figures, write tables and the report", 1) as advance:
            page = write_report(self.out, paper_results())
            advance(1)
        return page

    def _check_model(self, board: Board) -> dict[str, Any]:
        """Get the model and try the adapters on it before anything is begun: a typo should cost seconds."""
        config = next(iter(self.planned.values()))
        with board.stage("model"), board.piece(models.loading(config.model), 1) as advance:
            loaded = models.load_model(config.model, config.device)
            advance(1)
        try:
            methods.prepare(loaded.model, "diablo", config.num_blocks, config.target_modules, config.seed)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error
        return {"name": config.model, "source": loaded.source, "sha256": loaded.sha256}

    def _settings(self) -> dict[str, Any]:
        settings = {"profile": self.profile.model_dump(mode="json"), "overrides": self.overrides}
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain

    def _new_manifest(self) -> dict[str, Any]:
        config = next(iter(self.planned.values()))
        here = provenance(models.pick_device(config.device))
        return {
            "schema_version": LAYOUT_VERSION,
            "profile": self.name,
            "scale": config.scale,
            "settings": self._settings(),
            **here,
            "commits": [here["commit"]],
            "started": _now(),
            "finished": None,
            "seconds": 0.0,
            "peak_rss_gib": None,
            "stages": {},
        }

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.out / "manifest.json"
        if not path.is_file():
            return None
        advice = f"Choose another --out, or move {self.out} away; it was left as it is."
        manifest = read_json(path)
        found = manifest.get("schema_version"), manifest.get("package_version")
        if found != (LAYOUT_VERSION, __version__):
            raise ResultsError(
                f"{self.out} was begun by version {found[1]} (results schema {found[0]}), this is version "
                f"{__version__} (schema {LAYOUT_VERSION}). {advice}"
            )
        if manifest["settings"] != self._settings():
            raise ResultsError(f"{self.out} was begun with other settings ({manifest['profile']}). {advice}")
        here = provenance(models.pick_device(next(iter(self.planned.values())).device))
        if here["commit"] not in manifest["commits"]:
            manifest["commits"].append(here["commit"])
        manifest["dirty"] = manifest["dirty"] or here["dirty"]
        return manifest

    def _save(self) -> None:
        write_json(self.out / "manifest.json", self.manifest)

    @contextmanager
    def _timed(self, name: str, board: Board) -> Iterator[None]:
        started = time.monotonic()
        try:
            with board.stage(name):
                yield
        finally:  # time spent counts even when the stage was interrupted
            self._spent(name, time.monotonic() - started)

    def _spent(self, name: str, seconds: float) -> None:
        stages = self.manifest["stages"]
        stages[name] = round(stages.get(name, 0.0) + seconds, 1)
        self.manifest["seconds"] = round(sum(stages.values()), 1)
        self.manifest["peak_rss_gib"] = max(self.manifest["peak_rss_gib"] or 0.0, peak_rss_gib() or 0.0) or None
        self._save()

    def _theory(self, board: Board) -> None:
        verdicts_file, map_file = self.out / "theory" / "verdicts.csv", self.out / "theory" / "map.csv"
        if map_file.is_file() and verdicts_file.is_file():
            board.skip("theory")
            return
        with self._timed("theory", board):
            with board.piece("checks and their controls", len(CHECKS) * self.profile.trials) as advance:
                verdicts = run_checks(trials=self.profile.trials, progress=lambda text: advance(1))
            write_with(verdicts_file, lambda path: verdicts.to_csv(path, index=False))
            tasks = Grid().tasks()
            with board.piece("map of the gaps", len(tasks)) as advance:
                # it tells at the start too, of none finished
                cells = sweep(map_cells, tasks, progress=lambda finished, total: advance(min(finished, 1)))
            write_with(map_file, lambda path: cells.to_csv(path, index=False))

    def _tuned(self, board: Board) -> Rates:
        trained = [method for method in self.profile.methods if method != "none"]
        settings = self.profile.set | self.overrides
        rates: Rates = {}
        for task in self.profile.tasks:
            with self._timed(f"learning rates, {task}", board):
                table = tune(task, trained, GRID, settings, self.out, board)
            ours = table[(table["task"] == task) & table["chosen"]]
            rates |= {(task, row["method"]): float(row["learning_rate"]) for _, row in ours.iterrows()}
        return rates

    def _one_run(self, name: str, config: RunConfig, board: Board) -> None:
        folder = self.out / "runs" / name
        if finished(folder):
            check_owner(folder, config)
            board.skip(name)
            return
        try:
            with self._timed(name, board):
                runs.execute(config, folder, board)
        except NonFiniteError as error:  # one method's divergence says nothing about the others
            self.failures.append(f"{name}: {error}")

    def _bench(self, board: Board) -> None:
        times_file, memory_file = self.out / "bench" / "step_times.csv", self.out / "bench" / "memory.csv"
        if times_file.is_file() and memory_file.is_file():
            board.skip("cost")
            return
        contenders = [method for method in self.profile.methods if method != "none"]
        config = next(iter(self.planned.values()))
        rounds = self.profile.bench_rounds
        with self._timed("cost", board):
            loaded = models.load_model(config.model, config.device)
            with board.piece("time one training step of each, in turn", rounds + bench.WARMUP_ROUNDS) as advance:
                times, memory = bench.compare(loaded, config, contenders, rounds, advance)
            write_with(memory_file, lambda path: memory.to_csv(path, index=False))
            write_with(times_file, lambda path: times.to_csv(path, index=False))

    def _expected(self) -> dict[str, float]:
        """Rough seconds a stage on two CPU cores, for the first estimate; the board corrects them as it goes."""
        expected = {"model": 3.0, "theory": 5.0 * self.profile.trials}
        for name, config in self.planned.items():
            step = {"none": 0.0, "full": 1.9}.get(config.method, 1.4) * config.batch_size / 16
            # The untouched model rambles on to the length limit; trained ones stop after the answer.
            expected[name] = (
                2.0 + (config.steps or 0) * step + (0.13 if step == 0.0 else 0.07) * (config.eval_items or 0)
            )
        if self.profile.tune:
            for task in self.profile.tasks:
                once = sum(expected[f"{task}-{method}-seed{self.profile.seeds[0]}"] for method in self.profile.methods)
                expected[f"learning rates, {task}"] = once * len(GRID)
        return expected | {"cost": 5.5 * (self.profile.bench_rounds + bench.WARMUP_ROUNDS), "report": 10.0}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
