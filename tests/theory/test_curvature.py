import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import curvature, parametrisations, starts
from diablo_theory.theory.arithmetic import seeded
from diablo_theory.theory.problems import LinearProblem, linear_problem, low_rank_inputs


@st.composite
def linear_problems(draw):
    m1, m2, b = draw(st.integers(1, 7)), draw(st.integers(1, 6)), draw(st.integers(1, 9))
    n = draw(st.integers(1, max(m1, m2)))
    rank = draw(st.integers(1, min(b, m1)))
    return linear_problem(BlockLayout(m1, m2, n), b, rank, seeded(draw(st.integers(0, 10**6))))


def eigenvalues(method, theta=None):
    hessian = curvature.derivatives(method, method.start if theta is None else theta)[1]
    return torch.linalg.eigvalsh(hessian).flip(0)


def assert_spectrum(found, hessian_eigenvalues):
    """The nonzero eigenvalues with their multiplicity; the rest vanish."""
    scale = float(hessian_eigenvalues[0])
    torch.testing.assert_close(found, hessian_eigenvalues[: len(found)], rtol=1e-9, atol=1e-9 * scale)
    assert float(hessian_eigenvalues[len(found) :].abs().sum()) <= 1e-10 * scale


@given(linear_problems())
def test_closed_forms_are_the_hessians_eigenvalues(problem):
    A = starts.usual_start(*problem.W0.shape, 2, seeded(3)).A
    assert_spectrum(curvature.diablo_curvatures(problem), eigenvalues(parametrisations.diablo(problem)))
    assert_spectrum(curvature.frozen_curvatures(problem, A), eigenvalues(parametrisations.frozen_lora(problem, A)))
    one_block = LinearProblem(problem.X, problem.W0, problem.T, BlockLayout(*problem.W0.shape, 1))
    assert_spectrum(curvature.full_curvatures(problem), eigenvalues(parametrisations.diablo(one_block)))


def test_derivatives_equal_the_closed_forms():
    """DiaBlo's Hessian is X_i^T X_i for each output; LoRA's gradient vanishes at A = B = 0, its Hessian does not."""
    problem = linear_problem(BlockLayout(6, 4, 2), 9, 5, seeded(0))
    diablo = parametrisations.diablo(problem)
    gradient, hessian = curvature.derivatives(diablo, diablo.start)
    X, R = problem.X, problem.R
    squares = [torch.kron(X[:, s].T @ X[:, s], torch.eye(2).double()) for s in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(hessian, torch.block_diag(*squares), rtol=1e-12, atol=1e-12)
    expected = -torch.cat([(X[:, :3].T @ R[:, :2]).flatten(), (X[:, 3:].T @ R[:, 2:]).flatten()])
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    lora = parametrisations.lora(problem, starts.usual_start(6, 4, 1, seeded(1)))
    gradient, hessian = curvature.derivatives(lora, 0 * lora.start)
    assert not gradient.any()
    largest = float(torch.linalg.matrix_norm(X.T @ R, 2))
    assert float(torch.linalg.eigvalsh(hessian)[0]) == pytest.approx(-largest, rel=1e-12)


def test_loras_curvature_at_its_minimum_is_that_of_matrix_factorisation():
    """For X with orthogonal columns of length c, M = X^T R / c and rank 1: c (s_1 +- s_j), c s_1 and 2 c s_1."""
    c, m1, m2 = 1.7, 4, 3
    X = c * torch.linalg.qr(low_rank_inputs(9, m1, m1, seeded(0)))[0]
    s = [2.0, 0.7, 0.3]
    U, V = (torch.linalg.qr(low_rank_inputs(n, n, n, seeded(n)))[0] for n in (m1, m2))
    truth = U[:, :3] @ torch.diag(torch.tensor(s).double()) @ V.T
    problem = LinearProblem(X, torch.zeros(m1, m2).double(), X @ truth, BlockLayout(m1, m2, 1))
    method = parametrisations.lora(problem, starts.usual_start(m1, m2, 1, seeded(1)))
    minimum = parametrisations.best_factors(problem, 1)
    expected = [2 * s[0], s[0] + s[1], s[0] + s[2], s[0], s[0] - s[2], s[0] - s[1]]
    found = curvature.lora_curvatures(method, minimum, 1 * (m1 + m2 - 1))
    torch.testing.assert_close(found, c**2 * torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)
    assert_spectrum(found, eigenvalues(method, minimum))


@pytest.mark.parametrize(("step", "factor"), [(0.1, 0.9), (0.4, 0.6), (0.5, 1.0), (0.6, 1.4), (2.0, 7.0)])
def test_contraction_by_hand(step, factor):
    assert curvature.contraction(torch.tensor([4.0, 2.0, 1.0]).double(), step) == pytest.approx(factor)
