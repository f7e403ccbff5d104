import copy
from types import SimpleNamespace

import pytest
import torch
from layers import SHAPES, adapted, base, dense, pair, randomise, twin
from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo_theory.tuner import DiaBloConfig, DiaBloLinear

MODES = ["additive", "merged"]
KINDS = ["linear", "conv1d"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_start_is_the_base_layer_to_the_bit(shape, kind, mode):
    frozen = base(*shape[:2], kind)
    layer = DiaBloLinear(frozen, "default", shape[2], DiaBloConfig(num_blocks=shape[2], mode=mode))
    assert layer.mode("default") == (mode, "asked for")
    x = torch.randn(3, 4, shape[0], dtype=torch.float64)
    assert torch.equal(layer(x), frozen(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_the_dense_sum(shape, kind, mode):
    layer = adapted(*shape, kind=kind, mode=mode)
    x = torch.randn(2, 5, shape[0], dtype=torch.float64, requires_grad=True)
    out = layer(x)
    w0, delta = dense(layer)
    full = (w0 + delta).requires_grad_()
    reference = x @ full + layer.base_layer.bias
    torch.testing.assert_close(out, reference, rtol=1e-13, atol=1e-13)
    seed = torch.randn_like(out)
    parts = [part for part in layer.parts("default") if part is not None]
    ours = torch.autograd.grad(out, [x, *parts], seed)
    grad_x, grad_full = torch.autograd.grad(reference, [x, full], seed)
    blocks, tail = layer.diablo_layout["default"].gather(grad_full)
    expected = [grad_x, blocks] + ([] if tail is None else [tail])
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3, 2)])
def test_any_batch_shape(batch, mode):
    layer = adapted(13, 17, 4, mode=mode)
    x = torch.randn(*batch, 13, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == (*batch, 17)
    out.sum().backward()  # an expanded gradient
    assert x.grad.shape == x.shape
    assert layer.diablo_blocks["default"].grad.shape == layer.diablo_blocks["default"].shape


@pytest.mark.parametrize("mode", MODES)
def test_inputs_of_any_strides(mode):
    layer = adapted(12, 18, 6, mode=mode)
    wide = torch.randn(5, 24, 4, dtype=torch.float64)
    x = wide.transpose(1, 2)[:, ::2, ::2]
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(mode, kind):
    layer = adapted(7, 5, 3, kind=kind, mode=mode)
    parts = [part for part in layer.parts("default") if part is not None]
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)

    def function(x, *_):
        return layer(x).tanh()

    assert torch.autograd.gradcheck(function, (x, *parts))
    assert torch.autograd.gradgradcheck(function, (x, *parts))


def test_only_what_asks_for_a_gradient_gets_one():
    layer = adapted(13, 17, 4, mode="merged")
    layer.base_layer.bias.requires_grad_(True)
    layer(torch.randn(6, 13, dtype=torch.float64)).tanh().sum().backward()
    assert layer.base_layer.weight.grad is None
    other = twin(layer, "additive")
    other.zero_grad()
    torch.manual_seed(1)
    x = torch.randn(6, 13, dtype=torch.float64)
    layer.zero_grad()
    layer(x).tanh().sum().backward()
    other(x).tanh().sum().backward()
    torch.testing.assert_close(layer.base_layer.bias.grad, other.base_layer.bias.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_dtype_of_adapter_and_output(mode):
    for dtype, chosen, expected in [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, "float64", torch.float64),
        (torch.float32, "bfloat16", torch.bfloat16),
    ]:
        layer = adapted(12, 18, 6, dtype=dtype, mode=mode, adapter_dtype=chosen)
        assert layer.diablo_blocks["default"].dtype == expected
        assert layer(torch.randn(2, 12, dtype=dtype)).dtype == dtype


def test_dropout_acts_in_training_only_and_on_the_adapters_input_only():
    layer = adapted(12, 18, 6, dropout=0.5)
    assert layer.mode("default") == ("additive", "dropout acts on the adapter's input alone")
    x = torch.randn(40, 12, dtype=torch.float64)
    torch.manual_seed(0)
    change = layer.train()(x) - layer.base_layer(x)
    delta = dense(layer)[1]
    torch.manual_seed(0)
    torch.testing.assert_close(change, nn.functional.dropout(x, 0.5) @ delta)
    torch.testing.assert_close(layer.eval()(x), layer.base_layer(x) + x @ delta)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.register_forward_hook(lambda *_: None), "has hooks"),
        (lambda b: b.register_full_backward_hook(lambda *_: None), "has hooks"),
        (lambda b: b.weight.requires_grad_(True), "is trained too"),
        (lambda b: b.share_memory(), "shared between processes"),
        (lambda b: setattr(b, "forward", lambda x: nn.Linear.forward(b, x)), "forward method was replaced"),
        (lambda b: setattr(b, "_is_fsdp_managed_module", True), "sharded (FSDP)"),  # as torch marks it
        (lambda b: nn.utils.parametrizations.weight_norm(b), "ParametrizedLinear with a forward pass of its own"),
    ],
)
def test_merged_mode_gives_way_where_it_is_not_valid_and_says_why(change, reason):
    layer = adapted(12, 18, 6)
    x = torch.randn(3, 12, dtype=torch.float64)
    before = layer(x)
    assert layer.mode("default") == ("merged", "valid for this layer")
    change(layer.base_layer)
    mode, why = layer.mode("default")
    assert mode == "additive"
    assert reason in why
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    assert reason in repr(layer)


def test_a_hook_on_the_base_layer_sees_the_base_layers_own_output():
    layer = adapted(12, 18, 6)
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(3, 12, dtype=torch.float64)
    layer(x)
    torch.testing.assert_close(seen[0], x @ layer.base_layer.weight.T + layer.base_layer.bias)


def test_merged_asked_for_where_it_can_never_be_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="mode 'merged' is not valid here: the base layer is a Scaled with a forward"):
        DiaBloLinear(Scaled(4, 4), "default", 2, DiaBloConfig(num_blocks=2, mode="merged"))
    layer = DiaBloLinear(Scaled(4, 4), "default", 2, DiaBloConfig(num_blocks=2))
    randomise(layer)
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ layer.get_delta_weight("default").T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_merge_changes_the_blocks_only_and_unmerge_is_exact(shape, kind):
    layer = adapted(*shape, kind=kind)
    weight = layer.base_layer.weight.clone()
    outside = layer.get_delta_weight("default") == 0
    x = torch.randn(4, shape[0], dtype=torch.float64)
    before = layer(x)
    layer.merge()
    assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.base_layer.weight[outside], weight[outside])
    assert not torch.equal(layer.base_layer.weight, weight)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merging_rounds_once_and_a_thousand_cycles_leave_no_trace(dtype):
    layer = adapted(13, 17, 4, dtype=dtype)
    weight = layer.base_layer.weight.clone()
    for _ in range(1000):
        layer.merge()
        merged = layer.base_layer.weight.clone()
        layer.unmerge()
    assert torch.equal(merged, (weight.float() + layer.get_delta_weight("default")).to(dtype))
    assert torch.equal(layer.base_layer.weight, weight)


def test_several_adapters_merge_in_turn_and_unmerge_exactly_whatever_their_blocks():
    layer = adapted(13, 17, 4, dtype=torch.bfloat16)
    layer.update_layer("other", 3, DiaBloConfig(num_blocks=3))
    randomise(layer)
    weight = layer.base_layer.weight.clone()
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        layer.merge(adapter_names=["default", "other"])
    assert layer.merged_adapters == ["default", "other"]
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)


def test_what_is_kept_aside_follows_a_merged_layer_to_another_dtype():
    layer = adapted(12, 18, 6, dtype=torch.float32)
    weight = layer.base_layer.weight.clone()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight.bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("safe", [True, False])
def test_merging_what_is_not_finite_is_refused_and_harms_nothing(bad, safe):
    layer = adapted(13, 17, 4)
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.diablo_tail["default"][0, 0] = bad
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        layer.merge(safe_merge=safe)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


def test_a_sum_that_overflows_the_base_dtype_is_refused():
    layer = adapted(12, 18, 6, dtype=torch.float16)
    with torch.no_grad():
        layer.diablo_blocks["default"].fill_(1e5)  # finite in float32, not in float16
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge()


def test_disabling_a_merged_layer_unmerges_it():
    layer = adapted(12, 18, 6)
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    assert not layer.merged


def test_several_active_adapters_add_up():
    layer = adapted(13, 17, 4)
    layer.update_layer("other", 3, DiaBloConfig(num_blocks=3))
    layer.set_adapter(["default", "other"])
    randomise(layer)
    x = torch.randn(4, 13, dtype=torch.float64)
    expected = layer.base_layer(x) + x @ (dense(layer)[1] + dense(layer, "other")[1])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "num_blocks", "kind", "message"),
    [
        (
            nn.Conv1d(3, 3, 1),
            1,
            TypeError,
            "is of type Conv1d; DiaBlo adapts torch.nn.Linear and transformers' Conv1D",
        ),
        (nn.Embedding(10, 4), 1, TypeError, "is of type Embedding"),
        (nn.Linear(12, 18), 0, ValueError, "num_blocks must be at least 1, got 0"),
        (nn.Linear(12, 18), 2.0, TypeError, "num_blocks must be an integer, got 2.0"),
        (nn.Linear(12, 18), 19, ValueError, "num_blocks must be at most 18 for a 12 x 18 matrix, got 19"),
        (Conv1D(18, 12), 19, ValueError, "num_blocks must be at most 18 for a 12 x 18 matrix, got 19"),
    ],
)
def test_bad_layers_and_block_counts_are_named(module, num_blocks, kind, message):
    with pytest.raises(kind, match=message):
        DiaBloLinear(module, "default", num_blocks, DiaBloConfig())


def test_repr_tells_geometry_mode_and_reason():
    layer = adapted(13, 17, 4)
    text = "default: num_blocks=4, block=4x5, tail=(1, 2), mode=merged (valid for this layer)"
    assert text in repr(layer)


def test_repr_names_the_quantiser():
    layer = adapted(12, 18, 6)
    layer.quantization_backend = SimpleNamespace(backend_name="bnb 8bit")
    assert "quantization_backend='bnb 8bit'" in repr(layer)
    assert "mode=additive (the base weight is quantised (bnb 8bit))" in repr(layer)


def test_inputs_are_cast_to_the_adapters_dtype_unless_that_is_switched_off():
    merged, additive = pair(12, 18, 6, dtype=torch.float32)
    for layer in (merged, additive):
        with pytest.raises(RuntimeError, match="dtype"):  # as the base layer itself
            layer(torch.randn(2, 12, dtype=torch.float64))
    copied = copy.deepcopy(additive)
    assert copied.cast_input_dtype_enabled


def test_a_hook_on_all_modules_sees_the_base_layers_own_output():
    layer = adapted(7, 5, 3, mode="auto", std=0.1)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.append(out) if module is layer.base_layer else None
    )
    try:
        x = torch.randn(4, 7, dtype=torch.float64)
        layer(x)
    finally:
        handle.remove()
    assert torch.equal(seen[0], layer.base_layer(x))
