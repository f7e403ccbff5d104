import pytest
import torch

from diablo_theory.theory.arithmetic import Arithmetic, gaussian, require_integer, require_matrix, seeded


def test_every_precision_sees_the_same_draws():
    wide, narrow = (Arithmetic(dtype).place(gaussian(3, 2, seeded(0))) for dtype in (torch.float64, torch.float32))
    assert torch.equal(wide.float(), narrow)
    assert (wide.dtype, narrow.dtype) == (torch.float64, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex128])
def test_a_precision_that_theory_does_not_know_is_named(dtype):
    with pytest.raises(ValueError, match=rf"dtype must be one of \(torch.float64, torch.float32\), got {dtype}"):
        Arithmetic(dtype)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), "M must be a float32 or float64 matrix, got torch.float32 with 1 dimensions"),
        (torch.ones(2, 2).bfloat16(), "M must be a float32 or float64 matrix, got torch.bfloat16"),
        (torch.ones(2, 2).cfloat(), "M must be a float32 or float64 matrix, got torch.complex64"),
        (torch.ones(2, 2).int(), "M must be a float32 or float64 matrix, got torch.int32"),
        (torch.ones(2, 2).bool(), "M must be a float32 or float64 matrix, got torch.bool"),
        (torch.ones(2, 2).to_sparse(), "M must be dense and hold numbers, got torch.sparse_coo on cpu"),
        (torch.ones(2, 2, device="meta"), "M must be dense and hold numbers, got torch.strided on meta"),
    ],
)
def test_what_is_no_matrix_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        require_matrix("M", value)


@pytest.mark.parametrize("value", [1.0, True, "1", None])
def test_what_is_no_integer_is_named(value):
    with pytest.raises(TypeError, match=f"n must be an integer, got {value!r} of type {type(value).__name__}"):
        require_integer("n", value)
