import errno
import json
import subprocess
import sys

import pandas as pd
import pytest
import typer

from diablo_theory.cli import app
from diablo_theory.reporting.speeds import read_speeds
from diablo_theory.reporting.steps import read_steps

RUN = ["num_blocks=6", "steps=3", "batch_size=2", "warmup_steps=1", "eval_items=4", "device=cpu"]


@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands))
def test_help_teaches_with_an_example(shell, command):
    status, out, _ = shell(command, "--help")
    assert status == 0
    assert "Example" in out
    assert f"diablo-theory {command}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduc"], "reproduce"),
        (["reproduce", "--quik"], "--quick"),
        (["reproduce", "--quick", "--full"], "choose one of"),
        (["reproduce", "--quick", "stpes=3"], "unknown key 'stpes'. Did you mean 'steps'?"),
        (["verify", "L9"], "L9"),
        (["verify", "--trials", "0"], "greater than or equal to 1"),
        (["train", "lora.yml"], "no such file: lora.yml"),
        (["tune", "wordproblems"], "Did you mean 'word_problems'?"),
        (["tune", "word_problems", "--methods", "lorra"], "unknown method 'lorra'. Did you mean 'lora'?"),
        (["tune", "word_problems", "--grid", "1e-3;2"], "--grid must be comma-separated numbers"),
        (["reproduce", "--quick", "seed=3"], "seed cannot be set here"),
        (["tune", "word_problems", "train_on=docstrings"], "train_on cannot be set here: the search decides it"),
        (["report", "--out", "nowhere"], "nowhere holds no manifest.json"),
        (["figures", "--results", "nowhere"], "nowhere is no folder of saved results"),
        (["convert", "nowhere", "there", "--to", "diablo"], "no such file or folder: nowhere"),
        (["convert", ".", "there", "--to", "lora"], "--to lora needs --rank, and nothing else takes it"),
        (["convert", ".", "there", "--to", "chkpt", "--rank", "3"], "--to lora needs --rank, and nothing else takes"),
        (["convert", ".", ".", "--to", "diablo"], "TO must not exist, and . does"),
        (["convert", ".", "there", "--to", "lora", "--rank", "many"], "--rank: invalid literal for int"),
    ],
)
def test_bad_input_is_one_clear_message_and_harms_nothing(shell, tmp_path, arguments, message):
    status, _, err = shell(*arguments)
    assert status != 0
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert list(tmp_path.rglob("*.json")) == []


def test_verify_prints_verdicts_and_writes_them(shell, tmp_path):
    status, out, _ = shell("verify", "L2", "--trials", "1", "--out", "here")
    assert status == 0
    assert "control" in out
    assert pd.read_csv(tmp_path / "here" / "verdicts.csv")["passed"].all()
    assert {path.suffix for path in (tmp_path / "here").iterdir()} == {".csv", ".pdf", ".svg", ".png"}


def test_a_failing_verdict_is_a_failing_exit(shell, monkeypatch):
    from diablo_theory.theory import checks

    real = checks.run_checks

    def one_fails(*arguments, **options):
        verdicts = real(*arguments, **options)
        verdicts.loc[0, "passed"] = False
        return verdicts

    monkeypatch.setattr(checks, "run_checks", one_fails)
    assert shell("verify", "L2", "--trials", "1")[0] == 1


def test_train_then_train_again(shell, tmp_path, tiny_model):
    (tmp_path / "mine.yaml").write_text("method: lora\n")
    status, out, _ = shell("train", "mine.yaml", f"model={tiny_model}", *RUN)
    assert status == 0
    assert "LoRA r=" in out
    assert json.loads((tmp_path / f"results/runs/{tmp_path.name}/mine/metrics.json").read_text())["steps"] == 3
    assert shell("train", "mine.yaml", f"model={tiny_model}", *RUN)[1].splitlines()[-1] == out.splitlines()[-1]
    status, _, err = shell("train", "mine.yaml", f"model={tiny_model}", *RUN, "seed=5")
    assert status == 1
    assert "belongs to a run with seed=0, not 5" in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_blocks=5000", "num_blocks must be at most 36 for a 36 x 36 matrix, got 5000"),
        ("target_modules=[q_porj]", "Did you mean 'q_proj'?"),
        ("target_modules=[mlp]", "not a torch.nn.Linear"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_message_and_does_not_claim_the_folder(
    shell, tmp_path, tiny_model, override, message
):
    (tmp_path / "mine.yaml").write_text("method: diablo\n")
    status, _, err = shell("train", "mine.yaml", f"model={tiny_model}", *RUN, override)
    assert status == 1
    assert message in err
    assert "Traceback" not in err
    assert shell("train", "mine.yaml", f"model={tiny_model}", *RUN)[0] == 0


def test_tune_chooses_the_lowest_validation_loss_and_keeps_other_rows(shell, tmp_path, tiny_model):
    common = [f"model={tiny_model}", *RUN, "--grid", "1e-4,1e-2"]
    assert shell("tune", "word_problems", "--methods", "lora", *common)[0] == 0
    assert shell("tune", "word_problems", "--methods", "diablo", *common)[0] == 0
    rows = pd.read_csv(tmp_path / "results/default/learning_rates.csv")
    assert len(rows) == 4
    for _, group in rows.groupby("method"):
        assert group.loc[group["chosen"], "valid_loss"].tolist() == [group["valid_loss"].min()]
    config = json.loads((tmp_path / "results/default/tuning/word_problems-lora-0.01/config.json").read_text())
    assert config["eval_split"] == "validation"


def test_ctrl_c_says_how_to_go_on(shell, monkeypatch, tmp_path, tiny_model):
    from diablo_theory.finetune import runs

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train", stopped)
    (tmp_path / "mine.yaml").write_text("method: diablo\n")
    status, _, err = shell("train", "mine.yaml", f"model={tiny_model}", *RUN)
    assert status == 130
    assert "started again goes on from it" in err


def test_a_full_disk_is_one_message_and_loses_nothing(shell, monkeypatch, tmp_path, tiny_model):
    from diablo_theory import files

    (tmp_path / "mine.yaml").write_text("method: diablo\n")
    assert shell("train", "mine.yaml", f"model={tiny_model}", *RUN)[0] == 0
    first = tmp_path / "results"
    before = sorted((file, file.read_bytes()) for file in first.rglob("*") if file.is_file())

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "fsync", full)
    status, _, err = shell("train", "mine.yaml", f"model={tiny_model}", *RUN, "--out", "other")
    assert status == 1
    assert "No space left on device" in err
    assert "Traceback" not in err
    assert before == sorted((file, file.read_bytes()) for file in first.rglob("*") if file.is_file())
    assert not [file for file in (tmp_path / "other").iterdir() if file.name != ".lock"]


def test_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "diablo_theory", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0.1.0"


def test_map_writes_cells_and_figures_and_goes_on_where_it_was(shell, tmp_path):
    small = ["--size", "8", "--outputs", "8", "--rows", "12", "--ranks", "1,4", "--blocks", "1,2", "--out", "here"]
    status, out, _ = shell("map", *small, "--target", "low-rank", "--noises", "0,1")
    assert status == 0
    assert "inside" in out
    cells = pd.read_csv(tmp_path / "here/map.csv")
    assert len(cells) == 8
    assert (tmp_path / "here/map_leads.pdf").is_file()
    before = (tmp_path / "here/map.csv").read_bytes()
    assert shell("map", *small, "--target", "low-rank", "--noises", "0,1")[0] == 0
    assert (tmp_path / "here/map.csv").read_bytes() == before
    status, _, err = shell("map", *small)
    assert status == 1
    assert "a sweep over other tasks" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "0"], "ranks must lie from 1 to 64, got 0"),
        (["--ranks", "1.5"], "--ranks must be comma-separated whole numbers, got '1.5'"),
        (["--noises", "1,x"], "--noises must be comma-separated numbers, got '1,x'"),
        (["--blocks", "2,4,2"], "block_counts must not repeat a value, got (2, 4, 2)"),
        (["--target", "lowrank"], "unknown target 'lowrank'. Did you mean 'low-rank'?"),
        (["--noises", "0.1"], "noises must be 0 for target 'generic'"),
        (["--jobs", "2", "--cluster", "tcp://127.0.0.1:1"], "jobs must be left at 1 with a cluster"),
    ],
)
def test_options_of_a_map_that_do_not_fit_are_one_message(shell, tmp_path, options, message):
    status, _, err = shell("map", "--out", "here", *options)
    assert status == 1
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "here" / "map.csv").exists()


def test_verify_takes_a_precision_and_names_what_it_cannot_use(shell):
    assert shell("verify", "L2", "--trials", "1", "--dtype", "float32")[0] == 0
    assert "unknown dtype 'float16'" in shell("verify", "L2", "--dtype", "float16")[2]
    assert "device 'nowhere' cannot be used here" in shell("verify", "L2", "--device", "nowhere")[2]


@pytest.fixture
def small_diagnosis(tiny_model):
    """Options under which a diagnosis takes a second."""
    task = ["--task", "word_problems", "--items", "4", "--depths", "1"]
    return ["diagnose", "--model", str(tiny_model), *task]


def test_diagnose_prints_layers_and_writes_them(shell, tmp_path, small_diagnosis):
    status, out, _ = shell(*small_diagnosis, "--blocks", "6", "--out", "here")
    assert status == 0
    assert "0.q_proj" in out
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        *("layers.csv", "captures.csv", "statistics.safetensors", "captures.pdf", "captures.svg", "captures.png"),
        *("diagnose.json", "statistics.json"),
    }
    assert len(pd.read_csv(tmp_path / "here/layers.csv")) == 5
    assert json.loads((tmp_path / "here/diagnose.json").read_text())["blocks"] == 6
    assert json.loads((tmp_path / "here/statistics.json").read_text())["task"] == "word_problems"


def test_diagnose_goes_on_from_saved_statistics_without_the_model(shell, tmp_path, small_diagnosis, monkeypatch):
    from diablo_theory.finetune import models

    def forbidden(*arguments):
        raise AssertionError("the model is not needed")

    def table(folder, name):
        return pd.read_csv(tmp_path / folder / f"{name}.csv")

    assert shell(*small_diagnosis, "--blocks", "6", "--out", "first")[0] == 0
    monkeypatch.setattr(models, "load_model", forbidden)
    saved = ["diagnose", "--statistics", "first/statistics.safetensors"]
    assert shell(*saved, "--blocks", "6", "--out", "same")[0] == 0
    pd.testing.assert_frame_equal(table("same", "layers"), table("first", "layers"), check_exact=True)
    captures = table("first", "captures")
    expected = captures[~captures["start"].isin(["pissa", "corda"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(table("same", "captures"), expected, check_exact=True)
    assert not (tmp_path / "same" / "statistics.safetensors").exists()

    assert shell(*saved, "--blocks", "3", "--rtol", "0.1", "--out", "other")[0] == 0
    assert (table("other", "layers")["num_blocks"] == 3).all()
    assert (table("other", "layers")["rank"] < table("first", "layers")["rank"]).all()


def test_what_was_recorded_outlives_a_failure_after_it(shell, tmp_path, small_diagnosis, monkeypatch):
    from diablo_theory import diagnose

    def refuses(*arguments, **options):
        raise ValueError("something does not fit")

    monkeypatch.setattr(diagnose, "diagnose_layers", refuses)
    status, _, err = shell(*small_diagnosis, "--blocks", "6", "--out", "here")
    assert (status, err) == (1, "error: something does not fit\n")
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"statistics.safetensors", "statistics.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "37"], "--blocks: num_blocks must be at most 36 for a 36 x 36 matrix, got 37"),
        (["--blocks", "0"], "greater than or equal to 1"),
        (["--rtol", "2"], "--rtol: rtol must be at least sqrt(eps) = 1.49e-08 and below 1, got 2.0"),
        (["--rtol", "nan"], "--rtol: rtol must be at least sqrt(eps) = 1.49e-08 and below 1, got nan"),
        (["--task", "word_problem"], "unknown task 'word_problem'. Did you mean 'word_problems'?"),
        (["--modules", "q_proj,qproj"], "no linear layer of a numbered block is called 'qproj'"),
        (["--device", "nowhere"], "'nowhere' is not one of 'auto', 'cpu', 'cuda'"),
        (["--statistics", "a.safetensors"], "--model says what to record: leave it out with --statistics"),
    ],
)
def test_options_of_a_diagnosis_that_do_not_fit_are_refused_before_the_recording(
    shell, tmp_path, small_diagnosis, monkeypatch, options, message
):
    from diablo_theory import diagnose

    def forbidden(*arguments):
        raise AssertionError("nothing is to be recorded")

    monkeypatch.setattr(diagnose, "record_layers", forbidden)
    status, _, err = shell(*small_diagnosis, "--out", "here", "--blocks", "6", *options)
    assert status != 0
    assert message in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "here").exists()


def test_statistics_that_cannot_be_read_are_one_message(shell, tmp_path, small_diagnosis):
    assert shell(*small_diagnosis, "--blocks", "6", "--out", "here")[0] == 0
    path = tmp_path / "here" / "statistics.safetensors"
    saved = ["diagnose", "--statistics", path]
    assert "--blocks: num_blocks must be at most 36" in shell(*saved, "--blocks", "37")[2]
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is truncated or damaged" in shell(*saved)[2]
    assert "is truncated or damaged" in shell("diagnose", "--statistics", "here/layers.csv")[2]
    status, _, err = shell("diagnose", "--statistics", "nothing.safetensors")
    assert status == 1
    assert "no such statistics file: nothing.safetensors" in err


@pytest.mark.parametrize("command", [["verify", "L2"], ["speed", "layer"], ["diagnose"]])
def test_an_out_that_is_a_file_is_refused_before_the_work(shell, tmp_path, command):
    (tmp_path / "taken").write_text("")
    status, out, err = shell(*command, "--out", "taken")
    assert (status, out) == (1, "")
    assert err == "error: --out must be a folder, got the file taken\n"


def test_speed_measures_a_small_layer(shell, tmp_path):
    status, out, _ = shell("speed", "layer", "--width", "128", "--tokens", "4096", "--out", "here")
    assert status == 0
    assert "peak memory" in out
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"layer.csv"}
    assert set(read_speeds(tmp_path / "here")["benchmark"]) == {"layer"}
    assert "unknown benchmark 'layers'. Did you mean 'layer'?" in shell("speed", "layers")[2]
    assert (
        "tokens must be a multiple of batch = 2048, at least 4096, got 5000" in shell("speed", "--tokens", "5000")[2]
    )


def test_bench_writes_what_figures_and_report_read(shell, tmp_path):
    options = "--shape 16x24 --batch 1 --length 8 --methods diablo,lora --blocks 4 --rounds 6 --device cpu"
    status, out, _ = shell("bench", *options.split(), "--out", tmp_path)
    assert status == 0
    assert "steps.pdf" in out
    _, contenders = read_steps(tmp_path)
    assert set(contenders["name"]) == {"floor", "diablo", "lora"}
    assert set(contenders["dtype"]) == {"float32"}
    assert {path.name for path in tmp_path.glob("steps.*")} == {"steps.pdf", "steps.svg", "steps.png"}


def test_convert_there_and_back(shell, tmp_path, tiny_model):
    import torch
    from peft import PeftConfig, ShiraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from diablo_theory.tuner import DiaBloConfig

    def trained(config):
        return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)

    targets = ["q_proj", "down_proj"]
    model = trained(DiaBloConfig(num_blocks=5, target_modules=targets, init_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained("diablo")
    common = ["--model", tiny_model]
    assert shell("convert", "diablo", "a.chkpt", "--to", "chkpt", *common)[0] == 0
    assert shell("convert", "a.chkpt", "again", "--to", "diablo", *common)[0] == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "diablo" / weights).read_bytes()
    assert set(PeftConfig.from_pretrained("again").target_modules) <= {
        name for name, _ in model.base_model.model.named_modules()
    }
    status, out, _ = shell("convert", "a.chkpt", "lora", "--to", "lora", "--rank", "0.5", *common)
    assert status == 0
    assert "energy_kept" in out
    assert out.count("layers.") == 4
    assert PeftConfig.from_pretrained("lora").peft_type == "LORA"

    def half(base_layer, r, **_):
        mask = torch.zeros_like(base_layer.weight)
        rows, cols = mask.shape
        mask[: rows // 2, : cols // 2] = (torch.arange(rows // 2 * (cols // 2)) < r * (rows + cols)).view(
            rows // 2, -1
        )
        return mask

    config = ShiraConfig(r=2, target_modules=["q_proj"], init_weights=False)
    config.mask_fn = half
    trained(config).save_pretrained("shira")
    status, out, err = shell("convert", "shira", "b.chkpt", "--to", "chkpt", *common)
    assert status == 0, err
    trained(ShiraConfig(r=2, target_modules=["q_proj"], init_weights=False)).save_pretrained("random")
    status, _, err = shell("convert", "random", "c.chkpt", "--to", "chkpt", *common)
    assert status == 1
    assert "is no DiaBlo adapter" in err
    assert not (tmp_path / "c.chkpt").exists()


def test_convert_refuses_what_it_cannot_read_and_needs_no_tokenizer(shell, tmp_path, tiny_model):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from diablo_theory.tuner import DiaBloConfig

    def saved(config, name):
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(name)

    saved(LoraConfig(r=2, target_modules=["q_proj"]), "lora")
    for target in ("diablo", "chkpt"):
        status, _, err = shell("convert", "lora", "there", "--to", target, "--model", tiny_model)
        assert status == 1
        assert "lora holds a LORA adapter: FROM must be a DiaBlo or SHiRA adapter" in " ".join(err.split())
    (tmp_path / "empty").mkdir()
    status, _, err = shell("convert", "empty", "there", "--to", "chkpt", "--model", tiny_model)
    assert status == 1
    assert "empty has no adapter_config.json" in err
    saved(DiaBloConfig(num_blocks=5, target_modules=["q_proj"]), "diablo")
    LlamaForCausalLM(
        LlamaConfig(hidden_size=24, intermediate_size=20, num_attention_heads=2, num_hidden_layers=2, vocab_size=8)
    ).save_pretrained("other")
    status, _, err = shell("convert", "diablo", "there", "--to", "chkpt", "--model", "other")
    assert status == 1
    assert "diablo does not fit --model other: Error(s) in loading state_dict" in " ".join(err.split())
    assert not (tmp_path / "there").exists()
    # without a tokenizer, and without --model: the adapter's folder names its base
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained("bare")
    saved_from = get_peft_model(AutoModelForCausalLM.from_pretrained("bare"), DiaBloConfig(num_blocks=5))
    saved_from.save_pretrained("mine")
    assert shell("convert", "mine", "there.chkpt", "--to", "chkpt")[0] == 0


def test_what_descend_and_diagnose_write_is_what_figures_draw(shell, tmp_path, small_diagnosis):
    status, out, _ = shell("descend", "--iterations", "12", "--out", "saved/descent")
    assert status == 0
    assert shell(*small_diagnosis, "--blocks", "6", "--out", "saved/diagnosis")[0] == 0
    made = json.loads((tmp_path / "saved/descent/provenance.json").read_text())
    assert (made["seed"], made["iterations"]) == (0, 12)
    status, out, _ = shell("figures", "--results", "saved", "--out", "drawn")
    assert status == 0
    stems = {"method", "convergence", "certificates", "captures"}
    assert {path.stem for path in (tmp_path / "drawn").glob("*.*")} == stems
    assert {path.stem for path in (tmp_path / "drawn/column").iterdir()} == stems
    assert "wrote drawn/convergence.svg" in out
    assert "skipped steps: `diablo-theory bench --out paper_results/steps` produces" in out
