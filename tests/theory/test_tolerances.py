import math

import pytest
import scipy.stats
import torch

from diablo_theory.errors import ConfigError
from diablo_theory.theory.tolerances import QUANTITIES, tolerance


@pytest.mark.parametrize("quantity", [name for name in QUANTITIES if name != "chi-squared"])
def test_every_entry_is_small_positive_and_explained(quantity):
    entry = tolerance(quantity)
    largest = 10 if quantity == "chi-squared" else 1e-3  # that one is in standard deviations
    assert torch.finfo(torch.float64).eps ** 2 < entry.value < largest
    assert len(entry.reason.split()) >= 8
    assert entry.reason.endswith(".")


@pytest.mark.parametrize("quantity", ["rank", "gap", "loss", "gradient"])
def test_float32_allows_more(quantity):
    assert tolerance(quantity, torch.float32).value > 1e4 * tolerance(quantity, torch.float64).value


def test_a_gap_is_the_square_of_a_fit():
    for dtype in (torch.float32, torch.float64):
        assert tolerance("gap", dtype).value == tolerance("loss", dtype).value ** 2


def test_a_sum_of_squares_has_a_stated_risk_of_false_alarm():
    """Laurent and Massart: beyond 2 sqrt(k x) + 2 x with probability at most exp(-x); the exact one is far smaller."""
    entry, k = tolerance("chi-squared"), 10_000
    assert tolerance("chi-squared", torch.float32) == entry
    beyond = entry.value * (2 * k) ** 0.5
    assert beyond >= 2 * (k * 16.6) ** 0.5 + 2 * 16.6
    assert scipy.stats.chi2.sf(k + beyond, k) + scipy.stats.chi2.cdf(k - beyond, k) < 2 * math.exp(-16.6)


def test_an_unknown_quantity_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown tolerance quantity 'gradeint'\. Did you mean 'gradient'\?"):
        tolerance("gradeint")


def test_a_dtype_without_an_entry_is_named():
    with pytest.raises(ConfigError, match=r"no 'rank' tolerance for dtype torch\.float16\. Did you mean"):
        tolerance("rank", torch.float16)
