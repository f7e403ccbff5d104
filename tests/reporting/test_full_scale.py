"""What the paper's runs would do to claims, tables and figures, from run files and made-up outcomes."""

import json
import re
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from diablo_theory.errors import ResultsError
from diablo_theory.finetune.config import load_run
from diablo_theory.finetune.planning.datasets import DATASETS
from diablo_theory.reporting import intervals
from diablo_theory.reporting.claims import read_claims
from diablo_theory.reporting.comparisons import EPOCHS
from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.overview import overview
from diablo_theory.reporting.questions import Outcome
from diablo_theory.reporting.questions.published import Headline
from diablo_theory.reporting.suite_plots import settings
from diablo_theory.reporting.suite_tables import readable_section
from diablo_theory.reporting.suites import Suites, read_suites

ROOT = Path(__file__).parents[2]
PAPERS = ROOT / "paper_results"
MADE = {"label": "", "state": "finished", "trainable_params": 1_000, "model_sha256": "ab", "train_data": "cd"}
MADE |= {"conditions": "{}", "data": "{}", "train_seconds": 60.0, "device": "cuda", "cpu": "any", "commit": "abc"}
MADE |= {
    "steps_done": 200,
    "peak_memory_mib": 12_345.6,
    "dirty": False,
    "date": "2030-01-01",
    "torch": "2",
    "peft": "0",
    "transformers": "5",
}
METRICS = {"humaneval": ("pass@1", "pass@5", "pass@10"), "hexphi": ("safe", "safe_response")}
PROBLEMS = 200


def collected(shares, seeds=(0,), **changes) -> Suites:
    """Runs of run files as a collection.

    Args:
        shares: For each file below ``experiments`` the share of problems that its method solves.
        seeds: Of each.
        changes: Keys of every run that differ from its file's.
    """
    rng = np.random.default_rng(0)
    configs, outcomes = [], []
    for file, share in shares.items():
        for seed in seeds:
            config = load_run(ROOT / "experiments" / file, {}).model_dump(mode="json") | {"seed": seed} | changes
            run_id = f"full/{file.removesuffix('.yaml')}-seed={seed}"
            flat = {key: json.dumps(v) if isinstance(v, list | dict) else v for key, v in config.items()}
            configs.append({"run_id": run_id} | flat | MADE | {"label": config["method"]})
            for task in config["evaluate_on"]:
                items = pd.DataFrame({"item": range(PROBLEMS), "tokens": 2, "loss_sum": 2.0})
                items["cluster"] = items["prompt"] = items["answer"] = items["item"].astype(str)
                for metric in METRICS.get(task, ("exact", "lenient")):
                    solved = np.arange(PROBLEMS) < share * PROBLEMS
                    items[metric] = rng.permutation(solved).astype(float)
                outcomes.append(items.assign(run_id=run_id, task=task, seed=seed, label=config["method"]))
    frame = pd.DataFrame(configs)
    rows = frame[["run_id"]].assign(setting=frame["label"])
    training = pd.DataFrame(columns=["run_id", "step", "loss", "learning_rate", "grad_norm"])
    return Suites(rows, frame, pd.concat(outcomes, ignore_index=True), training)


SAVED = Evidence(PAPERS / "reproduced", PAPERS)


def evidence(suites):
    found = Evidence(PAPERS / "reproduced", PAPERS)
    found.__dict__.update(suites=suites, published=SAVED.published, conflicts=SAVED.conflicts)
    return found


@pytest.fixture(autouse=True, scope="module")
def few_resamples():
    """What is asked here does not hang on an interval's last digit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "RESAMPLES", 200)
        intervals._counts.cache_clear()
        yield
    intervals._counts.cache_clear()


@pytest.fixture(scope="module")
def headlines():
    claims = {claim.id: claim.asks[0] for claim in read_claims(PAPERS / "claims.yaml")}
    return {name: question for name, question in claims.items() if isinstance(question, Headline)}


def answer(headlines, name, *args, **changes):
    return headlines[name].ask(evidence(collected(*args, **changes)))


DIABLO, DORA = "commonsense/llama-13b_diablo.yaml", "commonsense/llama-13b_dora.yaml"


@pytest.mark.parametrize(
    ("shares", "outcome", "words"),
    [
        ((0.9, 0.6), Outcome.HOLDS, "DiaBlo is ahead of DoRA on Average by 30.0"),
        ((0.6, 0.9), Outcome.FAILS, "DiaBlo is behind DoRA on Average by 30.0"),
        ((0.99, 0.99), Outcome.FAILS, "no more than level, within 1%, with DoRA on Average"),
        ((0.52, 0.51), Outcome.OPEN, "not told from DoRA on Average: intervals reach to"),
    ],
)
def test_runs_of_other_recipes_decide_a_headline(headlines, shares, outcome, words):
    found = answer(headlines, "commonsense-llama-13b", dict(zip((DIABLO, DORA), shares, strict=True)))
    assert found.outcome == outcome
    assert words in found.evidence
    assert "printed: DiaBlo 84.9" in found.evidence
    assert found.scale == "full scale, 1 seed"
    assert "suite-commonsense" in found.rows


def test_every_headline_is_decided_by_the_runs_that_it_names(headlines):
    assert len(headlines) == 9
    for name, question in headlines.items():
        shares = {file: 0.9 if method == "diablo" else 0.5 for method, file in question.runs.items()}
        found = answer(headlines, name, shares)
        missing = set(question.methods) - set(question.runs)
        assert found.outcome == (Outcome.OPEN if missing else Outcome.HOLDS), name
        assert found.evidence.startswith("DiaBlo is ahead of"), name
        assert ("; not run, or not on all: " in found.evidence) == bool(missing)
        worse = {file: 1.4 - share for file, share in shares.items()}
        assert answer(headlines, name, worse).outcome == Outcome.FAILS, name
        alone = answer(headlines, name, {question.runs["diablo"]: 0.9})
        assert (alone.outcome, alone.source) == (Outcome.OPEN, "published")
        assert all(f"experiments/{file}" in alone.decides for file in question.runs.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": "small"},
        {"model": "another"},
        {"learning_rate": 1.0},
        {"evaluate_on": ["boolq"]},
        {"suite": "code"},
        {"weight_decay": 0.1},  # which the files leave to the defaults
    ],
)
def test_other_runs_do_not(headlines, changes):
    assert answer(headlines, "commonsense-llama-13b", {DIABLO: 0.9, DORA: 0.5}, **changes).source == "published"


@pytest.mark.parametrize("changes", [{"model": "/models/Llama-13B"}, {"micro_batch_size": 1}, {"device": "cuda"}])
def test_where_and_how_a_run_was_done_does_not_matter(headlines, changes):
    assert answer(headlines, "commonsense-llama-13b", {DIABLO: 0.9, DORA: 0.5}, **changes).outcome == Outcome.HOLDS


def test_of_two_numbers_of_blocks_the_headline_s_own_decides(headlines):
    shares = {"commonsense/llama2-7b_diablo-n64.yaml": 0.9, "commonsense/llama2-7b_lora.yaml": 0.5}
    assert answer(headlines, "commonsense-llama2-7b", shares).source == "published"
    shares["commonsense/llama2-7b_diablo-n128.yaml"] = 0.3
    found = answer(headlines, "commonsense-llama2-7b", shares)
    assert found.outcome == Outcome.FAILS
    assert "behind LoRA" in found.evidence


def test_seeds_that_diverged_keep_a_headline_from_holding(headlines):
    suites = collected({DIABLO: 0.9, DORA: 0.5}, seeds=(0, 1))
    one, all_of_it = (suites.configs["run_id"].str.contains(text) for text in ("diablo-seed=1", "diablo-seed"))
    for gone, outcome, words in (
        (one, Outcome.OPEN, "DiaBlo is ahead of DoRA on Average by .*; of DiaBlo 1 of 2 seeds diverged; printed"),
        (all_of_it, Outcome.OPEN, "no pair of scores; .*; of DiaBlo 2 of 2 seeds diverged; printed"),
    ):
        configs = suites.configs.assign(state=np.where(gone, "diverged", "finished"))
        left = suites.outcomes[~suites.outcomes["run_id"].isin(configs.loc[gone, "run_id"])]
        found = headlines["commonsense-llama-13b"].ask(evidence(replace(suites, configs=configs, outcomes=left)))
        assert found.outcome == outcome
        assert re.search(words, found.evidence)


def test_a_headline_needs_every_table(headlines):
    files = headlines["arithmetic"].runs
    suites = collected(dict.fromkeys(files.values(), 0.5))
    # A further seed that was scored on one task alone leaves no average over the same tasks for every seed.
    more = collected({files["lora"]: 0.5}, seeds=(1,), evaluate_on=["gsm8k_metamath"])
    pairs = zip(suites.frames().values(), more.frames().values(), strict=True)
    both = Suites(*(pd.concat(pair, ignore_index=True) for pair in pairs))
    found = headlines["arithmetic"].ask(evidence(both))
    assert "not run, or not on all: LoRA" in found.evidence
    assert "LoRA on" not in found.evidence
    assert "PiSSA on Average, GSM8K and MATH" in found.evidence  # in the order of the claim


def test_bits_are_told_apart(headlines):
    four = {"quantised/4bit_magr-diablo.yaml": 0.9, "quantised/4bit_optq-lora.yaml": 0.5}
    assert answer(headlines, "two-bits", four).source == "published"
    assert "ahead of GPTQ-LoRA" in answer(headlines, "four-bits", four).evidence


def test_runs_land_beside_the_published_numbers():
    shares = {DIABLO: 0.9, DORA: 0.5, "code/llama3-8b_diablo.yaml": 0.4, "safety/llama3-8b_lora.yaml": 0.9}
    shares |= {"efficiency/diablo.yaml": 0.5, "arithmetic/llama2-7b_full.yaml": 0.6, "gradients/diablo.yaml": 0.5}
    shares |= {"arithmetic/gsm8k_llama2-7b_diablo.yaml": 0.6, "docstrings/diablo.yaml": 0.5}
    parts = overview(evidence(collected(shares)), date(2030, 1, 2), pd.DataFrame(columns=["input", "date"]))
    shown = {part.title: part for part in next(part for part in parts if part.id == "suites").shown}
    for heading in ("Commonsense reasoning", "Arithmetic reasoning", "GSM8K alone", "Code", "Safety", "Efficiency"):
        own = [part for title, part in shown.items() if title.startswith(f"{heading}: reproduced, ")]
        assert len(own) == 1, heading
        assert "at full scale" in own[0].title
        assert f"{heading}: nothing reproduced here yet" not in shown
    beside = [title for title in shown if title.startswith("Beside the paper's suites: reproduced, ")]
    assert [title.rpartition(" (")[2] for title in beside] == [
        "methods at equal numbers of trainable parameters)",
        "gradients)",
    ]
    table = next(part.frame for title, part in shown.items() if title.startswith("Commonsense reasoning: repr"))
    assert table["Task"].tolist()[-2:] == ["Average"] * 2
    assert table.set_index(["Task", "Method"]).loc[("Average", "dora"), "Exact match, %"].startswith("50.0 (")
    cost = next(part.frame for title, part in shown.items() if title.startswith("Efficiency: repr")).iloc[0]
    # 200 steps of 16 in a minute; an epoch has 170,420 examples.
    assert [cost[name] for name in ("Seconds a step", "Minutes an epoch", "Peak memory, MiB")] == [
        "0.300",
        "53",
        "12346",
    ]
    assert "Seconds a step" not in table
    code = next(part.frame for title, part in shown.items() if title.startswith("Code: repr"))
    assert {"pass@1, %", "pass@5, %", "pass@10, %"} <= set(code)


def test_an_epoch_is_that_of_the_plans():
    files = (ROOT / "experiments" / "efficiency").glob("*.yaml")
    assert {load_run(file, {}).train_on for file in files} == set(EPOCHS)
    assert {name: DATASETS[name].examples for name in EPOCHS} == EPOCHS


def test_models_of_one_suite_are_told_apart():
    shares = {DIABLO: 0.9, "commonsense/llama3-8b_diablo.yaml": 0.5}
    table = readable_section(evidence(collected(shares)).sections["commonsense"])
    assert list(dict.fromkeys(table["Model"])) == ["huggyllama/llama-13b", "meta-llama/Meta-Llama-3-8B"]


def test_full_runs_beside_small_ones_stop_no_figure():
    small, full = read_suites(PAPERS / "reproduced" / "suites"), collected({"patterns/random-rows.yaml": 0.5})
    pairs = zip(small.frames().values(), full.frames().values(), strict=True)
    both = Suites(*(pd.concat(pair, ignore_index=True) for pair in pairs))
    foot = settings(evidence(both).sections, "").get_supxlabel().replace("\n", " ")
    assert "In the tables alone: GSM8K (patterns, " in foot


def test_an_open_question_names_the_command_that_adds_seeds():
    claims = {claim.id: claim.asks[0] for claim in read_claims(PAPERS / "claims.yaml")}
    decides = claims["small-patterns"].ask(evidence(read_suites(PAPERS / "reproduced" / "suites"))).decides
    command = decides.split("`")[1].split()
    assert command[:2] == ["diablo-theory", "sweep"]
    assert (ROOT / command[2]).is_file()
    assert (ROOT / command[command.index("--collected") + 1]).is_dir()


def test_a_headline_names_diablo_s_run_file_and_no_strangers():
    keys = {"kind": "headline", "suite": "code", "model": "m", "tables": ["humaneval"], "against": ["lora"]}
    with pytest.raises(ValidationError, match="lora is named twice"):
        Headline(**keys, level=["lora"], runs={"diablo": "a.yaml"})
    with pytest.raises(ValidationError, match="runs must name DiaBlo's run file"):
        Headline(**keys, runs={"lora": "code/llama3-8b_lora.yaml"})
    with pytest.raises(ValidationError, match="runs names dora, which DiaBlo is not compared with here"):
        Headline(**keys, runs={"diablo": "a.yaml", "dora": "b.yaml"})


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"diablo": "patterns/diablo.yaml"}, "its suite is patterns; allowed: commonsense"),
        ({"dora": "commonsense/llama3-8b_dora.yaml"}, "its model is meta-llama/Meta-Llama-3-8B; allowed: .*llama-13b"),
        ({"dora": DIABLO}, "its method is diablo; allowed: dora"),
    ],
)
def test_a_headline_takes_runs_of_its_suite_model_and_methods(headlines, runs, message):
    question = headlines["commonsense-llama-13b"]
    wrong = question.model_copy(update={"runs": question.runs | runs})
    with pytest.raises(ResultsError, match=message):
        wrong.ask(evidence(collected({DIABLO: 0.9, DORA: 0.5})))
