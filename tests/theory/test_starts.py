import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import NonFiniteError
from diablo_theory.theory import optima, starts
from diablo_theory.theory.arithmetic import gaussian, seeded
from diablo_theory.theory.column_space import column_space
from diablo_theory.theory.problems import LinearProblem, low_rank_inputs
from diablo_theory.theory.reduction import ReducedProblem, reduce_problem
from diablo_theory.theory.statistics import LayerStatistics

SIZES = st.tuples(st.integers(1, 10), st.integers(1, 10))


def reduced(X, R):
    W0 = torch.zeros(X.shape[1], R.shape[1], dtype=torch.float64)
    return reduce_problem(LinearProblem(X, W0, R, BlockLayout(*W0.shape, 1)))


def truncated(matrix, rank):
    U, sigma, Vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vh[:rank]


def decaying(rows, cols, decay):
    """A matrix whose singular values fall by a constant factor."""
    generator = seeded(rows + cols)
    U, V = (torch.linalg.qr(gaussian(n, min(rows, cols), generator)).Q for n in (rows, cols))
    return U @ torch.diag(decay ** torch.arange(min(rows, cols), dtype=torch.float64)) @ V.T


@given(SIZES, st.integers(0, 12))
def test_the_usual_start_is_pefts_and_opens_nothing_yet(sizes, rank):
    m1, m2 = sizes
    start = starts.usual_start(m1, m2, rank, seeded(0))
    assert (start.name, start.A.shape, start.B.shape) == ("usual", (m1, rank), (rank, m2))
    assert start.A.dtype == start.B.dtype == torch.float64
    assert not start.B.any()
    assert start.A.abs().max() <= m1**-0.5 if rank else True
    assert torch.equal(start.A, starts.usual_start(m1, m2, rank, seeded(0)).A)


def test_the_usual_start_has_the_variance_of_kaimings():
    peft = torch.empty(200, 100)
    torch.nn.init.kaiming_uniform_(peft, a=5**0.5, generator=seeded(1))
    A = starts.usual_start(100, 3, 200, seeded(0)).A
    assert float(A.mean()) == pytest.approx(0, abs=2e-3)
    assert float(A.std()) == pytest.approx(float(peft.std()), rel=0.02)
    assert float(A.abs().max()) == pytest.approx(float(peft.abs().max()), rel=0.01)


@given(SIZES, st.data())
def test_pissa_is_the_best_approximation_of_the_weight(sizes, data):
    rank = data.draw(st.integers(0, min(sizes)))
    W0 = gaussian(*sizes, seeded(sum(sizes)))
    start = starts.pissa_start(W0, rank)
    assert (start.name, start.A.shape, start.B.shape) == ("pissa", (sizes[0], rank), (rank, sizes[1]))
    np.testing.assert_allclose(start.A @ start.B, truncated(W0, rank), atol=1e-12)
    np.testing.assert_allclose(start.A.norm(dim=0), start.B.norm(dim=1), rtol=1e-10)


@pytest.mark.parametrize("streamed", [False, True])
@given(st.integers(1, 12), st.integers(1, 8), st.data())
def test_eva_spans_the_leading_right_singular_vectors_of_the_input(streamed, rows, m1, data):
    inner, rank = data.draw(st.integers(0, min(rows, m1))), data.draw(st.integers(0, m1))
    X = low_rank_inputs(rows, m1, inner, seeded(rows + 20 * m1))
    space = LayerStatistics.of([(X, X[:, :1])]).reduce().space if streamed else column_space(X)
    start = starts.eva_start(space, 3, rank)
    assert (start.name, start.A.shape, start.B.shape) == ("eva", (m1, rank), (rank, 3))
    assert not start.B.any()
    kept = min(rank, inner)
    V = np.linalg.svd(X.numpy())[2][:kept].T
    np.testing.assert_allclose(start.A[:, :kept] @ start.A[:, :kept].T, V @ V.T, atol=1e-6)
    assert not start.A[:, kept:].any()


@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 9))
def test_lora_ga_holds_the_gradients_leading_directions(m1, m2, seed):
    rank = seed % (min(m1, m2) // 2 + 1)
    X, R = gaussian(14, m1, seeded(seed)), gaussian(14, m2, seeded(seed + 1))
    start = starts.lora_ga_start(reduced(X, R), rank)
    assert (start.name, start.A.shape, start.B.shape) == ("lora-ga", (m1, rank), (rank, m2))
    U, _, Vh = np.linalg.svd(X.numpy().T @ R.numpy())
    np.testing.assert_allclose(start.A @ start.A.T, U[:, :rank] @ U[:, :rank].T, atol=1e-9)
    rows = Vh[rank : 2 * rank]
    np.testing.assert_allclose(start.B.T @ start.B, rows.T @ rows, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_lora_gas_tangent_captures_the_best_of_twice_the_rank_where_inputs_are_orthonormal(rank):
    X, R = torch.linalg.qr(gaussian(20, 8, seeded(0))).Q, gaussian(20, 7, seeded(1))
    problem = reduced(X, R)
    start = starts.lora_ga_start(problem, rank)
    gap = float(optima.lora_tangent_optimum(problem, start.A, start.B).gap)
    assert gap == pytest.approx(float(optima.lora_optimum(problem, 2 * rank).gap), rel=1e-10)
    usual = starts.usual_start(8, 7, rank, seeded(2))
    other = float(optima.lora_tangent_optimum(problem, usual.A, usual.B).gap)
    assert other > gap * 1.1 if rank else other == gap


@given(SIZES, st.data())
def test_corda_is_the_truncated_product_taken_back(sizes, data):
    m1, m2 = sizes
    rank = data.draw(st.integers(0, min(sizes)))
    X, W0 = gaussian(30, m1, seeded(m1)), gaussian(m1, m2, seeded(m2 + 99))
    start = starts.corda_start(column_space(X), W0, rank)
    assert (start.name, start.A.shape, start.B.shape) == ("corda", (m1, rank), (rank, m2))
    G = X.numpy().T @ X.numpy()
    expected = truncated(W0.T @ torch.from_numpy(G), rank) @ np.linalg.inv(G)
    np.testing.assert_allclose(start.A @ start.B, expected.T, rtol=1e-7, atol=1e-9)


def test_corda_reads_a_singular_gram_matrix_through_its_pseudo_inverse():
    X, W0 = low_rank_inputs(30, 8, 3, seeded(0)), gaussian(8, 6, seeded(1))
    start = starts.corda_start(column_space(X), W0, 6)
    inside = np.linalg.pinv(X.numpy(), rcond=1e-11) @ X.numpy()
    np.testing.assert_allclose(start.A @ start.B, inside @ W0.numpy(), atol=1e-10)
    assert torch.linalg.matrix_rank(start.A) == 3


def data_aware(rank, iterations):
    """All starts that take an SVD, on a layer whose spectra fall by half."""
    X, W0 = decaying(60, 40, 0.7), decaying(40, 30, 0.5)
    problem = reduced(X, X @ decaying(40, 30, 0.6))
    return [
        starts.pissa_start(W0, rank, iterations),
        starts.lora_ga_start(problem, rank, iterations),
        starts.corda_start(problem.space, W0, rank, iterations),
    ]


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_sketches_are_close_to_exact_on_decaying_spectra(rank):
    for exact, sketched in zip(data_aware(rank, None), data_aware(rank, 4), strict=True):
        assert exact.name == sketched.name
        np.testing.assert_allclose(sketched.A @ sketched.A.T, exact.A @ exact.A.T, atol=1e-6)
        np.testing.assert_allclose(sketched.B.T @ sketched.B, exact.B.T @ exact.B, atol=1e-6)


def test_a_sketch_of_a_full_rank_matrix_is_not_exact_and_iterations_help():
    W0 = gaussian(80, 60, seeded(0))
    best = truncated(W0, 5)
    errors = [
        np.linalg.norm((start.A @ start.B).numpy() - best)
        for start in (starts.pissa_start(W0, 5, iterations) for iterations in (0, 2, 40))
    ]
    assert errors[0] > 1.1 * errors[1] > 2 * errors[2]
    assert errors[2] < 0.05 * np.linalg.norm(best)


def test_sketches_are_deterministic_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = data_aware(3, 1), data_aware(3, 1)
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.A, two.A)
        assert torch.equal(one.B, two.B)


@pytest.mark.usefixtures("unannotated")
def test_batches_are_named():
    several, one = torch.zeros(3, 6, 4).double(), gaussian(6, 4, seeded(0))
    space = column_space(torch.zeros(3, 9, 6).double())
    problem = ReducedProblem(space, torch.zeros(3, 6, 4).double(), torch.zeros(3).double(), torch.zeros(3).long())
    for start, name in (
        (lambda: starts.pissa_start(several, 2), "W0"),
        (lambda: starts.corda_start(space, one, 2), "space"),
        (lambda: starts.eva_start(space, 4, 2), "space"),
        (lambda: starts.lora_ga_start(problem, 2), "problem"),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be one matrix, got a batch of shape \(3, 6, "):
            start()


def test_ranks_out_of_range_are_named():
    problem, W0 = reduced(gaussian(9, 6, seeded(0)), gaussian(9, 5, seeded(1))), gaussian(6, 5, seeded(2))
    for call, largest in (
        (lambda rank: starts.pissa_start(W0, rank), 5),
        (lambda rank: starts.eva_start(problem.space, 5, rank), 6),
        (lambda rank: starts.lora_ga_start(problem, rank), 2),
        (lambda rank: starts.corda_start(problem.space, W0, rank), 5),
    ):
        assert call(0).A.shape == (6, 0)
        assert call(largest).A.shape == (6, largest)
        for rank in (-1, largest + 1):
            with pytest.raises(ValueError, match=f"rank must be from 0 to {largest}, got {rank}"):
                call(rank)
    with pytest.raises(ValueError, match="rank must be at least 0, got -1"):
        starts.usual_start(6, 5, -1, seeded(0))


def test_other_bad_input_is_named():
    space = column_space(gaussian(9, 6, seeded(0)))
    with pytest.raises(ValueError, match="iterations must be at least 0, got -1"):
        starts.pissa_start(gaussian(6, 5, seeded(1)), 2, -1)
    with pytest.raises(ValueError, match="W0 must have 6 rows, got 5"):
        starts.corda_start(space, gaussian(5, 6, seeded(1)), 2)
    for call in (lambda W0: starts.pissa_start(W0, 1), lambda W0: starts.corda_start(space, W0, 1)):
        with pytest.raises(NonFiniteError, match="W0 holds a NaN or an infinity"):
            call(torch.full((6, 5), float("nan")))
        with pytest.raises(ValueError, match=r"W0 must be a float32 or float64 matrix, got torch\.bfloat16"):
            call(torch.zeros(6, 5).bfloat16())
