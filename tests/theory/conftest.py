"""What the tests of the theory share."""

import jaxtyping
import pytest


@pytest.fixture
def unannotated():
    """As users run it: the annotations, checked in tests only, would otherwise speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
