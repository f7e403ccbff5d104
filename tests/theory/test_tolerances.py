import pytest
import torch

from diablo_theory.errors import ConfigError
from diablo_theory.theory.tolerances import QUANTITIES, tolerance


@pytest.mark.parametrize("quantity", QUANTITIES)
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


def test_an_unknown_quantity_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown tolerance quantity 'gradeint'\. Did you mean 'gradient'\?"):
        tolerance("gradeint")


def test_a_dtype_without_an_entry_is_named():
    with pytest.raises(ConfigError, match=r"no 'rank' tolerance for dtype torch\.float16\. Did you mean"):
        tolerance("rank", torch.float16)
