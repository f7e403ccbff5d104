"""What the theory's tests share: annotations switched off, and the verdicts of a check."""

import jaxtyping
import numpy as np
import pytest
import torch


@pytest.fixture
def unannotated():
    """As users run it: the annotations, checked in tests only, would otherwise speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def failing():
    """The verdicts of a check that did not pass; those of a role if it is given."""
    from diablo_theory.theory.checks import run_checks  # not before jaxtyping's hook on imports is in place

    def rows(name, role=None, trials=1):
        table = run_checks([name], trials=trials)
        failed = table[~table.passed]
        return failed if role is None else failed[failed.role == role]

    return rows


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def assert_passes(request):
    """Assert that every verdict of a check passes, with margins of the right sign."""

    def assert_passes(name, seed, trials=4):
        from diablo_theory.theory.arithmetic import Arithmetic
        from diablo_theory.theory.checks import run_checks

        table = run_checks([name], trials=trials, seed=seed, arithmetic=Arithmetic(request.param))
        failed = table[~table.passed]
        assert failed.empty, failed.to_string()
        assert set(table.role) == {"claim", "control"}
        assert np.isfinite(table.select_dtypes("number").to_numpy()).all()
        assert ((table.premise_margin > 0) == table.premise_holds).all()
        assert ((table.claim_margin > 0) == table.claim_holds).all()

    return assert_passes
