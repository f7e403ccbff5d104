import json
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sweep_tasks import cell, picky

from diablo_theory.errors import NonFiniteError
from diablo_theory.sweeps.task import one_thread, rows_to_json, run_task


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_comes_back_to_the_bit(value):
    [row] = json.loads(rows_to_json([{"value": value}]))
    assert row["value"].hex() == value.hex()


def test_types_and_the_order_of_columns_come_back():
    row = {"b": True, "a": 2**70, "c": 1.0, "text": "Grüße\n\ud800"}
    [back] = json.loads(rows_to_json([row]))
    assert list(back.items()) == list(row.items())
    assert [type(value) for value in back.values()] == [bool, int, float, str]


def test_a_task_computes_on_one_thread_and_gives_the_others_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert cell(size=2)[0]["threads"] == 3
        _, rows = run_task(cell, 0, {"size": 2})
        assert json.loads(rows)[0]["threads"] == 1
        with pytest.raises(ZeroDivisionError), one_thread():
            raise ZeroDivisionError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("nan", NonFiniteError, "column 'value' is nan; every number must be finite"),
        ("infinite", NonFiniteError, "column 'value' is -inf"),
        ("tensor", TypeError, r"column 'value' holds tensor\(1.\) \(Tensor\); names must be str and values str, int"),
        ("none", TypeError, r"column 'value' holds None \(NoneType\)"),
        ("number as name", TypeError, "column 1 holds 1"),
        ("row", TypeError, "must return a list of dictionaries, one a row, got {'a': 1}"),
        ("rows of numbers", TypeError, r"must return a list of dictionaries, one a row, got \[1\]"),
        ("fails", ZeroDivisionError, "by nought"),
        ("awkward", RuntimeError, "AwkwardError: this and that"),
    ],
)
def test_an_exception_is_an_outcome_that_other_processes_can_read(value, kind, message):
    index, error = pickle.loads(pickle.dumps(run_task(picky, 7, {"value": value})))
    assert index == 7
    with pytest.raises(kind, match=message):
        raise error
    assert "in picky" in error.__notes__[0] or "in rows_to_json" in error.__notes__[0]


def test_an_interrupt_is_not_an_outcome():
    with pytest.raises(KeyboardInterrupt):
        run_task(picky, 0, {"value": "interrupted"})


def test_finite_numbers_pass():
    assert run_task(picky, 0, {"value": -math.pi}) == (0, '[{"value": -3.141592653589793}]')
