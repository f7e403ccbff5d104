import pytest
import torch

from diablo_theory import bench
from diablo_theory.finetune.config import resolve
from diablo_theory.finetune.models import load_model

METHODS = ["full", "lora", "diablo"]


@pytest.fixture
def measured(tiny_model):
    rounds = []
    config = resolve({"num_blocks": 6, "batch_size": 4})
    loaded = load_model(str(tiny_model), "cpu")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    times, memory = bench.compare(loaded, config, METHODS, 4, rounds.append)
    assert sum(rounds) == 4 + bench.WARMUP_ROUNDS
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    return times, memory


def test_every_round_times_every_method(measured):
    times, memory = measured
    assert times.groupby("round")["method"].nunique().tolist() == [3] * 4
    assert (times["seconds"] > 0).all()
    # The order rotates, so that no method always runs behind the same one.
    assert times.groupby("round")["method"].first().nunique() == 3
    assert set(memory["method"]) == set(times["method"])
    assert {label.split()[0] for label in memory["method"]} == {"Full", "LoRA", "DiaBlo"}


def test_memory_at_rest_is_parameters_and_two_moments(tiny_model, measured):
    _, memory = measured
    by_method = memory.set_index("method")["static_mib"] * bench.MIB
    base = sum(p.nbytes for p in load_model(str(tiny_model), "cpu").model.parameters())
    full_trainable = 2 * 5760 * 4
    extra = by_method["Full fine-tuning"] - base - 2 * full_trainable
    assert 0 <= extra < 1000  # Adam's step counters
    assert by_method["DiaBlo N=6"] < by_method["Full fine-tuning"]


def test_peak_counts_what_is_held_at_once():
    def work():
        first = torch.ones(2**20, dtype=torch.uint8)
        del first
        second = torch.ones(2 * 2**20, dtype=torch.uint8)
        third = torch.ones(3 * 2**20, dtype=torch.uint8)
        return second.numel() + third.numel()

    assert 5 * 2**20 <= bench.peak_bytes(work, torch.device("cpu")) < 5.01 * 2**20


def test_rounds_must_be_positive(tiny_model):
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        bench.compare(load_model(str(tiny_model), "cpu"), resolve(), METHODS, 0, print)
