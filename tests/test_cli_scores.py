"""Intervals of scores, kept by what they were made of."""

import pytest

from diablo_theory.cli.scores import score_intervals
from diablo_theory.errors import ResultsError
from diablo_theory.reporting import intervals

HEADER = "item,cluster,prompt,answer,gold,completion,exact,mine,loss_sum,tokens"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIABLO_THEORY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "intervals"


def predictions(folder, solved):
    """A file of ten problems, and what metrics.json would say of it; ``mine`` is a metric that the schema lacks."""
    file = folder / "task.csv"
    rows = [f"{i},c{i},p{i},a,g,t,{float(i < solved)},1.0,{i + 1}.0,2" for i in range(10)]
    file.write_text("\n".join([HEADER, *rows]) + "\n")
    return file, {"n": 10, "exact": solved / 10, "mine": 1.0, "loss_per_token": 55 / 20, "means": {"exact": "right"}}


def never(*arguments):
    raise AssertionError


def test_they_are_computed_once_and_again_for_other_predictions(tmp_path, cache, monkeypatch):
    first = score_intervals(*predictions(tmp_path, 4))
    assert first["exact"] == intervals.wilson(4, 10)
    assert first["loss_per_token"].low < 2.75 < first["loss_per_token"].high
    assert first.keys() == {"exact", "loss_per_token"}
    with monkeypatch.context() as patch:
        patch.setattr(intervals, "score", never)
        assert score_intervals(*predictions(tmp_path, 4)) == first
        with pytest.raises(AssertionError):
            score_intervals(*predictions(tmp_path, 5))
    assert score_intervals(*predictions(tmp_path, 5))["exact"] == intervals.wilson(5, 10)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"exact": 3}', '{"exact": {"value": 1}}'])
def test_a_damaged_cache_is_made_anew(tmp_path, cache, content):
    first = score_intervals(*predictions(tmp_path, 4))
    (kept,) = cache.iterdir()
    kept.write_text(content)
    assert score_intervals(*predictions(tmp_path, 4)) == first
    assert kept.read_text() != content


def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIABLO_THEORY_CACHE", str(tmp_path / "file"))
    assert score_intervals(*predictions(tmp_path, 4))["exact"] == intervals.wilson(4, 10)


def test_predictions_that_do_not_give_the_scores_have_none(tmp_path, cache):
    file, scores = predictions(tmp_path, 4)
    with pytest.raises(ResultsError, match=r"task\.csv gives exact=0\.4 where metrics\.json says 0\.5"):
        score_intervals(file, scores | {"exact": 0.5})
    file.unlink()
    with pytest.raises(ResultsError, match=r"task\.csv cannot be read \(No such file"):
        score_intervals(file, scores)
    assert not cache.exists()
