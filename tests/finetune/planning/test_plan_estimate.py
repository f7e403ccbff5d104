import dataclasses
import re

import pytest
from llamas import TINY, Case, work_on

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.planning import DEVICES, duration, header, plan
from diablo_theory.finetune.planning.devices import measured_cpu
from diablo_theory.finetune.planning.work import Scored


@pytest.fixture(scope="module")
def commonsense():
    scored = (Scored(items=22_419, new_tokens=100),)
    work = work_on("commonsense_170k", "LLaMA3-8B", epochs=3, micro_batch=4, drop_last=True, scored=scored)
    return plan(work, "A100-80GB")


def test_the_numbers_belong_together(commonsense):
    assert commonsense.steps == 3 * 10_651
    assert commonsense.run_flops == commonsense.steps * commonsense.flops.total_flops
    assert commonsense.trained_tokens == pytest.approx(3 * 170_420 * 137 * 1.4, rel=1e-4)
    assert commonsense.train_seconds_low == pytest.approx(commonsense.run_flops / (0.5 * 312e12))
    assert commonsense.train_seconds_high == pytest.approx(commonsense.run_flops / (0.3 * 312e12))
    assert 0 < commonsense.eval_seconds_low < commonsense.eval_seconds_high
    assert commonsense.peak_gib == commonsense.memory.peak_bytes / 2**30


def test_devices_share_the_work():
    one, eight = (plan(work_on("gsm8k", "LLaMA2-7B", devices=n, batch_size=32), "H100") for n in (1, 8))
    assert eight.train_seconds_high == pytest.approx(one.train_seconds_high / 8)
    assert eight.eval_seconds_high == one.eval_seconds_high


def test_whether_it_fits_allows_for_the_error(commonsense):
    def on(gib):
        return dataclasses.replace(commonsense, device=dataclasses.replace(DEVICES["L40"], memory_bytes=gib * 2**30))

    needs = commonsense.peak_gib
    assert [on(needs * factor).fits for factor in (0.99, 1.01, 1.14, 1.16)] == ["no", "barely", "barely", "yes"]
    assert commonsense.fits == "yes"
    how = on(needs * 1.01).table().set_index("quantity")["how"], commonsense.table().set_index("quantity")["how"]
    assert [table["fits"].partition(" the")[0] for table in how] == ["less room than", "more room than"]


def test_the_table_gives_every_number_with_its_origin(commonsense):
    table = commonsense.table()
    assert list(table.columns) == ["quantity", "value", "how"]
    assert table["quantity"].is_unique
    assert (table.map(len) > 0).all(axis=None)
    value = table.set_index("quantity")["value"]
    assert value["parameters"] == "8,030,261,248"
    assert value["trainable parameters"] == "71,303,168"
    assert value["trainable, as quoted"] == "83,886,080 (1.0446%)"
    assert value["peak on a device"] == f"{commonsense.peak_gib:.2f} GiB"
    assert value["fits"] == "yes"
    assert re.fullmatch(r"[\d.]+ to [\d.]+ h", value["training time"])


def test_rows_that_say_nothing_are_left_out():
    none = plan(work_on("gsm8k", "LLaMA2-7B", method="none"), "L40").table()["quantity"].tolist()
    assert "one step" not in none
    assert "training time" not in none
    assert "evaluation time" in none
    training = plan(work_on("gsm8k", "LLaMA2-7B", scored=()), "L40").table()["quantity"].tolist()
    assert "evaluation time" not in training
    assert "trainable, as quoted" not in training
    assert "computed again" not in training


def test_methods_that_are_only_bounded_say_so():
    def how(method):
        table = plan(work_on("gsm8k", "SmolLM2-135M", method=method), "L40").table()
        return table.set_index("quantity")["how"]

    assert "a lower bound" in how("shira")["the method, beside the model"]
    assert "a rough figure" in how("dora")["activations"]
    assert "within 15%" in how("lora")["activations"]


def test_the_header_of_a_run_file(commonsense):
    lines = header(commonsense).splitlines()
    assert 3 <= len(lines) <= 6
    assert all(line.startswith("# ") for line in lines)
    assert lines[0].startswith("# Model: LLaMA3-8B, 8,030,261,248 parameters; DiaBlo N=64 on q_proj")
    assert lines[1].startswith("# Data: 170,420 examples of about 137 tokens, 31,953 steps of 16; 22,419 problems")
    assert f"needs {commonsense.peak_gib:.1f} of the 74.5 GiB" in lines[2]
    assert "30 to 50% of the peak rate" in lines[3]


def test_the_header_without_training_or_decoding():
    text = header(plan(work_on("gsm8k", "LLaMA2-7B", method="none", scored=()), "L40"))
    assert "no training; nothing to decode" in text


def test_the_header_names_hardware_that_fits():
    alone = plan(work_on("gsm8k", "LLaMA2-7B", method="full", micro_batch=4), "L40")
    assert alone.fits == "no"
    two, four = (plan(dataclasses.replace(alone.work, devices=devices, sharding="fsdp"), "L40") for devices in (2, 4))
    assert (two.fits, four.fits) == ("no", "yes")
    _, _, hardware, time, _ = header(alone).splitlines()
    needed = f"needs {four.peak_gib:.1f} of the 44.7 GiB of each (fits: yes); weights in bfloat16, FSDP"
    assert hardware == f"# Hardware: 4 x L40; {needed}; 1 x L40 would need {alone.peak_gib:.1f} (fits: no)"
    assert f"training {duration(four.train_seconds_low, four.train_seconds_high)} at" in time


def test_where_no_number_of_devices_fits_the_header_says_so():
    alone = plan(work_on("gsm8k", "LLaMA-13B", method="full", batch_size=2), "RTX 4090")
    assert "# Hardware: 1 x RTX-4090; " in header(alone)
    assert "(fits: no); weights in bfloat16\n" in header(alone)


def test_sharding_is_said():
    sharded = plan(work_on("gsm8k", "LLaMA-13B", devices=4, sharding="fsdp", micro_batch=4), "RTX 4090")
    assert "4 x RTX-4090" in header(sharded)
    assert "FSDP" in header(sharded)
    assert sharded.peak_gib < plan(work_on("gsm8k", "LLaMA-13B", micro_batch=4), "RTX 4090").peak_gib


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (1, 3, "1 to 3 s"),
        (60, 150, "1 to 2.5 min"),
        (3600, 9000, "1 to 2.5 h"),
        (86_400, 432_000, "1 to 5 days"),
        (32, 112, "32 to 112 s"),
        (99.4, 99.6, "99 to 100 s"),
        (60 * 110, 60 * 118, "110 to 118 min"),
        (86_400 * 98, 86_400 * 123, "98 to 123 days"),
    ],
)
def test_durations_take_the_unit_that_suits_them(low, high, text):
    assert duration(low, high) == text


def test_a_sequence_that_is_longer_than_the_context():
    with pytest.raises(ConfigError, match="max_tokens must be at most 2048 for LLaMA-7B, got 4096"):
        plan(work_on("metamathqa", "LLaMA-7B", max_tokens=4096), "A100-80GB")


def test_a_plan_for_a_device_that_was_measured(tmp_path):
    case = Case.make(tmp_path, TINY, num_blocks=4)
    cpu = measured_cpu("float32", size=64, megabytes=1)
    found = plan(dataclasses.replace(case.work, steps=3), cpu)
    ideal = 3 * found.flops.total_flops / cpu.flops_per_second["float32"]
    assert (found.train_seconds_low, found.train_seconds_high) == pytest.approx(
        (ideal / cpu.training[1], ideal / cpu.training[0])
    )
    assert found.device is cpu
