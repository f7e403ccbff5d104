import math

import pytest

from diablo_theory.theory.tolerances import Tolerance
from diablo_theory.theory.verdicts import Premise, Trial, room

TRIAL, BOUND = Trial("L2", 3, "b=1"), Tolerance(1e-6, "because")


@pytest.mark.parametrize(
    ("role", "premise", "measured", "passed"),
    [
        ("claim", True, 0.0, True),
        ("claim", True, 1.0, False),
        ("claim", False, 0.0, False),
        ("control", False, 1.0, True),
        ("control", False, 0.0, False),
        ("control", True, 1.0, False),
        ("claim", True, math.nan, False),
    ],
)
def test_a_claim_needs_both_and_a_control_neither(role, premise, measured, passed):
    verdict = TRIAL.vanishes(role, "s", Premise(premise, 1.0), measured, BOUND)
    assert verdict.passed is passed
    assert (verdict.check, verdict.trial, verdict.instance) == ("L2", 3, "b=1")
    assert (verdict.tolerance, verdict.tolerance_reason) == (1e-6, "because")


def test_staying_positive_is_the_opposite_of_vanishing():
    for measured in (0.0, 1e-9, 1e-3, 1.0):
        zero = TRIAL.vanishes("claim", "s", Premise(True, 1.0), measured, BOUND)
        positive = TRIAL.stays_positive("claim", "s", Premise(True, 1.0), measured, BOUND)
        assert zero.claim_holds is not positive.claim_holds
        assert zero.claim_margin == -positive.claim_margin


@pytest.mark.parametrize(
    ("measured", "decades"), [(1e-9, 3), (1e-3, -3), (0.0, 16), (-1.0, 16), (math.nan, -16), (1e30, -16)]
)
def test_room_counts_decades(measured, decades):
    assert room(measured, 1e-6) == pytest.approx(decades)


def test_nan_neither_vanishes_nor_stays_positive():
    assert not TRIAL.stays_positive("claim", "s", Premise(True, 1.0), math.nan, BOUND).claim_holds
