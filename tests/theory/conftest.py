"""What the tests of the checks share."""

import numpy as np
import pytest
import torch

from diablo_theory.theory.arithmetic import Arithmetic
from diablo_theory.theory.checks import run_checks


@pytest.fixture
def failing():
    """The verdicts of a check that did not pass, optionally those of one role."""

    def failing(name, role=None, trials=3):
        table = run_checks([name], trials=trials)
        failed = table[~table.passed]
        return failed if role is None else failed[failed.role == role]

    return failing


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def assert_passes(request):
    """Assert that every verdict of a check passes, with margins of the right sign."""

    def assert_passes(name, seed, trials=4):
        table = run_checks([name], trials=trials, seed=seed, arithmetic=Arithmetic(request.param))
        failed = table[~table.passed]
        assert failed.empty, failed.to_string()
        assert set(table.role) == {"claim", "control"}
        assert np.isfinite(table.select_dtypes("number").to_numpy()).all()
        assert ((table.premise_margin > 0) == table.premise_holds).all()
        assert ((table.claim_margin > 0) == table.claim_holds).all()

    return assert_passes
