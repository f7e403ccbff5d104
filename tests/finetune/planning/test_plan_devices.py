import dataclasses
import math

import pytest

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.planning.devices import DEVICES, device, measured_cpu
from diablo_theory.finetune.planning.generation import decoding, decoding_seconds
from diablo_theory.finetune.planning.shapes import model_shapes
from diablo_theory.finetune.planning.work import Scored, Work


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_is_complete_and_names_its_source(name):
    found = device(name, "bfloat16")
    assert found is DEVICES[name]
    assert found.source.startswith("NVIDIA")
    for low, high in (found.training, found.decoding):
        assert 0 < low < high <= 1
    assert found.flops_per_second["bfloat16"] > found.flops_per_second["float32"]


def test_rates_are_those_of_the_data_sheets():
    dense_bf16 = {name: round(gpu.flops_per_second["bfloat16"] / 1e12, 2) for name, gpu in DEVICES.items()}
    assert dense_bf16 == {
        "A100-40GB": 312, "A100-80GB": 312, "H100-80GB": 989.4, "L40": 181.05, "RTX-4090": 165.2
    }  # fmt: skip
    bandwidth = [gpu.bandwidth_bytes_per_second / 1e9 for gpu in DEVICES.values()]
    assert bandwidth == [1555, 2039, 3350, 864, 1008]


@pytest.mark.parametrize(
    ("asked", "name"), [("rtx 4090", "RTX-4090"), ("h100", "H100-80GB"), ("a100 80gb", "A100-80GB")]
)
def test_names_are_taken_loosely(asked, name):
    assert device(asked, "bfloat16").name == name


@pytest.mark.parametrize("asked", ["a100", "L4O", ""])
def test_an_unknown_or_ambiguous_device_lists_the_known_ones(asked):
    with pytest.raises(ConfigError, match=rf"unknown device '{asked}'\.( Did you mean| Known: A100-40GB)"):
        device(asked, "bfloat16")


def test_a_dtype_without_a_rate():
    with pytest.raises(ConfigError, match="no rate is known for float64 on L40: only for bfloat16, float16, float32"):
        device("L40", "float64")


def test_this_cpu_is_measured():
    found = measured_cpu("float32", size=64, megabytes=1)
    assert found.flops_per_second["float32"] > 1e6
    assert found.bandwidth_bytes_per_second > 1e6
    assert found.memory_bytes > 2**28
    assert not found.foreach
    assert "64 x 64 products and 1 MiB by a vector" in found.source


def test_rates_are_operations_and_bytes_over_seconds(monkeypatch):
    monkeypatch.setattr("diablo_theory.finetune.planning.devices._seconds", lambda work: 0.5)
    found = measured_cpu("bfloat16", size=10, megabytes=1)
    assert found.flops_per_second == {"bfloat16": 2 * 10**3 / 0.5}
    assert found.bandwidth_bytes_per_second == 2**20 / 0.5


def ideal(**changes):
    return dataclasses.replace(DEVICES["A100-80GB"], training=(0.5, 1.0), decoding=(0.5, 1.0), **changes)


def work(**fields):
    return Work(model="LLaMA2-7B", examples=1, prompt_tokens=100, answer_tokens=1, batch_size=1, **fields)


def test_one_sequence_is_bound_by_reading_the_weights():
    shapes = model_shapes("LLaMA2-7B")
    asked = work(scored=(Scored(items=1, new_tokens=50, batch_size=1),))
    found = decoding(shapes, asked)
    low, high = decoding_seconds(found, ideal(), "bfloat16")
    weights = 2 * (shapes.parameters - shapes.embedding)
    assert low == pytest.approx(50 * weights / 2039e9, rel=0.05)
    assert high == pytest.approx(2 * low)


def test_a_large_batch_is_bound_by_arithmetic():
    found = decoding(model_shapes("LLaMA2-7B"), work(scored=(Scored(items=4096, new_tokens=50, batch_size=4096),)))
    fast = ideal(bandwidth_bytes_per_second=math.inf)
    low, _ = decoding_seconds(found, fast, "bfloat16")
    assert low == pytest.approx((found.prompt_flops + found.token_flops) / 312e12)
    assert found.token_flops == pytest.approx(2 * 6.6e9 * 4096 * 50, rel=0.02)


def test_beams_samples_and_batches_multiply():
    shapes = model_shapes("SmolLM2-135M")
    one, beams, samples = (
        decoding(shapes, work(scored=(Scored(items=32, new_tokens=10, **changes),)))
        for changes in ({}, {"beams": 4}, {"samples": 4})
    )
    assert (one.batches, beams.batches, samples.batches) == (2, 2, 8)
    assert beams.token_flops == samples.token_flops == 4 * one.token_flops
    assert samples.read_bytes == 4 * one.read_bytes
    assert one.read_bytes < beams.read_bytes < samples.read_bytes


def test_every_task_stops_at_its_own_length():
    shapes = model_shapes("SmolLM2-135M")
    short, long = Scored(items=1319, new_tokens=256, beams=4), Scored(items=5000, new_tokens=512, batch_size=8)
    each = [decoding(shapes, work(scored=(task,))) for task in (short, long)]
    both = decoding(shapes, work(scored=(short, long)))
    for name in ("batches", "prompt_flops", "token_flops", "read_bytes"):
        assert getattr(both, name) == sum(getattr(task, name) for task in each)
    assert decoding(shapes, work()).batches == 0


def test_nothing_to_decode_takes_no_time():
    found = decoding(model_shapes("LLaMA2-7B"), work())
    assert decoding_seconds(found, ideal(), "bfloat16") == (0, 0)
