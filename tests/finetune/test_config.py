import itertools
from collections import Counter
from pathlib import Path

import pytest
import yaml

from diablo_theory.errors import ConfigError
from diablo_theory.files import experiments_folder
from diablo_theory.finetune import planning
from diablo_theory.finetune.config import RunConfig, load_run, parse_overrides, resolve
from diablo_theory.finetune.planning import Device
from diablo_theory.finetune.sweep import planned, read_sweep
from diablo_theory.reproduce import load_profile, planned_runs

#: Folder to its number of run files: one that is lost or left over is noticed.
SUITES = {
    "word_problems": 7,
    "docstrings": 4,
    "arc_easy": 7,
    "boolq": 7,
    "commonsense": 12,
    "arithmetic": 7,
    "code": 3,
    "safety": 3,
    "quantised": 17,
    "patterns": 8,
    "efficiency": 4,
    "gradients": 2,
    "blocks": 1,
    "learning_rate": 2,
}
#: Tasks that have run files of their own, one a method.
SMALL = ("word_problems", "docstrings", "arc_easy", "boolq")


def run_files():
    files = experiments_folder().rglob("*.yaml")
    return [file for file in files if file.parent != experiments_folder() and file.parent.name != "sweeps"]


def test_every_run_file_loads_and_all_are_there():
    files = run_files()
    assert Counter(file.parent.name for file in files) == SUITES
    for file in files:
        config = load_run(file)
        assert config.suite == file.parent.name
        assert config.scale == ("small" if config.suite in SMALL else "full")
        if config.suite in SMALL:
            assert (config.train_on, config.evaluate_on, config.method) == (config.suite, (config.suite,), file.stem)


def test_every_run_file_becomes_small():
    for file in run_files():
        config = load_run(file, scale="small")
        assert (config.scale, config.model, config.epochs) == ("small", "SmolLM2-135M-Instruct", None)


#: What two cores reach with SmolLM2-135M: a step of 900 tokens in 3.5 s, and its weights nine times a second.
TWO_CORES = Device("two cores", 16e9, 5e9, {"float32": 0.18e12}, (1, 1), (1, 1), foreach=False, source="measured")
#: Tasks whose length only the data tell are planned as the set that is made of their kind.
LIKE = {"boolq": "commonsense_170k", "arc_easy": "commonsense_170k"}


def test_small_runs_take_minutes_and_those_with_programs_half_an_hour():
    minutes = {}
    for file in run_files():
        config = load_run(file, scale="small")
        config = config.model_copy(update={"train_on": LIKE.get(config.train_on, config.train_on)})
        found = planning.plan(planning.work_of(config), TWO_CORES)
        minutes[file.parent.name, file.stem] = (found.train_seconds_high + found.eval_seconds_high) / 60
    assert {suite for (suite, _), time in minutes.items() if time > 16} == {"code"}
    assert max(minutes.values()) < 40


def test_full_run_files_say_what_they_need_as_it_is_computed_now():
    for file in run_files():
        config = load_run(file)
        if config.scale == "full":
            wanted = planning.header(planning.plan(planning.work_of(config), "A100-80GB"))
            command = f"diablo-theory plan {file.relative_to(experiments_folder().parent)} --header"
            assert file.read_text().startswith(f"{wanted}\n"), f"not current; `{command}` gives it"
            assert "(fits: yes)" in wanted or "(fits: barely)" in wanted, file


#: What makes a recipe, beside the method and how it is set.
RECIPE = (
    "epochs",
    "steps",
    "batch_size",
    "drop_last",
    "loss_on",
    "protocol",
    "schedule",
    "warmup_steps",
    "max_length",
)
RECIPE += ("dtype", "adapter_dtype", "weight_decay", "train_on", "evaluate_on")


def recipe(config):
    return {key: getattr(config, key) for key in RECIPE}


def test_commonsense_baselines_train_and_score_as_their_own_authors_do():
    for file in (experiments_folder() / "commonsense").glob("*.yaml"):
        config = load_run(file)
        theirs = config.method in ("lora", "dora", "pissa")
        expected = ("llm_adapters", "everything", False) if theirs else ("paper", "answer", True)
        assert (config.protocol, config.loss_on, config.drop_last) == expected, file


def test_metamath_baselines_leave_nothing_out():
    found = {file.stem: load_run(file) for file in (experiments_folder() / "arithmetic").glob("llama2-7b_*.yaml")}
    assert {name: config.drop_last for name, config in found.items()} == {
        name: config.method == "diablo" for name, config in found.items()
    }


@pytest.mark.parametrize("suite", ["blocks", "learning_rate", "patterns"])
def test_suites_on_gsm8k_train_as_the_authors_script_but_for_dropout(suite):
    script = load_run(experiments_folder() / "arithmetic" / "gsm8k_llama2-7b_diablo.yaml")
    assert script.dropout == 0.05
    for file in (experiments_folder() / suite).glob("*.yaml"):
        config = load_run(file)
        assert recipe(config) == recipe(script)
        assert config.dropout == 0
        assert "no-dropout" in file.read_text()


def test_lora_on_gsm8k_differs_from_the_authors_script_in_the_method_alone():
    folder = experiments_folder() / "arithmetic"
    diablo, lora = (load_run(folder / f"gsm8k_llama2-7b_{method}.yaml") for method in ("diablo", "lora"))
    differing = {key for key, value in lora.model_dump().items() if value != getattr(diablo, key)}
    assert differing == {"method", "rank", "alpha", "learning_rate"}


def test_seeds_compare_equal_recipes():
    runs = [run.config for run in planned(read_sweep(experiments_folder() / "sweeps" / "seeds.yaml"))]
    assert {config.method for config in runs} == {"diablo", "lora"}
    assert all(recipe(config) == recipe(runs[0]) for config in runs)
    assert {config.dropout for config in runs} == {0.05}
    assert recipe(runs[0]) == recipe(load_run(experiments_folder() / "arithmetic" / "gsm8k_llama2-7b_diablo.yaml"))


def test_searched_rates_are_those_of_the_search_and_edges_are_said():
    runs = planned(read_sweep(experiments_folder() / "sweeps" / "small_tuning.yaml"))
    grids = {}
    for run in runs:
        assert run.config.eval_split == "validation"
        grids.setdefault((run.config.suite, run.config.method), set()).add(run.config.learning_rate)
    sizes = {method: len(grid) for (suite, method), grid in grids.items() if suite == "boolq"}
    assert sizes == {"diablo": 5, "lora": 3, "lora-fa": 3, "full": 3, "dora": 2, "miss": 2}  # as README says
    words = [("word_problems", method) for method in ("dora", "lora-fa", "miss")]
    for suite, method in [*words, *(cell for cell in grids if cell[0] == "boolq")]:
        file, grid = experiments_folder() / suite / f"{method}.yaml", grids[suite, method]
        rate, text = load_run(file).learning_rate, " ".join(file.read_text().replace("#", "").split())
        assert rate in grid
        assert "`diablo-theory sweep experiments/sweeps/small_tuning.yaml` repeats" in text
        assert ("The best is at the edge" in text) is (rate in (min(grid), max(grid)))


def test_magr_and_the_quantiser_part_for_both_methods():
    configs = [load_run(file) for file in (experiments_folder() / "quantised").glob("*.yaml")]
    cells = Counter((config.method, config.quantise.method, config.quantise.bits) for config in configs)
    grid = set(itertools.product(("diablo", "lora"), ("rtn", "magr-rtn", "optq", "magr-optq"), (2, 4)))
    assert set(cells) == grid | {("diablo", "torchao-int4", 4)}
    assert set(cells.values()) == {1}


def test_run_files_cite_nothing_that_is_not_here():
    for file in run_files():
        assert "section" not in file.read_text(), file


def test_defaults_name_every_key_and_nothing_else():
    defaults = yaml.safe_load((experiments_folder() / "defaults.yaml").read_text())
    assert defaults.keys() == RunConfig.model_fields.keys()


@pytest.mark.parametrize("name", ["quick", "default", "full"])
def test_every_profile_plans_the_same_work_for_every_method(name):
    planned = planned_runs(load_profile(name), {})
    free = {"method", "learning_rate", "keep_weights", "seed"}
    shared = {tuple((k, v) for k, v in c.model_dump().items() if k not in free) for c in planned.values()}
    assert len(shared) == len({config.train_on for config in planned.values()})
    assert all(config.eval_items >= (100 if name == "quick" else 200) for config in planned.values())
    assert all(config.eval_split == "test" for config in planned.values())


def test_unknown_profile_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no profile 'qick'.*Did you mean 'quick'"):
        load_profile("qick")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_block=3", "unknown key 'num_block'. Did you mean 'num_blocks'"),
        ("num_blocks=0", "num_blocks=0 is not allowed: Input should be greater than or equal to 1"),
        ("num_blocks=2.5", "num_blocks=2.5 is not allowed"),
        ("learning_rate=.nan", "learning_rate=nan is not allowed"),
        ("learning_rate=-1", "learning_rate=-1 is not allowed"),
        ("method=lra", "method='lra' is not allowed: Input should be 'none', 'full', 'diablo', .*'lora'"),
        ("quantise.bits=3", "quantise.bits: there is no quantise here that has parts; set quantise itself"),
        ("quantize.bits=3", "unknown key 'quantize'. Did you mean 'quantise'"),
        ("steps", "an override must read key=value, got 'steps'"),
        ("epochs=1e300", "epochs='1e300' is not allowed: Input should be less than or equal to 1000000"),
        ("steps=[", "steps: '\\[' is not a YAML value"),
        ("seed=2024-13-45", "seed: '2024-13-45' is not a YAML value: ValueError: month must be in 1..12"),
        ("seed=!!int x", "seed: '!!int x' is not a YAML value: ValueError: invalid literal for int"),
        ("drop_last=!!bool x", "drop_last: '!!bool x' is not a YAML value: KeyError: 'x'"),
        ("quantise={bits: 3, bits: 4}", r"the key 'bits' stands twice \(line 1, column 11\)"),
        ("quantise={method: rtn}", "quantise.bits is missing"),
        ("quantise={method: rtn, bits: 4, bit: 3}", "unknown key 'quantise.bit'. Did you mean 'quantise.bits'"),
        ("quantise={method: rtn, bit: 3}", "unknown key 'quantise.bit'. Did you mean 'quantise.bits'"),
        ("quantise={method: rtn, bits: 4, xyz: 3}", r"unknown key 'quantise.xyz'. Known: alpha, bits, .*sweeps\.$"),
        ("drop_last=true", "protocol: clean trains on every example: set drop_last=false, or another protocol"),
        ("learning_rate=yes", "learning_rate=True is not allowed: Input should not be true or false"),
        ("seed=false", "seed=False is not allowed: Input should not be true or false"),
        ("evaluate_on=gsm8k", "evaluate_on='gsm8k' is not allowed: Input should be a valid list"),
        ("target_modules=[]", "target_modules=.. is not allowed: List should have at least 1 item"),
    ],
)
def test_bad_overrides_say_what_is_allowed(override, message):
    with pytest.raises(ConfigError, match=message):
        resolve(parse_overrides([override]))


def test_a_file_that_drops_batches_becomes_clean_with_both_keys():
    file = experiments_folder() / "arithmetic" / "gsm8k_llama2-7b_diablo.yaml"
    with pytest.raises(ConfigError, match="set drop_last=false"):
        load_run(file, ["protocol=clean"])
    assert not load_run(file, ["protocol=clean", "drop_last=false"]).drop_last


def test_yaml_reads_exponents_without_a_dot_as_text_but_they_count_as_numbers():
    assert resolve(parse_overrides(["learning_rate=3e-4"])).learning_rate == 3e-4


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file: .*lor.yaml. Did you mean '.*lora.yaml'"):
        load_run(experiments_folder() / "word_problems" / "lor.yaml")
    with pytest.raises(ConfigError, match=r"Did you mean '/.*/experiments/word_problems/lora.yaml'"):
        load_run(experiments_folder() / "wordproblems" / "lora.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("steps: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_run(broken)
    broken.write_text("- steps")
    with pytest.raises(ConfigError, match="must hold keys and values, got list"):
        load_run(broken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"steps: 3\nwarmup_steps: 0\nsteps: 4\n",
            r"not valid YAML: the key 'steps' stands twice \(line 3, column 1\)",
        ),
        (b"steps: 3\n\tseed: 1\n", r"not valid YAML: found character '\\t' that cannot start any token \(line 2"),
        (b"method: lora # \xff\n", "not valid YAML: 'utf-8' codec can't decode byte 0xff"),
        (b"method: lora\x00\n", "not valid YAML: unacceptable character #x0000"),
        (b"model: " + b"[" * 3000, "not valid YAML: RecursionError"),
        (b"on: 3\n", "keys must be names, got True"),
        (b"1: 2\n", "keys must be names, got 1"),
        (b"", "must hold keys and values, got NoneType"),
        (b"part:\n  - files: [a.yaml]\n", "run.yaml: unknown key 'part'. Did you mean 'parts'"),
        (b"parts:\n  - files: [a.yaml]\n", "run.yaml is a sweep file .* `diablo-theory sweep` runs it"),
    ],
)
def test_what_is_no_run_file_is_one_line_that_names_it(tmp_path, text, message):
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=message) as refused:
        load_run(tmp_path / "run.yaml")
    assert str(refused.value).startswith(str(tmp_path / "run.yaml"))
    assert "\n" not in str(refused.value)


def test_a_folder_is_no_run_file_and_an_empty_one_has_none_to_name(tmp_path):
    with pytest.raises(ConfigError, match="is a folder: name a file in it"):
        load_run(tmp_path)
    with pytest.raises(ConfigError, match=r"no such file: .*lora\.yaml\.$"):
        load_run(tmp_path / "lora.yaml")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("experiments/wordproblems/lora.yaml", "experiments/word_problems/lora.yaml"),
        ("experiments/word_problems/lor.yaml", "experiments/word_problems/lora.yaml"),
        ("wordproblems/lora.yaml", "word_problems/lora.yaml"),
    ],
)
def test_a_wrong_folder_is_told_from_wherever_one_stands(tmp_path, monkeypatch, wrong, right):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"no such file: {wrong}. Did you mean '{right}'"):
        load_run(Path(wrong))
    assert load_run(Path(right)).suite == "word_problems"


def test_anchors_and_merged_keys_are_no_repetition(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "<<: &few {steps: 9, seed: 1}\nseed: 2\nlearning_rate: &rate 0.5\nalpha: *rate\n"
    )
    config = load_run(tmp_path / "run.yaml")
    assert (config.steps, config.seed, config.learning_rate, config.alpha) == (9, 2, 0.5, 0.5)
