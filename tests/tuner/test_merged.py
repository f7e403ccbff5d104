"""Merged mode is additive mode computed in another way, and the base weight never shows it."""

import copy
import io
import pickle
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from layers import SHAPES, adapted, dense, pair, rounding_bound, twin
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from diablo_theory import ops
from diablo_theory.ops import writing
from diablo_theory.tuner import DiaBloLinear

HALF = [torch.bfloat16, torch.float16]


class Network(nn.Module):
    """Two adapted layers, the first used twice."""

    def __init__(self, mode="merged", dtype=torch.float64, std=0.1):
        super().__init__()
        self.first = adapted(12, 12, 4, mode=mode, dtype=dtype, std=std)
        self.second = adapted(12, 7, 5, mode=mode, dtype=dtype, std=std, seed=1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


def base_weights(model):
    return [layer.base_layer.weight.detach().clone() for layer in model.modules() if isinstance(layer, DiaBloLinear)]


def unchanged(model, weights):
    return all(torch.equal(now, then) for now, then in zip(base_weights(model), weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("shape", [*SHAPES, (64, 96, 8), (100, 30, 7)])
def test_outputs_of_the_two_modes_differ_by_rounding_only(shape, kind, dtype):
    merged, additive = pair(*shape, kind=kind, dtype=dtype)
    x = torch.randn(50, shape[0]).to(dtype)
    difference = (merged(x).double() - additive(x).double()).detach().abs()
    bias = merged.base_layer.bias.double()
    bound = rounding_bound(x.double(), *dense(merged), bias, dtype, torch.float32)
    worst = float((difference / bound).max())
    assert worst <= 1.0, f"largest difference is {worst:.2g} of its bound"
    if dtype in HALF:
        assert worst > 0.05, "the bound is not worth its name"


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(64, 96, 8), (100, 30, 7)])
def test_gradients_of_the_two_modes_differ_by_rounding_only(shape, dtype):
    merged, additive = pair(*shape, dtype=dtype, bias=False)
    x, g = torch.randn(50, shape[0]).to(dtype), torch.randn(50, shape[1]).to(dtype)
    found = []
    for layer in (merged, additive):
        inputs = x.clone().requires_grad_()
        parts = [part for part in layer.parts("default") if part is not None]
        found.append([v.double() for v in torch.autograd.grad(layer(inputs), [inputs, *parts], g)])
    w0, delta = dense(merged)
    size_x = rounding_bound(g.double(), w0.T, delta.T, None, dtype, torch.float32)
    # x^T g: sums of 50 products, rounded once to the layer's dtype.
    u, v = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    blocks = merged.diablo_layout["default"].gather((u + 2 * 51 * v) * x.double().abs().T @ g.double().abs())
    for mine, theirs, bound in zip(*found, [size_x, *[b for b in blocks if b is not None]], strict=True):
        worst = float(((mine - theirs).abs() / bound).max())
        assert worst <= 1.0, f"largest difference is {worst:.2g} of its bound"


def train(model, steps=40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(12, 7, generator=generator, dtype=torch.float64).to(dtype)
    parameters = [p for n, p in model.named_parameters() if ".diablo_" in n]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 12, generator=generator, dtype=torch.float64).to(dtype)
        loss = (model(x) - torch.tanh(x @ target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, torch.cat([p.detach().flatten() for p in parameters])


def test_training_follows_the_same_trajectory():
    merged, additive = Network("merged"), Network("additive")
    weights = base_weights(merged)
    (ours, end), (theirs, other) = train(merged), train(additive)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, other, rtol=1e-12, atol=1e-12)
    assert ours[-1] < 0.7 * ours[0]
    assert unchanged(merged, weights)


def test_a_bfloat16_base_trains_small_changes_that_its_own_rounding_would_swallow():
    """D is kept in float32: steps far below the weight's spacing add up, and the merged sum is rounded once."""
    layer = adapted(8, 8, 2, dtype=torch.bfloat16, std=0.0, mode="merged")
    nn.init.ones_(layer.base_layer.weight)
    weight, x = layer.base_layer.weight.clone(), torch.ones(1, 8, dtype=torch.bfloat16)
    start = layer(x)
    with torch.no_grad():
        for _ in range(4):
            layer.diablo_blocks["default"].add_(2**-9)  # half of bfloat16's spacing below 1 is 2**-9
    torch.testing.assert_close(layer(x) - start, torch.full_like(start, 4 * 2**-7), rtol=0, atol=2**-5)
    assert not torch.equal(layer(x), start)
    assert torch.equal(layer.base_layer.weight, weight)


def test_a_product_within_a_product_is_refused_and_harms_nothing(monkeypatch):
    for dtype in (torch.float32, torch.float64):
        layer, x = adapted(24, 36, 4, dtype=dtype, std=0.1), torch.randn(5, 24, dtype=dtype)
        weight, expected, real = layer.base_layer.weight.clone(), layer(x).detach(), torch.nn.functional.linear

        def nested(*args, layer=layer, x=x, real=real):
            with pytest.raises(RuntimeError, match="a product within a product"):
                layer(x)
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(ops.writing, "linear", nested)
            assert torch.equal(layer(x), expected)
        assert torch.equal(layer.base_layer.weight, weight)


def test_layers_over_one_weight_take_turns_in_threads():
    first, second = (adapted(64, 64, 8, dtype=torch.float32, std=0.1, seed=seed) for seed in (0, 1))
    second.base_layer.weight = first.base_layer.weight
    weight, x = first.base_layer.weight.clone(), torch.randn(40, 64)
    expected = [layer(x).detach() for layer in (first, second)]
    wrong = []

    def work(layer, right):
        wrong.extend(1 for _ in range(300) if not torch.equal(layer(x), right))

    threads = [threading.Thread(target=work, args=pair) for pair in zip((first, second), expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(first.base_layer.weight, weight)


def test_during_a_product_no_other_layer_over_the_same_weight_gets_its_lock(monkeypatch):
    first, second = (adapted(24, 36, 4, dtype=torch.float32, std=0.1, seed=seed) for seed in (0, 1))
    second.base_layer.weight = weight = first.base_layer.weight
    product, got = writing.linear, []

    def observed(*arguments):
        # A lock is the thread's that holds it: only another thread can tell whether it is free.
        lock = second._writer.lock(weight)
        other = threading.Thread(target=lambda: got.append(lock.acquire(blocking=False)))
        other.start()
        other.join()
        return product(*arguments)

    monkeypatch.setattr(writing, "linear", observed)
    first(torch.randn(5, 24))
    assert got == [False]


@pytest.mark.parametrize("change", ["merge", "unmerge"])
def test_merging_between_forward_and_backward_is_noticed(change):
    layer = adapted(24, 36, 4, std=0.1)
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    if change == "unmerge":
        layer.merge()
    before = layer(x).sum()
    if change == "merge":
        layer.merge()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            before.backward()
    else:
        layer.unmerge()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            before.backward()


def test_a_trainable_weight_and_blocks_elsewhere_are_refused():
    layer = adapted(24, 36, 4, dtype=torch.float32)
    blocks, layout, weight = layer.diablo_blocks["default"], layer.diablo_layout["default"], torch.zeros(36, 24)
    x, writer = torch.zeros(5, 24), ops.BlockWriter()
    with pytest.raises(ValueError, match="weight must be frozen"):
        ops.merged(x, weight.requires_grad_(), None, blocks, None, layout, writer)
    with pytest.raises(ValueError, match="blocks must be where the weight is, on cpu, got meta"):
        ops.merged(x, weight.detach(), None, blocks.to("meta"), None, layout, writer)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(36, 1).expand(36, 24),
        torch.randn(24).expand(36, 24),
        torch.randn(200).as_strided((36, 24), (1, 1)),
        torch.randn(900).as_strided((36, 24), (7, 1)),
        torch.complex(torch.randn(36, 24), torch.randn(36, 24)).conj().imag,
    ],
    ids=["rows", "columns", "both", "partly", "negated"],
)
def test_a_weight_whose_entries_share_memory_is_left_alone(weight):
    layer = adapted(24, 36, 4, mode="auto", dtype=torch.float32, std=0.1)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    assert layer.mode("default") == (
        "additive",
        "entries of the base weight share memory (an expanded or a negated view)",
    )
    before, x = layer.base_layer.weight.clone(), torch.randn(5, 24)
    expected = nn.functional.linear(x, before + layer.get_delta_weight("default"), layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.base_layer.weight, before)


def test_views_of_a_larger_weight_stay_merged():
    fused = torch.randn(72, 48)
    for view in (fused[:36, :24], fused[36:, 24:], fused.T[:36, :24], fused[::2, :24]):
        layer = adapted(24, 36, 4, mode="auto", dtype=torch.float32)
        layer.base_layer.weight = nn.Parameter(view, requires_grad=False)
        assert layer.mode("default")[0] == "merged"


@pytest.mark.parametrize("num_blocks", [8, 7])
def test_an_input_that_lies_in_the_weight(num_blocks):
    layer = adapted(64, 64, num_blocks, dtype=torch.float32, std=0.1)
    weight = layer.base_layer.weight
    expected = nn.functional.linear(
        weight.clone(), weight + layer.get_delta_weight("default"), layer.base_layer.bias
    ).detach()
    torch.testing.assert_close(layer(weight).detach(), expected, rtol=1e-4, atol=1e-4)


def test_batched_gradients():
    layer = adapted(24, 36, 4, dtype=torch.float32, std=0.1)
    x = torch.randn(5, 24, requires_grad=True)
    out, leaves = layer(x), [x, layer.diablo_blocks["default"]]
    directions = torch.randn(3, 5, 36)
    batched = torch.autograd.grad(out, leaves, directions, is_grads_batched=True, retain_graph=True)
    single = zip(*(torch.autograd.grad(out, leaves, one, retain_graph=True) for one in directions), strict=True)
    for together, one_by_one in zip(batched, single, strict=True):
        torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-4, atol=1e-5)


def test_a_tracer_sees_the_blocks():
    layer = adapted(24, 36, 4, dtype=torch.float32, std=0.1)
    x = torch.randn(5, 24)
    graph = make_fx(lambda x: layer(x).detach())(x)
    torch.testing.assert_close(graph(x), layer(x).detach())


def test_weight_and_blocks_may_move_between_products():
    layer, dtype = adapted(24, 36, 4, dtype=torch.float32, std=0.1), torch.float32
    x = torch.randn(5, 24)
    layer(x)
    old = layer.base_layer.weight.data
    before = old.clone()
    for move in ("weight", "blocks", "strides", "dtype"):
        if move == "weight":
            layer.base_layer.weight.data = torch.randn(36, 24)
        elif move == "blocks":
            layer.diablo_blocks["default"] = nn.Parameter(torch.randn(4, 6, 9))
        elif move == "strides":
            layer.base_layer.weight.data = torch.randn(24, 36).T
        else:
            layer, dtype = layer.double(), torch.float64
        weight = layer.base_layer.weight.detach().clone()
        expected = nn.functional.linear(x.to(dtype), weight + layer.get_delta_weight("default"), layer.base_layer.bias)
        torch.testing.assert_close(layer(x.to(dtype)), expected)
        assert torch.equal(layer.base_layer.weight, weight)
        assert torch.equal(old, before)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_inside_a_product_leaves_the_weight(where, monkeypatch):
    model = Network()
    weights = base_weights(model)
    x = torch.randn(3, 12, dtype=torch.float64)
    loss = model(x).sum()
    real, calls = ops.writing.linear, []

    def failing(*args):
        calls.append(1)
        assert not unchanged(model, weights)  # it is inside: this test would see a product that writes nothing
        raise MemoryError("no room for the output")

    monkeypatch.setattr(ops.writing, "linear", failing)
    with pytest.raises(MemoryError, match="no room"):
        model(x) if where == "forward" else loss.backward()
    assert calls
    assert unchanged(model, weights)
    monkeypatch.setattr(ops.writing, "linear", real)
    torch.testing.assert_close(model(x).sum(), loss)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # in float32 the writing is compiled
def test_interrupts_at_a_thousand_moments_leave_the_weight(dtype):
    model = Network(dtype=dtype)
    weights = base_weights(model)
    x = torch.randn(64, 12, dtype=dtype)
    expected = model(x).detach()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    hits, generator = 0, random.Random(0)
    try:
        for _ in range(1000):
            try:
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(2e-5, 1.5e-3))
                for _ in range(4):
                    model(x).square().sum().backward()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
            assert unchanged(model, weights)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits > 300
    assert torch.equal(model(x), expected)


def test_unmerging_that_fails_keeps_the_record(monkeypatch):
    layer = adapted(24, 36, 4, std=0.1)
    weight = layer.base_layer.weight.clone()
    layer.merge()

    def failing(*_):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", failing)
        with pytest.raises(MemoryError):
            layer.unmerge()
    assert layer.merged
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)


def test_interrupts_while_merging_leave_weight_and_record_in_agreement():
    layer = adapted(64, 64, 8, dtype=torch.float32)
    weight = layer.base_layer.weight.clone()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    hits, generator = 0, random.Random(0)
    try:
        for _ in range(500):
            try:
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-5, 3e-4))
                layer.merge()
                layer.unmerge()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert torch.equal(layer.base_layer.weight, weight) is not layer.merged
            if layer.merged:
                layer.unmerge()
            assert torch.equal(layer.base_layer.weight, weight)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits > 50


def test_copies_taken_between_forward_and_backward_hold_the_base_weight():
    model = Network()
    weights = base_weights(model)
    x = torch.randn(3, 12, dtype=torch.float64)
    out = model(x)
    state = copy.deepcopy(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert unchanged(other, weights)
        assert torch.equal(other(x), out)
        assert other.first._writer.lock is not model.first._writer.lock
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert unchanged(torch.load(file, weights_only=False), weights)
    assert torch.equal(state["first.base_layer.weight"], weights[0])
    assert not any("diablo" in key and "blocks" not in key and "tail" not in key for key in state)
    out.sum().backward()
    assert unchanged(model, weights)


def test_a_state_dict_loaded_in_the_middle_of_training_is_what_counts():
    model, other = Network(), Network("additive")
    x = torch.randn(3, 12, dtype=torch.float64)
    model(x).sum().backward()
    fresh = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(fresh)
    other.load_state_dict(fresh)
    torch.testing.assert_close(model(x), other(x), rtol=1e-12, atol=1e-12)


def test_writes_through_data_are_seen():
    layer = adapted(12, 18, 6, mode="merged")
    x = torch.randn(3, 12, dtype=torch.float64)
    layer(x)
    layer.diablo_blocks["default"].data.mul_(2)
    layer.base_layer.weight.data.mul_(3)
    torch.testing.assert_close(layer(x), twin(layer, "additive")(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("what", ["weight", "blocks"])
def test_changing_a_saved_tensor_before_the_backward_pass_is_an_error(what):
    layer = adapted(12, 18, 6, mode="merged")
    out = layer(torch.randn(3, 12, dtype=torch.float64, requires_grad=True))
    with torch.no_grad():
        (layer.base_layer.weight if what == "weight" else layer.diablo_blocks["default"]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, other = Network(), Network("additive")
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    other(x.detach()).square().sum().backward()
    ours = model.first.diablo_blocks["default"].grad
    torch.testing.assert_close(ours, other.first.diablo_blocks["default"].grad, rtol=1e-12, atol=1e-12)


def test_saved_activations_may_live_elsewhere():
    model, other = Network(), Network()
    x = torch.randn(3, 12, dtype=torch.float64)
    with torch.autograd.graph.save_on_cpu():
        out = model(x)
    out.sum().backward()
    other(x).sum().backward()
    assert torch.equal(model.first.diablo_blocks["default"].grad, other.first.diablo_blocks["default"].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_from_weights_rounded_once(dtype):
    merged, additive = pair(64, 96, 8, dtype=torch.float32)
    x = torch.randn(20, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out, other = merged(x), additive(x)
    assert out.dtype == other.dtype == dtype
    w0, delta = dense(merged)
    rounded = (w0 + delta).float().to(dtype)
    exact = x.detach().to(dtype).double() @ rounded.double() + merged.base_layer.bias.to(dtype).double()
    # One rounding of each output; the sums themselves are in float32.
    assert float(((out.detach().double() - exact).abs() / exact.abs()).max()) <= torch.finfo(dtype).eps
    out.float().sum().backward()
    assert merged.diablo_blocks["default"].grad.dtype == torch.float32
    assert x.grad.dtype == torch.float32


def test_threads_sharing_a_layer_all_get_the_right_answer():
    layer = adapted(96, 96, 4, mode="merged", dtype=torch.float32)
    weight = layer.base_layer.weight.clone()
    inputs = [torch.randn(64, 96) for _ in range(4)]
    expected, wrong = [layer(x).detach() for x in inputs], []

    def work(x, reference):
        for _ in range(200):
            out = layer(x)
            out.sum().backward()
            if not torch.equal(out, reference):
                wrong.append(float((out - reference).detach().abs().max()))

    threads = [threading.Thread(target=work, args=args) for args in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(layer.base_layer.weight, weight)


def test_what_is_saved_for_the_backward_pass_is_the_input_alone():
    layer = adapted(64, 96, 8, mode="merged", dtype=torch.float32)
    saved = []
    x = torch.randn(20, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    own = {t.data_ptr() for t in layer.parameters()}
    assert [t.data_ptr() for t in saved if t.data_ptr() not in own] == [x.data_ptr()]


def test_inference_mode_and_no_grad():
    layer = adapted(12, 18, 6, mode="merged")
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = layer(x).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(layer(x), expected)
    layer(x).sum().backward()


def test_compile_takes_the_additive_path_without_a_graph_break():
    """In a process of its own: the shape checks that the tests switch on are no part of the package."""
    code = """
import torch
from layers import adapted
layer = adapted(13, 17, 4)
x = torch.randn(5, 13, dtype=torch.float64)
expected = layer(x)
expected.sum().backward()
gradient = layer.diablo_blocks["default"].grad.clone()
layer.zero_grad()
out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
out.sum().backward()
torch.testing.assert_close(layer.diablo_blocks["default"].grad, gradient, rtol=1e-12, atol=1e-12)
assert torch.compiler.is_compiling() is False and layer.mode("default")[0] == "merged"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
