import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_blocks import layouts

from diablo_theory.blocks import BlockLayout
from diablo_theory.ops import additive, block_gradient, block_product
from diablo_theory.theory.tolerances import tolerance

GRADIENT = tolerance("gradient").value


def generic(layout, batch=(4,), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, layout.in_features, generator=generator, dtype=dtype)
    matrix = torch.randn(layout.in_features, layout.out_features, generator=generator, dtype=dtype)
    return x, *layout.gather(matrix)


def close(value, reference):
    scale = max(float(reference.detach().abs().max()), 1.0) if reference.numel() else 1.0
    error = float((value - reference).detach().abs().max()) / scale if reference.numel() else 0.0
    assert error <= GRADIENT, f"largest relative error {error:.2e}"


@given(layouts(), st.sampled_from([(4,), (2, 3), (), (0,), (1, 1, 2)]), st.integers(0, 5))
def test_values_and_gradients_equal_the_dense_product(layout, batch, seed):
    x, blocks, tail = generic(layout, batch, seed)
    leaves = [part.requires_grad_() for part in (x, blocks, tail) if part is not None]
    fast = block_product(x, blocks, tail, layout)
    slow = x @ layout.scatter(blocks, tail)
    assert fast.shape == (*batch, layout.out_features)
    close(fast, slow)
    weight = torch.randn(fast.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    for ours, dense in zip(
        torch.autograd.grad((weight * fast).sum(), leaves),
        torch.autograd.grad((weight * slow).sum(), leaves),
        strict=True,
    ):
        close(ours, dense)


@pytest.mark.parametrize("sizes", [(6, 4, 2), (7, 5, 3), (5, 7, 3), (4, 4, 4), (5, 4, 1), (8, 3, 5), (3, 8, 5)])
def test_gradcheck(sizes):
    layout = BlockLayout(*sizes)
    x, blocks, tail = generic(layout, (2,))
    leaves = [part.requires_grad_() for part in (x, blocks, tail) if part is not None]
    assert torch.autograd.gradcheck(
        lambda x, blocks, tail=None: block_product(x, blocks, tail, layout), leaves, raise_exception=True
    )
    assert torch.autograd.gradgradcheck(
        lambda x, blocks, tail=None: block_product(x, blocks, tail, layout), leaves, raise_exception=True
    )


def test_outputs_that_no_block_writes_are_zero():
    layout = BlockLayout(2, 9, 9)
    x, blocks, tail = generic(layout)
    out = block_product(x, blocks, tail, layout)
    assert out[:, :2].all()
    assert not out[:, 2:].any()


def test_additive_keeps_the_base_dtype_and_computes_in_the_inputs_dtype():
    layout = BlockLayout(7, 5, 3)
    x, blocks, tail = generic(layout, dtype=torch.float32)
    base = torch.ones(4, 5, dtype=torch.bfloat16)
    out = additive(base, x, blocks, tail, layout)
    expected = base + (x @ layout.scatter(blocks, tail)).bfloat16()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


def test_additive_is_the_identity_at_zero_blocks():
    layout = BlockLayout(7, 5, 3)
    base = torch.randn(4, 5)
    assert torch.equal(additive(base, torch.randn(4, 7), *layout.gather(torch.zeros(7, 5)), layout), base)


def test_shapes_that_do_not_fit_are_named():
    layout = BlockLayout(7, 5, 3)
    x, blocks, tail = generic(layout)
    with pytest.raises(ValueError, match="x must have 7 features in its last dimension, got 6"):
        block_product(x[:, :6], blocks, tail, layout)
    with pytest.raises(ValueError, match=r"tail must be \(1, 1\), got None"):
        block_product(x, blocks, None, layout)
    with pytest.raises(ValueError, match=r"blocks must have shape"):
        block_product(x, blocks[:1], tail, layout)


def test_tensors_that_do_not_fit_each_other_are_named():
    layout = BlockLayout(6, 8, 2)
    x, blocks = torch.zeros(5, 6), torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"g must have shape \(5, 8\), got \(5, 7\)"):
        block_gradient(x, torch.zeros(5, 7), layout)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"base_output must have shape \(5, 8\), got \(5, 7\)"):
            additive(torch.zeros(5, 7), x, blocks, None, layout, overwrite=overwrite)
        with pytest.raises(ValueError, match="blocks must have shape"):
            additive(torch.zeros(5, 8), x, torch.zeros(2, 3, 3), None, layout, overwrite=overwrite)
