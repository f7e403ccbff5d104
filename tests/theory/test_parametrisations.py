import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import NonFiniteError
from diablo_theory.theory import optima, parametrisations, starts
from diablo_theory.theory.arithmetic import Arithmetic, gaussian, seeded
from diablo_theory.theory.problems import linear_problem
from diablo_theory.theory.reduction import reduce_problem

LAYOUT = BlockLayout(7, 5, 3)
PROBLEM = linear_problem(LAYOUT, 9, 4, seeded(0))
USUAL = starts.usual_start(7, 5, 2, seeded(1))
A = USUAL.A
METHODS = {
    "diablo": parametrisations.diablo(PROBLEM),
    "lora": parametrisations.lora(PROBLEM, USUAL),
    "pissa": parametrisations.lora(PROBLEM, starts.pissa_start(PROBLEM.W0, 2)),
    "frozen": parametrisations.frozen_lora(PROBLEM, A),
}


def test_every_method_starts_at_the_frozen_weight():
    for name, method in METHODS.items():
        assert float(method.output(method.start).abs().max()) <= 1e-14, name
        expected = 0.5 * float((PROBLEM.X @ PROBLEM.W0 - PROBLEM.T).square().sum())
        assert float(method.loss(method.start)) == pytest.approx(expected, rel=1e-13), name


def test_parameters_are_counted_as_the_optima_count_them():
    reduced = reduce_problem(PROBLEM)
    assert METHODS["diablo"].size == optima.diablo_optimum(reduced, LAYOUT).num_parameters
    assert METHODS["lora"].size == METHODS["pissa"].size == optima.lora_optimum(reduced, 2).num_parameters
    assert METHODS["frozen"].size == optima.frozen_lora_optimum(reduced, A).num_parameters
    assert [m.method for m in METHODS.values()] == ["diablo", "lora", "lora", "lora-frozen-a"]
    assert [m.begin for m in METHODS.values()] == ["zero", "usual", "pissa", "zero"]


@pytest.mark.parametrize("name", METHODS)
def test_gradients_agree_with_finite_differences(name):
    theta = gaussian(1, METHODS[name].size, seeded(2))[0].requires_grad_()
    assert torch.autograd.gradcheck(METHODS[name].loss, theta)


def dense_update(name, theta):
    if name == "diablo":
        blocks, tail = theta[:12].reshape(2, 3, 2), theta[12:].reshape(1, 1)
        return torch.block_diag(*blocks, tail)
    if name == "frozen":
        return A @ theta.reshape(2, 5)
    product = theta[:14].reshape(7, 2) @ theta[14:].reshape(2, 5)
    if name == "pissa":
        U, sigma, Vh = torch.linalg.svd(PROBLEM.W0)
        product = product - (U[:, :2] * sigma[:2]) @ Vh[:2]
    return product


@pytest.mark.parametrize("name", METHODS)
@given(seed=st.integers(0, 10**6))
def test_outputs_equal_a_dense_product(name, seed):
    theta = gaussian(1, METHODS[name].size, seeded(seed))[0]
    expected = PROBLEM.X @ dense_update(name, theta)
    torch.testing.assert_close(METHODS[name].output(theta), expected, rtol=1e-12, atol=1e-12)


def test_the_first_gradients_are_the_closed_forms():
    """At B = 0 LoRA's gradient in A vanishes and the one in B is -A^T X^T R; DiaBlo's is a part of the full one."""
    full = -PROBLEM.X.T @ PROBLEM.R
    for name, expected in (
        ("lora", torch.cat([torch.zeros(14).double(), (A.T @ full).flatten()])),
        ("frozen", (A.T @ full).flatten()),
        ("diablo", torch.cat([full[0:3, 0:2].flatten(), full[3:6, 2:4].flatten(), full[6:7, 4:5].flatten()])),
    ):
        theta = METHODS[name].start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(METHODS[name].loss(theta), theta)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_best_factors_attain_the_minimum():
    theta = parametrisations.best_factors(PROBLEM, 2)
    minimum = optima.lora_optimum(reduce_problem(PROBLEM), 2).minimum
    assert float(METHODS["lora"].loss(theta)) == pytest.approx(float(minimum), rel=1e-12)


def test_float32_problems_are_trained_in_float64():
    problem = linear_problem(LAYOUT, 9, 4, seeded(0), arithmetic=Arithmetic(torch.float32))
    for method in (parametrisations.diablo(problem), parametrisations.lora(problem, USUAL)):
        assert method.loss(method.start).dtype == torch.float64


def test_factors_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"A must have shape \(7, 2\), got \(6, 2\)"):
        parametrisations.lora(PROBLEM, starts.Start("other", A[:6], USUAL.B))
    with pytest.raises(ValueError, match=r"B must have shape \(2, 5\), got \(2, 4\)"):
        parametrisations.lora(PROBLEM, starts.Start("other", A, USUAL.B[:, :4]))
    with pytest.raises(ValueError, match=r"A must have the dtype of the inputs, torch.float64, got torch.float32"):
        parametrisations.frozen_lora(PROBLEM, A.float())
    with pytest.raises(NonFiniteError, match="A holds a NaN or an infinity"):
        parametrisations.frozen_lora(PROBLEM, A / 0)
