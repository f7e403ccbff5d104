"""One table of tolerances, by quantity and dtype, each with the reason for its size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diablo_theory.errors import ConfigError, nearest

_EPS = {dtype: float(torch.finfo(dtype).eps) for dtype in (torch.float64, torch.float32)}


@dataclass(frozen=True)
class Tolerance:
    """How far a quantity may be off, and why that far.

    Args:
        value: The bound, in the unit that the quantity's reason states.
        reason: One sentence that derives it.
    """

    value: float
    reason: str


def _sums(what: str) -> dict[torch.dtype, Tolerance]:
    """4096 eps: an inner product of up to 4096 terms, reordered, moves by at most 4096 eps of its absolute sum."""
    return {
        dtype: Tolerance(
            4096 * eps, f"4096 eps: {what}; sums here have at most 4096 terms, and each may cost one eps."
        )
        for dtype, eps in _EPS.items()
    }


def _conditioned(squared: bool) -> dict[torch.dtype, Tolerance]:
    """The error of a fit X D through a pseudo-inverse: a few cond(X_i) eps, or the square of it for a gap."""
    exponents = {torch.float64: 20, torch.float32: 12}
    table = {}
    for dtype, eps in _EPS.items():
        fit = 2 ** exponents[dtype] * eps
        reason = f"a fit through X_i^+ is off by a few cond(X_i) eps <= 2^{exponents[dtype]} eps of ||P_X R||"
        if squared:
            table[dtype] = Tolerance(fit**2, f"(2^{exponents[dtype]} eps)^2: {reason}; a gap is its square.")
        else:
            table[dtype] = Tolerance(fit, f"2^{exponents[dtype]} eps: {reason}, so a loss moves by as much.")
    return table


_TABLE: dict[str, dict[torch.dtype, Tolerance]] = {
    "rank": _sums("singular values below this share of the largest count as zero, for the SVD's backward error"),
    "streamed": {
        torch.float64: Tolerance(
            64 * _EPS[torch.float64],
            "64 eps, times cond(X)^2: rounding in sums over tokens adds up like a random walk, to at most 64 eps of "
            "the largest eigenvalue of X^T X, which is cond(X)^2 times the smallest that is kept; relative to "
            "||R|| ||P_X R||.",
        ),
    },
    "gap": _conditioned(squared=True),
    "loss": _conditioned(squared=False),
    "gradient": _sums("relative difference of two gradients that add the same products in another order"),
    "linearity": _sums("relative defect of a map that is linear in exact arithmetic"),
    "convexity": _sums("relative excess of a midpoint's loss over the mean of the segment's ends"),
    "curvature": _sums("negative or between-block part of a Hessian, relative to its largest eigenvalue"),
    "chi-squared": {
        dtype: Tolerance(
            6.0,
            "6 standard deviations of a chi-squared with at least 10^4 degrees of freedom: by Laurent and Massart's "
            "bound, 2 sqrt(k x) + 2 x at x = 16.6, a false alarm in at most 2 exp(-16.6) = 1.3e-7 of the trials.",
        )
        for dtype in _EPS
    },
    "contraction": {
        torch.float64: Tolerance(
            64e6 * _EPS[torch.float64],
            "64 eps / 1e-6: gradients are followed down to 1e-6 of the first one, and one step rounds by at most 64 "
            "eps of that; absolute, on a ratio of two.",
        ),
    },
    "limit": {
        torch.float64: Tolerance(
            2e-10,
            "2 * 1e-10: descent goes on until its rate leaves 1e-10 of the first distance, and rounding, with "
            "lambda_max / lambda_min <= 88 for 2,000 steps to be enough, is far below that; relative to the limit.",
        ),
    },
    "nearby contraction": {
        torch.float64: Tolerance(
            2.0**-13,
            "2^-13: at 2^-26 of the minimum's norm the curvature differs from the minimum's by 2^-26, the gradient "
            "rounds by 2^-52 / 2^-26, and the instances' Hessians amplify either by at most 2^13.",
        ),
    },
    "arrival": {
        torch.float64: Tolerance(
            2.0**20 * 1e-12,
            "2^20 * 1e-12: descent stops where the gradient is 1e-6 of the first, and an excess is at most its square "
            "over 2 lambda_min, with lambda_max / lambda_min <= 2^16 and at most 16 times the captured loss at the "
            "start; relative to that captured loss.",
        ),
    },
    "stationarity": {
        torch.float64: Tolerance(
            1e-4,
            "1e-4: descent brings ||grad D|| below 1e-7 of ||grad W|| at the start, and the instances amplify that by "
            "at most 1e3, the conditioning that their shapes are chosen for.",
        ),
        torch.float32: Tolerance(
            8192 * _EPS[torch.float32],
            "8192 eps: points are found in float64; rounding them, and gradients there, to float32 leaves ||grad D|| "
            "below 64 eps of ||grad W|| at the start, and the instances amplify that by at most 128.",
        ),
    },
}

QUANTITIES: tuple[str, ...] = tuple(_TABLE)


def tolerance(quantity: str, dtype: torch.dtype = torch.float64) -> Tolerance:
    """Look one tolerance up.

    Args:
        quantity: One of ``QUANTITIES``.
        dtype: The precision in which the problem's tensors were given.

    Returns:
        The bound with its reason.

    Raises:
        ConfigError: If the quantity is unknown, or has no entry for the dtype.
    """
    if quantity not in _TABLE:
        raise ConfigError(f"unknown tolerance quantity {quantity!r}.{nearest(quantity, _TABLE)}")
    entries = _TABLE[quantity]
    if dtype not in entries:
        known = [str(known_dtype) for known_dtype in entries]
        raise ConfigError(f"no {quantity!r} tolerance for dtype {dtype}.{nearest(str(dtype), known)}")
    return entries[dtype]
