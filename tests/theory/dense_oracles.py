"""Minima of the linear problem by dense least squares in scipy, from X and R alone: slow, and easy to check by eye.

No batches, no coordinates of col X, no scales: what the closed forms do to be fast or safe is not done here.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.tolerances import tolerance

Array = np.ndarray


def numbers(problem: LinearProblem) -> tuple[Array, Array, float]:
    """X and R in float64, and the absolute level at or below which singular values of X's columns count as zero."""
    X, R = problem.X.double().numpy(), problem.R.double().numpy()
    return X, R, tolerance("rank", problem.X.dtype).value * norm(X)


def norm(matrix: Array) -> float:
    return float(np.linalg.norm(matrix, 2)) if matrix.size else 0.0


def fit(inputs: Array, targets: Array, cutoff: float) -> Array:
    """The smallest least-squares solution, without the singular values of ``inputs`` up to an absolute cutoff."""
    if norm(inputs) <= cutoff:
        return np.zeros((inputs.shape[1], targets.shape[1]))
    solution = scipy.linalg.lstsq(inputs, targets, cond=cutoff / norm(inputs))[0]
    return np.asarray(solution)


def half_square(matrix: Array) -> float:
    return float(0.5 * np.sum(np.square(matrix)))


def loss(problem: LinearProblem, dW: Array) -> float:
    X, R, _ = numbers(problem)
    return half_square(R - X @ dW)


def full(problem: LinearProblem) -> float:
    X, R, cutoff = numbers(problem)
    return half_square(R - X @ fit(X, R, cutoff))


def trained_entries(layout: BlockLayout) -> Array:
    """Entry (a, b) is trained where a and b fall in the same group."""
    rows = np.arange(layout.in_features)[:, None] // -(-layout.in_features // layout.num_blocks)
    cols = np.arange(layout.out_features)[None, :] // -(-layout.out_features // layout.num_blocks)
    return np.equal(rows, cols)


def masked(problem: LinearProblem) -> float:
    """DiaBlo, one output at a time, over the inputs that may reach it."""
    X, R, cutoff = numbers(problem)
    trained, total = trained_entries(problem.layout), 0.0
    for j in range(R.shape[1]):
        reached, column = X[:, trained[:, j]], R[:, j : j + 1]
        total += half_square(column - reached @ fit(reached, column, cutoff))
    return total


def eckart_young(problem: LinearProblem, rank: int) -> float:
    """LoRA, through a pivoted QR basis of col X."""
    X, R, cutoff = numbers(problem)
    Q, triangle, _ = scipy.linalg.qr(X, mode="economic", pivoting=True)
    Q = Q[:, np.abs(np.diag(triangle)) > cutoff]
    inside = Q.T @ R
    tail = np.linalg.svd(inside, compute_uv=False)[rank:] if inside.size else np.zeros(0)
    return half_square(R - Q @ inside) + half_square(tail)


def alternating(problem: LinearProblem, rank: int, restarts: int = 6, sweeps: int = 300) -> float:
    """LoRA, by alternating least squares over A and B from several random starts."""
    X, R, _ = numbers(problem)
    best, rng = np.inf, np.random.default_rng(0)
    for _ in range(restarts):
        A = rng.standard_normal((X.shape[1], rank))
        for _ in range(sweeps):
            B = scipy.linalg.lstsq(X @ A, R)[0]
            A = scipy.linalg.lstsq(X, R @ np.linalg.pinv(B))[0]
        B = scipy.linalg.lstsq(X @ A, R)[0]
        best = min(best, half_square(X @ A @ B - R))
    return best


def frozen(problem: LinearProblem, A: Array) -> float:
    """LoRA with A frozen."""
    X, R, cutoff = numbers(problem)
    return half_square(R - X @ A @ fit(X @ A, R, cutoff * norm(A)))


def tangent(problem: LinearProblem, A: Array, B: Array) -> float:
    """LoRA's directions at (A, B): one least-squares problem in all entries of dB and dA at once.

    Row-major, ``vec(X A dB) = (XA kron I) vec(dB)`` and ``vec(X dA B) = (X kron B^T) vec(dA)``.
    """
    X, R, _ = numbers(problem)
    design = np.hstack([np.kron(X @ A, np.eye(R.shape[1])), np.kron(X, B.T)])
    solution = fit(design, R.reshape(-1, 1), 1e-11 * norm(design))
    return half_square(R.reshape(-1, 1) - design @ solution)
