import pytest
import torch
from torch import nn

from diablo_theory.tuner import DiaBloLinear

SHAPES = [(12, 18, 6), (13, 17, 4), (8, 3, 8), (5, 7, 1), (7, 7, 7)]


def trained(m1, m2, num_blocks, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    layer = DiaBloLinear(nn.Linear(m1, m2, bias=bias).to(dtype), num_blocks)
    with torch.no_grad():
        for parameter in (layer.diablo_blocks, layer.diablo_tail):
            if parameter is not None:
                parameter.normal_()
    return layer


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_start_is_the_base_layer_to_the_bit(shape):
    base = nn.Linear(*shape[:2])
    layer = DiaBloLinear(base, shape[2])
    x = torch.randn(3, 4, shape[0])
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_dense_sum(shape):
    layer = trained(*shape)
    x = torch.randn(2, 5, shape[0], dtype=torch.float64)
    dense = nn.functional.linear(x, layer.base_layer.weight + layer.delta_weight(), layer.base_layer.bias)
    torch.testing.assert_close(layer(x), dense, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_blocks_get_a_gradient_and_it_is_the_diagonal_of_the_full_one(shape):
    layer = trained(*shape)
    x = torch.randn(9, shape[0], dtype=torch.float64)
    layer(x).tanh().sum().backward()
    dense = (layer.base_layer.weight + layer.delta_weight()).detach().requires_grad_()
    nn.functional.linear(x, dense, layer.base_layer.bias).tanh().sum().backward()
    blocks, tail = layer.layout.gather(dense.grad.T)
    torch.testing.assert_close(layer.diablo_blocks.grad, blocks, rtol=1e-12, atol=1e-12)
    if tail is not None:
        torch.testing.assert_close(layer.diablo_tail.grad, tail, rtol=1e-12, atol=1e-12)
    assert layer.base_layer.weight.grad is None
    assert layer.base_layer.bias.grad is None


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_layer_gives_the_same_output_and_leaves_other_entries_alone(shape):
    layer = trained(*shape)
    x = torch.randn(4, shape[0], dtype=torch.float64)
    before, weight = layer(x), layer.base_layer.weight.clone()
    outside = layer.delta_weight() == 0
    merged = layer.merged()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(merged.weight[outside], weight[outside])


def test_half_precision_base_trains_in_float32_and_rounds_once():
    layer = trained(12, 18, 6, dtype=torch.bfloat16)
    assert layer.diablo_blocks.dtype == torch.float32
    assert layer(torch.randn(2, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
    exact = (layer.base_layer.weight.float() + layer.delta_weight()).bfloat16()
    assert torch.equal(layer.merged().weight, exact)


def test_merging_a_non_finite_update_is_refused_and_harms_nothing():
    layer = trained(13, 17, 4)
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.diablo_tail[0, 0] = float("nan")
    with pytest.raises(ValueError, match="refusing to merge"):
        layer.merged()
    assert torch.equal(layer.base_layer.weight, weight)


def test_a_layer_that_is_not_linear_is_refused():
    with pytest.raises(TypeError, match=r"base_layer must be a torch.nn.Linear, got Conv1d"):
        DiaBloLinear(nn.Conv1d(3, 3, 1), 1)


@pytest.mark.parametrize(
    ("num_blocks", "kind", "message"),
    [
        (0, ValueError, "num_blocks must be at least 1, got 0"),
        (-3, ValueError, "num_blocks must be at least 1, got -3"),
        (2.0, TypeError, "num_blocks must be an integer, got 2.0"),
        (True, TypeError, "num_blocks must be an integer, got True"),
        (19, ValueError, "num_blocks must be at most 18 for a 12 x 18 matrix, got 19"),
    ],
)
def test_bad_block_counts_name_value_and_range(num_blocks, kind, message):
    with pytest.raises(kind, match=message):
        DiaBloLinear(nn.Linear(12, 18), num_blocks)


def test_repr_tells_the_geometry():
    assert "num_blocks=4, block=4x5, tail=(1, 2)" in repr(DiaBloLinear(nn.Linear(13, 17), 4))
