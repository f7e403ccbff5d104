"""Sections of collected suites, from outcomes that are made up."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.comparisons import _base
from diablo_theory.reporting.drawing import base_names
from diablo_theory.reporting.style import save
from diablo_theory.reporting.suite_plots import methods, settings
from diablo_theory.reporting.suite_tables import (
    COSTS,
    LESS,
    build_sections,
    readable_section,
    readable_sections,
    summary,
    title,
)
from diablo_theory.reporting.suites import Suites

BASE = {"train_on": "word_problems", "num_blocks": 64, "learning_rate": 1e-2, "quantise": None, "dtype": "float32"}
BASE |= {"eval_split": "test", "evaluate_on": '["word_problems"]'}
MADE = {"state": "finished", "trainable_params": 1_000, "model_sha256": "ab", "train_data": "cd", "conditions": "{}"}
MADE |= {"train_seconds": 60.0, "device": "cpu", "cpu": "any", "commit": "abc", "dirty": False, "date": "2026-01-02"}
FOUR = json.dumps({"method": "rtn", "bits": 4})
RUNS = [  # suite, method, label, what differs
    ("word_problems", "none", "Untouched model", {}),
    ("word_problems", "diablo", "DiaBlo N=64", {}),
    ("word_problems", "lora", "LoRA r=5", {"learning_rate": 3e-3}),
    ("boolq", "lora", "LoRA r=5", {"train_on": "boolq", "learning_rate": 3e-3}),
    ("blocks", "diablo", "DiaBlo N=8", {"num_blocks": 8}),
    ("patterns", "random-rows", "Random rows", {}),
    ("learning_rate", "diablo", "DiaBlo N=64", {"learning_rate": 1e-3}),
    ("learning_rate", "lora", "LoRA r=5", {"learning_rate": 1e-3}),
    ("quantised", "diablo", "DiaBlo N=64", {"quantise": FOUR}),
    ("quantised", "lora", "LoRA r=5", {"quantise": FOUR, "learning_rate": 3e-3}),
]
SHARE = {"none": 0.1, "diablo": 0.6, "lora": 0.5, "random-rows": 0.3}


def made_up(runs=RUNS, seeds=(0, 1)) -> Suites:
    rng = np.random.default_rng(0)
    configs, outcomes = [], []
    for suite, method, label, differs in runs:
        for seed in seeds if method != "none" else seeds[:1]:
            run_id = f"{suite}/{method}-{'-'.join(map(str, differs.values()))}-seed={seed}"
            config = {"run_id": run_id, "suite": suite, "model": "small", "method": method, "seed": seed} | BASE
            task = differs.get("train_on", "word_problems")
            data = json.dumps({"train": "cd", task: f"{task}'s"})
            configs.append(config | {"scale": "small"} | differs | {"label": label} | MADE | {"data": data})
            items = pd.DataFrame({"item": range(20), "tokens": 2})
            items["cluster"] = items["prompt"] = items["answer"] = items["item"].astype(str)
            items["exact"] = (rng.random(20) < SHARE[method]).astype(float)
            items["loss_sum"] = 2 - SHARE[method] + rng.random(20)
            if task == "boolq":
                items["likelihood"] = items["exact"]
            outcomes.append(items.assign(run_id=run_id, task=task, seed=seed, label=label))
    frame = pd.DataFrame(configs)
    rows = frame[["run_id"]].assign(setting=frame["label"])
    return Suites(rows, frame, pd.concat(outcomes, ignore_index=True), pd.DataFrame({"run_id": frame["run_id"]}))


@pytest.fixture(scope="module")
def sections():
    return build_sections(made_up())


def test_every_suite_lands_in_its_section_with_what_it_is_compared_with(sections):
    assert {name: list(frame["label"]) for name, frame in sections.items()} == {
        "methods": ["Untouched model", "DiaBlo N=64", "LoRA r=5", "LoRA r=5"],
        "blocks": ["DiaBlo N=8", "DiaBlo N=64"],
        "patterns": ["DiaBlo N=64", "Random rows"],
        "bases": ["DiaBlo N=64", "LoRA r=5"] * 2,
        "learning_rates": ["DiaBlo N=64"] * 2 + ["LoRA r=5"] * 2,
    }


def test_differences_are_to_diablo_on_the_same_base(sections):
    bases = sections["bases"].set_index(["base", "method"])
    for base in ("float32", "4 bits, rtn"):
        gap = bases.loc[(base, "lora"), "exact_match"] - bases.loc[(base, "diablo"), "exact_match"]
        assert bases.loc[(base, "lora"), "exact_match_less"] == pytest.approx(gap)
        assert np.isnan(bases.loc[(base, "diablo"), "exact_match_less"])


def test_bases_of_other_groups_have_other_names():
    assert _base('{"method": "rtn", "bits": 4, "group_size": 64}', "float32") == "4 bits, rtn, groups of 64"
    assert _base('{"method": "rtn", "bits": 4, "group_size": null}', "float32") == "4 bits, rtn"


def test_words(sections):
    words = {name: readable_section(frame) for name, frame in sections.items()}
    table = words["methods"].set_index(["Task", "Method"])
    assert table.loc[("Word problems", "Untouched model"), "Learning rate"] == "—"
    assert table.loc[("Word problems", "DiaBlo N=64"), LESS["exact_match"][0]] == "—"
    for metric in ("exact_match", "loss_per_token"):
        assert re.fullmatch(
            r"[+−][\d.]+ \([+−][\d.]+ to [+−][\d.]+\)", table.loc[("Word problems", "LoRA r=5"), LESS[metric][0]]
        )
    assert not {heading for heading, _ in COSTS.values()} & set(table)
    assert table.loc[("BoolQ", "LoRA r=5"), "By likelihood, %"] != "—"
    assert "By likelihood, %" not in words["patterns"]
    assert list(words["bases"]["Base"]) == ["float32"] * 2 + ["4 bits, rtn"] * 2


def test_a_section_without_runs_is_left_out():
    found = build_sections(made_up(RUNS[:3]))
    assert list(found) == ["methods"]


def test_a_suite_of_no_section_is_one_of_its_own():
    runs = [("commonsense", *run[1:]) for run in RUNS[1:3]]
    found = build_sections(made_up(runs))
    assert list(found) == ["commonsense"]
    assert title("commonsense") == "Commonsense"
    assert LESS["exact_match"][0] in readable_section(found["commonsense"])


def altered(which, **changes):
    """The made-up suites with some columns of the runs of this name changed."""
    suites = made_up()
    chosen = suites.configs["run_id"].str.startswith(which)
    assert chosen.any()
    for column, value in changes.items():
        suites.configs.loc[chosen, column] = value
    if changes.get("state") == "diverged":
        gone = suites.outcomes["run_id"].isin(suites.configs.loc[chosen, "run_id"])
        return replace(suites, outcomes=suites.outcomes[~gone])
    return suites


def test_seeds_that_diverged_are_not_forgotten():
    one = build_sections(altered("learning_rate/lora-0.001-seed=1", state="diverged"))["learning_rates"]
    assert readable_section(one).iloc[2]["Seeds"] == "1 of 2, others diverged"
    both = build_sections(altered("learning_rate/lora-0.001", state="diverged"))
    row = readable_section(both["learning_rates"]).iloc[2]
    assert (row["Held-out loss, nats/token"], row["Seeds"]) == ("—", "0 of 2, all diverged")
    settings(both, "")


def test_validation_scores_are_in_no_table():
    assert "patterns" not in build_sections(altered("patterns/", eval_split="validation"))


@pytest.mark.parametrize(
    ("which", "changes", "message"),
    [
        (
            "word_problems/lora-0.003-seed=1",
            {"train_data": "other"},
            "of seed 1 were not trained on the same examples",
        ),
        ("blocks/diablo-8-seed=1", {"conditions": "{a: b}"}, "seed=0 and .*seed=1 were scored under different"),
        (
            "word_problems/lora-0.003-seed=1",
            {"data": '{"word_problems": "other"}'},
            "word_problems/none--seed=0 and word_problems/lora-0.003-seed=1 were not scored on the same problems",
        ),
        (
            "blocks/diablo-8-seed=1",
            {"seed": 0},
            r"blocks/diablo-8-seed=0 and blocks/diablo-8-seed=1 are the same experiment with the same seed \(word_pro",
        ),
        (
            "blocks/diablo-8-seed=1",
            {"seed": 0, "state": "diverged"},
            "seed=0 and .*seed=1 are the same experiment with the same seed",
        ),
    ],
)
def test_what_is_not_one_experiment_is_refused(which, changes, message):
    with pytest.raises(ResultsError, match=message):
        build_sections(altered(which, **changes))


def test_the_words_say_what_every_number_is():
    text = readable_sections(made_up())
    assert "95% intervals over problems and seeds" in text
    assert f"{len(made_up().configs)} runs at small scale" in text
    assert "| Scale" not in text


def test_runs_of_both_scales_are_told_apart():
    text = readable_sections(altered("blocks/", scale="full"))
    assert "| Scale" in text.split("**Number of blocks**")[1].split("\n")[2]
    assert "at full and small scale" in text


def test_without_test_scores_there_is_no_table_and_words_say_why():
    suites = made_up()
    suites.configs["eval_split"] = "validation"
    assert build_sections(suites) == {}
    assert readable_sections(suites).startswith("No run here was scored on test problems, so there is no table.")


def test_another_base_of_the_same_name_is_another_experiment():
    found = build_sections(altered("word_problems/lora", model_sha256="other"))["methods"]
    assert np.isnan(found.set_index("method").loc["lora", "exact_match_less"].iloc[0])


def test_the_untouched_model_is_compared_with_every_seed(sections):
    found = sections["methods"].set_index("method")
    gap = found.loc["none", "exact_match"] - found.loc["diablo", "exact_match"]
    assert found.loc["none", "exact_match_less"] == pytest.approx(gap)


def test_figures_are_drawn_twice_alike(sections, tmp_path):
    for name, draw in (
        ("methods", lambda: methods(sections["methods"], "")),
        ("settings", lambda: settings(sections, "")),
    ):
        one, two = (save(draw(), tmp_path / folder, name) for folder in ("one", "two"))
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_method_that_collapsed_leaves_the_others_legible():
    suites = made_up()
    gone = suites.outcomes["run_id"].str.startswith("word_problems/lora-0.003-seed=1")
    suites.outcomes.loc[gone, "loss_sum"] *= 50
    sections = build_sections(suites)
    figure = methods(sections["methods"], "")
    low, high = figure.axes[1].get_xlim()
    found = sections["methods"].set_index(["task", "method"])
    other, lost = (found.loc[("word_problems", method), "loss_per_token"] for method in ("diablo", "lora"))
    assert low < other < high < lost
    assert high - low < 2 * other
    for drawn in (figure, settings(sections, "")):  # among the bases too
        assert {f"{lost:.3f}", "→"} <= set(texts(drawn))


def test_figures_say_what_the_bars_are_and_which_seeds_are_missing():
    sections = build_sections(altered("learning_rate/lora-0.001-seed=1", state="diverged"))
    foot = settings(sections, "The scale.").get_supxlabel().replace("\n", " ")
    assert foot.startswith(
        "Bars: 95% intervals over problems and seeds (of one seed: over problems alone). Seeds that "
    )
    assert "Seeds that diverged: LoRA r=5 on Word problems at rate 0.001, 1 of 2. Learning rate: 20 problems, " in foot
    assert "1 to 2 seeds; number of blocks, patterns, bases: 20 problems, 2 seeds. " in foot
    assert foot.endswith("The scale.")
    foot = methods(sections["methods"], "").get_supxlabel().replace("\n", " ")
    assert foot == (
        "Bars: 95% intervals over problems and seeds. Axes of losses differ by task and do not start at zero."
    )


def test_figures_say_that_all_panels_have_the_same_seeds(sections):
    foot = settings(sections, "").get_supxlabel().replace("\n", " ")
    assert "Everywhere 20 problems, 2 seeds." in foot


def test_bases_are_named_without_what_they_share():
    names = base_names(["float32", "4 bits, rtn, groups of 64", "4 bits, magr-optq, groups of 64"])
    assert names == (["float32", "rounding to nearest", "MagR with OPTQ"], "4 bits, groups of 64")
    assert base_names(["float32", "4 bits, rtn"]) == (["float32", "4 bits, rounding to nearest"], "")
    assert base_names(["float32"]) == (["float32"], "")


def test_every_panel_of_settings_names_its_one_task(sections):
    titles = [axes.get_title(loc="left") for axes in settings(sections, "").axes]
    assert titles == [f"{what}, word problems" for what in ("Learning rate", "Number of blocks", "Patterns", "Bases")]
    more = pd.concat([sections["blocks"], sections["methods"].tail(1).assign(task="boolq")], ignore_index=True)
    figure = settings({"blocks": more}, "The scale.")
    assert figure.axes[0].get_title(loc="left") == "Number of blocks, word problems"
    foot = figure.get_supxlabel().replace("\n", " ")
    assert "The scale. In the tables alone: BoolQ (number of blocks, small, small scale)." in foot


def test_the_summary_says_when_and_where():
    suites = made_up()
    assert "h of training 2026-01-02 on cpu (any); commit abc." in summary(suites)
    suites.configs.loc[0, "date"] = "2026-01-05"
    assert "h of training 2026-01-02 to 2026-01-05 on cpu" in summary(suites)
    assert "h of training on cpu" in summary(replace(suites, configs=suites.configs.assign(date=None)))
