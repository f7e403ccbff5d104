"""What the theory's tests share: annotations switched off, and the verdicts of a check that fail."""

import jaxtyping
import pytest


@pytest.fixture
def unannotated():
    """As users run it: the annotations, checked in tests only, would otherwise speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def failing():
    """The rows of one trial of a check that fail; those of a role if it is given."""
    from diablo_theory.theory.checks import run_checks  # not before jaxtyping's hook on imports is in place

    def rows(name, role=None):
        table = run_checks([name], trials=1)
        failed = table[~table.passed]
        return failed if role is None else failed[failed.role == role]

    return rows
