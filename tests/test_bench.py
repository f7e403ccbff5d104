import pytest
import torch
from torch import nn

from diablo_theory import bench
from diablo_theory.bench import growth, kernels, loading
from diablo_theory.bench.workloads import EinsumLinear, InputKeepingLinear, Step, linear, llama
from diablo_theory.blocks import BlockLayout
from diablo_theory.finetune.config import resolve
from diablo_theory.finetune.models import load_model
from diablo_theory.ops import block_gradient

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


@pytest.fixture(scope="module")
def suite():
    workload = llama("tiny", layers=2, batch=2, length=8, device=torch.device("cpu"))
    return bench.Suite(workload, [6, 3], rounds=3)


@pytest.fixture(scope="module")
def benchmark(suite):
    rounds = []
    found = bench.run_suite(suite, rounds.append)
    assert sum(rounds) == suite.work == 2 * 4
    return found


def test_suite_times_every_phase_of_every_method_in_every_round(benchmark):
    times, contenders = benchmark
    assert set(contenders["name"]) == set(bench.METHODS)
    assert len(times) == 2 * 3 * len(bench.METHODS) * 4
    wide = times.pivot_table(index=["num_blocks", "round", "method"], columns="phase", values="seconds")
    assert (wide[list(bench.PHASES)].sum(axis=1) - wide["step"]).abs().max() < 1e-9
    floor = wide.xs("floor", level="method")
    assert (floor["optimizer"] < 1e-3).all()  # there is none
    assert (floor["backward"] > 0).all()  # the gradient of the input


def test_suite_puts_every_method_at_diablos_budget(benchmark):
    _, contenders = benchmark
    for _, part in contenders.groupby("num_blocks"):
        counts = part.set_index("name")["trainable"]
        assert counts["floor"] == counts["inputs"] == 0
        assert counts["diablo"] == counts["diablo-additive"]
        near = counts.drop(["floor", "inputs", "full", "c3a"])  # no block size of C3A but 1 and 2 divides these shapes
        assert ((near / counts["diablo"] - 1).abs() < 0.5).all()


def test_the_reference_that_reads_inputs_is_the_frozen_layer_in_everything_else():
    layer = nn.Linear(5, 7, bias=False).requires_grad_(False)
    results = []
    for module in (layer, InputKeepingLinear(layer)):
        kept = []
        x = torch.ones(3, 5, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t):
            out = module(x)
        assert ((3, 5) in kept) == (module is not layer)
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_suite_counts_memory(suite, benchmark):
    _, contenders = benchmark
    by = contenders[contenders["num_blocks"] == 6].set_index("name")
    # two layers; q, k and v share an input of 36, up has one of 36, down one of 50; 16 tokens in float32
    assert by["inputs_mib"].iloc[0] * bench.MIB == 2 * (36 + 36 + 50) * 16 * 4
    module = suite.workload.module
    base = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    assert by.loc["floor", "static_mib"] * bench.MIB == base
    # D and Adam's two moments, and a counter for each tensor
    extra = by.loc["diablo", "static_mib"] * bench.MIB - base - 3 * by.loc["diablo", "trainable_mib"] * bench.MIB
    assert 0 <= extra < 1000
    assert (by["step_peak_mib"] > 0).all()


def test_contenders_share_the_frozen_weights_and_leave_them(suite, benchmark):
    before = {name: value.clone() for name, value in suite.workload.module.state_dict().items()}
    one, other = Step(suite.workload, "diablo", 6), Step(suite.workload, "lora", 6)
    addresses = [{p.data_ptr() for p in step.module.parameters()} for step in (one, other)]
    own = {p.data_ptr() for p in suite.workload.module.parameters()}
    assert own <= addresses[0] & addresses[1]
    one.step()
    other.step()
    full = Step(suite.workload, "full", 6)
    full.step()
    assert own.isdisjoint({p.data_ptr() for p in full.trainable})
    assert all(torch.equal(value, before[name]) for name, value in suite.workload.module.state_dict().items())


@pytest.mark.parametrize("sizes", [(12, 18, 6), (13, 17, 4), (5, 7, 7)])
def test_the_einsum_formulation_is_the_block_product(sizes):
    layout = BlockLayout(*sizes)
    torch.manual_seed(0)
    layer = EinsumLinear(nn.Linear(*sizes[:2], dtype=torch.float64), sizes[2])
    nn.init.normal_(layer.blocks)
    x = torch.randn(3, 5, sizes[0], dtype=torch.float64)
    wide = torch.zeros(layer.blocks.shape[0] * layout.block_rows, layer.blocks.shape[0] * layout.block_cols).double()
    for i, block in enumerate(layer.blocks.detach()):
        rows, cols = slice(i * layout.block_rows, None), slice(i * layout.block_cols, None)
        wide[rows, cols][: layout.block_rows, : layout.block_cols] = block
    expected = layer.base_layer(x) + x @ wide[: sizes[0], : sizes[1]]
    torch.testing.assert_close(layer(x), expected)
    assert torch.allclose(kernels.einsum_product(x[0], layer.blocks, sizes[1]), (layer(x) - layer.base_layer(x))[0])


def test_kernels_are_compared_on_the_same_work():
    table = kernels.compare_kernels(lambda _: None, shapes=[(16, 16), (9, 7)], tokens=4, rounds=1)
    assert set(table["kernel"]) == {"product", "gradient"}
    assert (table["ratio"] > 0).all()
    layout = BlockLayout(9, 7, 4)
    x, g = torch.randn(5, 9), torch.randn(5, 7)
    blocks, _ = block_gradient(x, g, layout)
    torch.testing.assert_close(kernels.einsum_gradient(x, g, layout)[: len(blocks)], blocks)


def test_growth_fits_a_slope_through_paired_differences(monkeypatch):
    rounds = []
    table = growth.growth(rounds.append, width=16, blocks=(1, 2, 4), tokens=(4, 8), rounds=2)
    assert sum(rounds) == growth.work((1, 2, 4), (4, 8), 2) == 15
    assert table.groupby("varied").size().to_dict() == {"num_blocks": 3, "tokens": 2}

    def made(width, num_blocks, tokens, *_):
        return {
            "num_blocks": num_blocks,
            "tokens": tokens,
            "extra_seconds": tokens**1.5 / num_blocks,
            "over_floor": 2.0,
        }

    monkeypatch.setattr(growth, "_extra", made)
    slopes = growth.growth(print).groupby("varied")["exponent"].first()
    assert slopes.to_dict() == pytest.approx({"num_blocks": -1.0, "tokens": 1.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["lora", "lorra"]}, "method must be one of floor, inputs, .*got 'lorra'"),
        ({"num_blocks": [64]}, "num_blocks must be from 1 to 36 for tiny, .*got 64"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
    ],
)
def test_a_suite_refuses_what_cannot_be(suite, options, message):
    with pytest.raises(ValueError, match=message):
        bench.Suite(**({"workload": suite.workload, "num_blocks": [6]} | options))


def test_a_layer_is_a_workload_too():
    workload = linear(24, 16, 10, torch.device("cpu"))
    times, contenders = bench.run_suite(
        bench.Suite(workload, [4], ["diablo", "lora", "c3a"], rounds=1), lambda _: None
    )
    assert set(contenders["name"]) == {"floor", "diablo", "lora", "c3a"}
    assert (times["seconds"] >= 0).all()


def test_kept_pages_are_a_setting_of_the_c_library():
    assert bench.keep_pages() in (True, False)


def test_loading_is_timed_beside_the_bytes():
    rounds = []
    table = loading.loading(rounds.append, "tiny", layers=2, num_blocks=(6, 3), rounds=2)
    assert sum(rounds) == loading.work((6, 3), 2) == 6
    assert (table.drop(columns="num_blocks") > 0).all().all()
    assert table["adapter_mib"].is_monotonic_increasing  # N = 3 has twice the parameters
    assert table["parameters"].nunique() == 1
