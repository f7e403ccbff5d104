"""Everything that has been saved, as what claims are decided by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from diablo_theory.errors import ResultsError, nearest
from diablo_theory.files import experiments_folder, read_json
from diablo_theory.reading import read_yaml
from diablo_theory.reporting.certificates import read_layers
from diablo_theory.reporting.comparisons import differences, experiments, scores
from diablo_theory.reporting.joining import made_from
from diablo_theory.reporting.parameters import KEY, read_counts
from diablo_theory.reporting.published import conflicts, read_published
from diablo_theory.reporting.results import read_verdicts
from diablo_theory.reporting.saved_tables import Kind
from diablo_theory.reporting.steps import read_steps, summarise
from diablo_theory.reporting.suite_tables import build_sections, of_tests
from diablo_theory.reporting.suites import Suites, read_suites

#: What a real model's layers say: columns of layers.csv that claims ask for.
_LAYERS: dict[str, Kind] = {
    "layer": "text",
    "premise_holds": "flag",
    **dict.fromkeys(("block_rows", "energy_rank", "num_blocks", "tokens"), "count"),
    **dict.fromkeys(("tightness", "leak_share"), "number"),
    **dict.fromkeys((f"capture_{name}" for name in ("diablo", "lora_set", "lora_tangent", "lora_frozen")), "number"),
}


class NotMadeError(ResultsError):
    """Nothing saved to decide a question by.

    Attributes:
        command: What would make it, which the message names too.
    """

    def __init__(self, what: str, command: str) -> None:
        super().__init__(f"{what}; {command} makes it")
        self.command = command


@dataclass(frozen=True)
class Evidence:
    """Saved results, each read when it is first asked for.

    Where something was never made, asking for it raises :class:`NotMadeError`; where it is damaged, ResultsError.

    Attributes:
        results: A results folder of ``diablo-theory reproduce``.
        papers: The folder with published numbers, collections and benchmarks, such as ``paper_results``.
    """

    results: Path
    papers: Path

    def _named(self, path: Path) -> str:
        """A path below the papers' folder as it is called in the repository, wherever that lies."""
        return (Path(self.papers.name) / path.relative_to(self.papers)).as_posix()

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """Trials of the theory checks: check, role, passed, ..."""
        _require(self.results / "theory" / "verdicts.csv", "diablo-theory reproduce")
        return read_verdicts(self.results)

    @cached_property
    def published(self) -> pd.DataFrame:
        """Published rows, with their files."""
        _require(self.papers / "published", "git checkout, since published numbers are a part of the repository")
        return read_published(self.papers / "published")

    @cached_property
    def conflicts(self) -> pd.DataFrame:
        """Published rows that ought to be the same and are not, see :func:`~.published.conflicts`."""
        return conflicts(self.published)

    @cached_property
    def counts(self) -> pd.DataFrame:
        """Quoted numbers of parameters beside true ones."""
        file, command = self.papers / "counts.csv", f"diablo-theory count --out {self.papers.name}"
        _require(file, command)
        found = read_counts(file)
        published = set(self.published[list(KEY)].itertuples(index=False, name=None))
        for line, key in enumerate(found[list(KEY)].itertuples(index=False, name=None), 2):
            if key not in published:
                raise ResultsError(
                    f"{file}, line {line}: no published row is of {', '.join(map(str, key))}; `{command}` writes it"
                )
        return found

    @cached_property
    def suites(self) -> Suites:
        """Collected runs that were scored on test problems."""
        folder = self.papers / "reproduced" / "suites"
        _require(folder, f"diablo-theory collect RUNS --out {self._named(folder)}")
        return of_tests(read_suites(folder))

    @cached_property
    def sections(self) -> dict[str, pd.DataFrame]:
        """What the tables of collected runs hold; nothing while none are collected."""
        try:
            return build_sections(self.suites)
        except NotMadeError:
            return {}

    @cached_property
    def experiments(self) -> pd.DataFrame:
        """Which collected runs are one experiment, see :func:`~.comparisons.experiments`."""
        return experiments(self.suites)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Every experiment's scores over its seeds, see :func:`~.comparisons.scores`."""
        return scores(self.suites)

    @cached_property
    def differences(self) -> pd.DataFrame:
        """Every experiment's score minus DiaBlo's, with what the experiment is.

        DiaBlo's own score is ``diablo``; how many of its seeds diverged, ``diablo_diverged``.
        """
        about = ["experiment", "suite", "model", "method", "label", "base", "scale", "num_blocks", "learning_rate"]
        about += ["diverged"]
        own = self.scores[["experiment", "task", "metric", "value", "diverged"]]
        own = own.rename(columns={"experiment": "reference", "value": "diablo", "diverged": "diablo_diverged"})
        found = differences(self.suites).merge(own, on=["reference", "task", "metric"])
        return found.merge(self.scores[about].drop_duplicates("experiment"), on="experiment")

    @cached_property
    def training(self) -> pd.DataFrame:
        """Every step of every collected run, with the run's method, task, seed and experiment.

        A run that logged none has a row without a step.
        """
        named = self.experiments.merge(
            self.suites.configs[["run_id", "suite", "model", "method", "train_on", "seed", "scale", "state"]],
            on="run_id",
        )
        return named.merge(self.suites.training, on="run_id", how="left")

    @cached_property
    def steps(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Times and contenders of the step benchmark."""
        _require(self.papers / "steps", f"diablo-theory bench --out {self.papers.name}/steps")
        return read_steps(self.papers / "steps")

    @cached_property
    def step_summary(self) -> pd.DataFrame:
        """A row a contender of the step benchmark, see :func:`~.steps.summarise`."""
        return summarise(*self.steps)

    def needs(self, run: str) -> str:
        """Hardware and time of a run, as the head of its file says; `diablo-theory plan` has computed both.

        Args:
            run: The file, below ``experiments``.

        Raises:
            ResultsError: If there is no such file, or its head does not say.
        """
        file = _run_file(run)
        head = file.read_text(encoding="utf-8")
        found = re.search(r"^# Hardware: ([^;\n]*).*\n# Time: (?:training )?([^;\n]*)", head, re.MULTILINE)
        if found is None:
            raise ResultsError(f"{file} does not say in its head what hardware and time it needs")
        return f"{found[1]}, {re.sub(' at [0-9]+ to [0-9]+% of the peak rate', '', found[2])}"

    def stated(self, run: str) -> dict[str, Any]:
        """What a run file says, over the defaults.

        Args:
            run: The file, below ``experiments``.

        Raises:
            ResultsError: If there is no such file, or it is none of a run.
        """
        file = _run_file(run)
        defaults, said = read_yaml(experiments_folder() / "defaults.yaml"), read_yaml(file)
        if strange := sorted(said.keys() - defaults.keys()):
            raise ResultsError(
                f"{file} is no file of a run, which has no key {strange[0]!r}.{nearest(strange[0], defaults)}"
            )
        return defaults | said | {"suite": file.parent.name}

    def of_run(self, run: str) -> pd.DataFrame:
        """What collected runs of a run file scored: rows of :attr:`scores`, of one experiment.

        Of several experiments with what the file says (a model's weights may differ) it is the one of the most seeds.
        Arguments and errors are those of :meth:`stated`.
        """
        ids = made_from(self.suites.configs, self.stated(run))["run_id"]
        named = self.experiments
        own = self.scores[self.scores["experiment"].isin(named.loc[named["run_id"].isin(ids), "experiment"])]
        most = own.sort_values("seeds", kind="stable")["experiment"].tail(1)
        return own[own["experiment"].isin(most)]

    @cached_property
    def layers(self) -> pd.DataFrame:
        """A real model's layers: premises, certificates, captures."""
        file = self.papers / "diagnosis" / "layers.csv"
        _require(file, f"diablo-theory diagnose --out {self._named(file.parent)}")
        return read_layers(file, _LAYERS)

    @cached_property
    def layers_model(self) -> str:
        """The model of :attr:`layers`, as it was recorded beside them."""
        file = self.papers / "diagnosis" / "statistics.json"
        return str(read_json(file).get("model", "a real model")) if file.is_file() else "a real model"


def _run_file(run: str) -> Path:
    file = experiments_folder() / run
    if not file.is_file():
        known = {path.relative_to(experiments_folder()).as_posix() for path in experiments_folder().glob("*/*.yaml")}
        raise ResultsError(f"there is no run file {run!r} below {experiments_folder().name}.{nearest(run, known)}")
    return file


def _require(path: Path, command: str) -> None:
    if not path.exists():
        raise NotMadeError(f"nothing is saved in {path.parent.name}/{path.name}", f"`{command}`")
