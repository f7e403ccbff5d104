"""The examples of EXTENDING.md run, and are as short as it says."""

import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from diablo_theory import methods
from diablo_theory.finetune import runs
from diablo_theory.finetune.config import resolve
from diablo_theory.finetune.models import load_model
from diablo_theory.finetune.tasks import TASKS
from diablo_theory.progress import Board
from diablo_theory.reporting.claims import Claim, decide
from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.style import save

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "EXTENDING.md").read_text(encoding="utf-8")


def block(section, kind):
    return re.search(rf"## {section}\n.*?```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)[1]


@pytest.fixture
def quiet():
    return Board(Console(quiet=True))


@pytest.mark.parametrize(
    "length", [len(text.splitlines()) for text in re.findall(r"```\w+\n(.*?)```", PAGE, re.DOTALL)]
)
def test_each_takes_at_most_thirty_lines(length):
    assert length <= 30


def test_the_method_trains_what_it_counts(tiny_model, monkeypatch):
    names = {}
    exec(block("A method", "python"), names)
    monkeypatch.setitem(methods.FAMILIES, "fourierft", names["family"])
    model = load_model(str(tiny_model), "cpu").model
    prepared = methods.prepare(model, "fourierft", 6, ["q_proj", "up_proj"], seed=0)
    assert prepared.trainable_params == 4 * 36  # the largest knob that the smallest of the four matrices allows
    assert list(prepared.groups) == ["spectrum"]
    assert prepared.groups["spectrum"]


def test_the_task_trains_and_is_scored(tiny_model, tmp_path, monkeypatch, quiet):
    names = {}
    exec(block("A task", "python"), names)
    monkeypatch.setitem(TASKS, "last_letters", names["TASK"])
    config = {"suite": "word_problems", "train_on": "last_letters", "evaluate_on": ["last_letters"], "num_blocks": 6}
    config |= {"steps": 1, "batch_size": 2, "warmup_steps": 0, "eval_items": 3, "device": "cpu", "learning_rate": 1e-2}
    metrics = runs.execute(resolve(config, {"model": str(tiny_model)}), tmp_path / "run", quiet)
    assert 1 <= metrics["scores"]["last_letters"]["n"] <= 3


def test_the_claim_is_decided():
    (claim,) = yaml.safe_load(block("A claim", "yaml"))
    found = decide(Claim(**claim), Evidence(ROOT / "paper_results" / "reproduced", ROOT / "paper_results"))
    assert "times MiSS's" in found.answers[0].evidence


def test_the_figure_is_drawn_from_what_is_saved(tmp_path):
    names = {}
    exec(block("A figure", "python"), names)
    entry = names["entry"]
    saved = Evidence(ROOT / "paper_results" / "reproduced", ROOT / "paper_results")
    assert all((saved.papers / name).exists() for name in entry.reads)
    files = save(entry.draw(saved), tmp_path, "premise_margins")
    assert {file.suffix for file in files} == {".pdf", ".svg", ".png"}
