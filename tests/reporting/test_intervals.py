import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from diablo_theory.errors import ResultsError
from diablo_theory.reporting import intervals


def frame(exact, loss=None, tokens=None, seed=0, cluster=None, label="M"):
    n = len(exact)
    loss = np.ones(n) if loss is None else loss
    return pd.DataFrame(
        {
            "item": np.arange(n),
            "cluster": np.arange(n).astype(str) if cluster is None else cluster,
            "prompt": [f"p{i}" for i in range(n)],
            "answer": "1",
            "exact": exact,
            "lenient": np.nan,
            "loss_sum": loss,
            "tokens": np.ones(n) if tokens is None else tokens,
            "seed": seed,
            "label": label,
        }
    )


@pytest.mark.parametrize(("first", "second", "value"), [(0, 0, 0.0), (1, 0, 100.0), (1, 1, 0.0), (0, 1, -100.0)])
def test_a_difference_of_what_does_not_vary_still_has_a_width(first, second, value):
    clusters = np.repeat(np.arange(10), 3).astype(str)
    one, two = (frame(np.full(30, exact), cluster=clusters) for exact in (first, second))
    found = intervals.paired_difference(one, two, "exact_match")
    bound = intervals.wilson(0, 10).high
    assert found.value == value
    # Wilson's interval of each side leaves by so much; the two add up in squares where both can.
    assert max(found.high - value, value - found.low) >= bound - 1e-9
    assert found.high - found.low <= 2 * bound * 2**0.5


def test_wilson_against_the_formula():
    n, p, z = 50, 0.8, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = intervals.wilson(40, 50)
    assert (found.value, found.low, found.high) == pytest.approx((80, 100 * (centre - half), 100 * (centre + half)))
    assert intervals.wilson(0, 50).high > 5


def test_one_seed_of_independent_problems_uses_wilson():
    exact = np.array([1, 0, 1, 1])
    assert intervals.score(frame(exact), "exact_match") == intervals.wilson(3, 4)


@pytest.mark.parametrize(("solved", "expected"), [(0, 0.0), (1, 100.0)])
def test_all_or_none_solved_still_has_a_width(solved, expected):
    clusters = np.repeat(np.arange(10), 3).astype(str)
    found = intervals.score(frame(np.full(30, solved), cluster=clusters), "exact_match")
    assert found.value == expected
    assert found.high - found.low == pytest.approx(100 - intervals.wilson(10, 10).low)


def test_loss_per_token_weighs_by_tokens_and_matches_the_normal_interval():
    rng = np.random.default_rng(1)
    loss = rng.gamma(4.0, 1.0, size=400)
    found = intervals.score(frame(np.ones(400), loss=loss), "loss_per_token")
    half = t.ppf(0.975, 399) * loss.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((loss.mean() - half, loss.mean() + half), rel=0.01)
    weighed = intervals.score(frame([1, 1], loss=np.array([1.0, 9.0]), tokens=np.array([1, 4])), "loss_per_token")
    assert weighed.value == pytest.approx(2.0)


def test_coverage_of_the_paired_difference():
    rng, covered, trials = np.random.default_rng(0), 0, 40
    for _ in range(trials):
        skill = rng.random(100)
        one, two = (rng.random(100) < skill).astype(int), (rng.random(100) < skill**2).astype(int)
        found = intervals.paired_difference(frame(one), frame(two), "exact_match")
        covered += found.low <= 100 * (1 / 2 - 1 / 3) <= found.high
    assert covered >= 0.88 * trials


def test_clusters_widen_the_interval():
    exact = np.repeat(np.random.default_rng(0).integers(0, 2, 40), 5)
    together = intervals.score(frame(exact, cluster=np.repeat(np.arange(40), 5).astype(str)), "exact_match")
    apart = intervals.score(frame(exact), "exact_match")
    assert together.stderr > 1.8 * apart.stderr
    alone = intervals.score(frame(exact, cluster=np.full(200, "same")), "exact_match")
    assert alone == apart


def test_seeds_are_averaged_and_resampled():
    good, bad = np.r_[np.ones(90), np.zeros(10)], np.r_[np.ones(50), np.zeros(50)]
    both = pd.concat([frame(good, seed=0), frame(bad, seed=1)])
    found = intervals.score(both, "exact_match")
    assert (found.value, found.seeds, found.n) == (70.0, 2, 100)
    assert found.low < 52 < 88 < found.high


def test_the_same_answers_differ_by_nothing():
    exact = np.random.default_rng(0).integers(0, 2, 30)
    found = intervals.paired_difference(frame(exact), frame(exact), "exact_match")
    # No problem of 30 told them apart: of how many others could one do so?
    bound = intervals.wilson(0, 30).high
    assert (found.value, found.low, found.high) == (0, -bound, bound)
    assert found.contains_zero


def test_intervals_end_where_their_quantity_does():
    """Three seeds of which one has collapsed: Student's interval alone goes far beyond what can be."""
    rng = np.random.default_rng(0)
    exact, loss = (rng.random((3, 60)) < 0.8).astype(int), rng.gamma(2.0, 1.0, (3, 60))
    exact[1], loss[1] = 0, 50
    one = pd.concat([frame(exact[s], loss=loss[s], seed=s) for s in range(3)])
    other = pd.concat([frame((rng.random(60) < 0.8).astype(int), seed=s) for s in range(3)])
    assert intervals.score(one, "loss_per_token").low == 0.0
    assert intervals.score(one, "exact_match").low == 0.0
    assert intervals.paired_difference(one, other, "exact_match").low == -100.0
    assert intervals.paired_difference(other, one, "exact_match").high == 100.0
    assert intervals.paired_difference(other, one, "loss_per_token").low < 0  # which a difference may be


def test_paired_is_narrower_than_unpaired():
    rng = np.random.default_rng(0)
    loss = rng.gamma(2.0, 1.0, size=200)
    one, two = frame(np.ones(200), loss=loss), frame(np.ones(200), loss=loss + 0.1 + 0.01 * rng.normal(size=200))
    found = intervals.paired_difference(one, two, "loss_per_token")
    assert found.value == pytest.approx(-0.1, abs=0.01)
    assert not found.contains_zero
    assert found.stderr < 0.1 * intervals.score(one, "loss_per_token").stderr


def test_only_shared_seeds_are_paired():
    exact = np.array([1, 0, 1, 1])
    two_seeds = pd.concat([frame(exact, seed=0), frame(1 - exact, seed=1)])
    assert intervals.paired_difference(two_seeds, frame(exact, seed=0), "exact_match").seeds == 1
    with pytest.raises(ResultsError, match="share no seed"):
        intervals.paired_difference(frame(exact, seed=3), frame(exact, seed=0), "exact_match")


def test_different_problems_are_refused():
    one = frame([1, 0, 1], label="DiaBlo N=64")
    with pytest.raises(ResultsError, match="DiaBlo N=64 and LoRA r=5 were not tested on the same problems"):
        intervals.paired_difference(one, one.assign(prompt="other", label="LoRA r=5"), "exact_match")
    named = one.assign(run_id="a/b", label="M")
    with pytest.raises(ResultsError, match=r"M \(a/b\) and M \(a/b\) were not tested on the same problems"):
        intervals.paired_difference(named, named.assign(cluster="other"), "exact_match")
    with pytest.raises(ResultsError, match="seeds did not answer the same test problems"):
        intervals.score(pd.concat([one, one.assign(seed=1, cluster="other")]), "exact_match")
    with pytest.raises(ResultsError, match="seeds did not answer the same test problems"):
        intervals.score(pd.concat([one, frame([1, 0], seed=1)]), "exact_match")


def test_bootstrap_is_deterministic_and_seeded():
    loss = np.random.default_rng(0).gamma(2.0, 1.0, size=50)
    items = frame(np.ones(50), loss=loss)
    assert intervals.score(items, "loss_per_token") == intervals.score(items, "loss_per_token")
    assert intervals.score(items, "loss_per_token", seed=1) != intervals.score(items, "loss_per_token")


def test_time_ratio_pairs_rounds():
    drift = np.linspace(1, 5, 11)  # the machine slows down; the ratio does not
    rows = [(r, m, d * s) for r, d in enumerate(drift) for m, s in (("full", 2.0), ("diablo", 1.0))]
    times = pd.DataFrame(rows, columns=["round", "method", "seconds"])
    found = intervals.time_ratio(times, "diablo", "full")
    assert (found.value, found.low, found.high, found.n) == pytest.approx((0.5, 0.5, 0.5, 11))
    assert np.isnan(intervals.time_ratio(times, "lora", "full").value)
    assert np.isnan(intervals.time_ratio(times.drop(index=range(1, 22)), "diablo", "full").value)


def test_too_few_rounds_have_no_interval_for_a_median():
    times = pd.DataFrame(
        [(r, m, s + 0.01 * r) for r in range(5) for m, s in (("full", 2.0), ("diablo", 1.0))],
        columns=["round", "method", "seconds"],
    )
    found = intervals.time_ratio(times, "diablo", "full")
    assert 0.5 <= found.value < 0.52
    assert np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize("seed_spread", [0.0, 0.3], ids=["items alone", "seeds dominate"])
def test_intervals_over_three_seeds_cover_what_they_say(seed_spread):
    """Loss of a method whose expected value is 1, with and without an effect of the training seed."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        item_effect = rng.normal(0, 0.2, size=60)  # the same problems for every seed
        seeds = [
            frame(np.ones(60), loss=1 + item_effect + rng.normal(0, seed_spread) + rng.normal(0, 0.1, 60), seed=seed)
            for seed in range(3)
        ]
        found = intervals.score(pd.concat(seeds), "loss_per_token")
        covered += found.low <= 1 <= found.high
    assert 0.91 <= covered / 200 <= 1.0


def test_a_metric_that_the_task_lacks_is_nan():
    assert np.isnan(intervals.score(frame([1, 0]), "lenient_match").value)


def test_an_average_over_tasks_is_plain_and_counts_the_seeds_once():
    """Published averages weigh tasks alike; a training that went well lifts all of its tasks."""
    rng = np.random.default_rng(0)
    easy, hard = (
        pd.concat(
            [frame((rng.random(n) < share + lift).astype(float), seed=s) for s, lift in enumerate((0, 0.1, 0.2))]
        )
        for n, share in ((200, 0.6), (50, 0.2))
    )
    one, two = (intervals.score(task, "exact_match") for task in (easy, hard))
    found = intervals.mean_score([easy, hard], "exact_match")
    assert found.value == pytest.approx((one.value + two.value) / 2)
    assert (found.n, found.seeds) == (250, 3)
    means = pd.concat([easy, hard]).assign(task=[0] * 600 + [1] * 150).groupby(["seed", "task"])["exact"].mean()
    between = (100 * means.groupby("seed").mean()).var() / 3
    items = [t.groupby("item")["exact"].mean().var() * 1e4 / t["item"].nunique() for t in (easy, hard)]
    assert found.stderr == pytest.approx((between + sum(items) / 4) ** 0.5, rel=0.02)


def test_an_average_needs_the_same_seeds_and_has_a_width_where_all_is_solved():
    with pytest.raises(ResultsError, match="not every task was scored for the same seeds"):
        intervals.mean_score([frame(np.ones(4)), frame(np.ones(4), seed=1)], "exact_match")
    found = intervals.mean_score([frame(np.ones(10)), frame(np.ones(20))], "exact_match")
    assert (found.value, found.high) == (100.0, 100.0)
    # Tasks weigh alike: the smaller one's width counts in full.
    widths = [100 - intervals.wilson(n, n).low for n in (10, 20)]
    assert found.low == pytest.approx(100 - np.hypot(*widths) / 2)
    apart = intervals.mean_score([frame(np.ones(20)), frame(np.zeros(20))], "exact_match")
    assert apart.value == 50.0
    assert apart.high - apart.low == pytest.approx(2 * intervals.wilson(0, 20).high / 2)
    assert np.isnan(intervals.mean_score([frame(np.ones(4)), frame(np.ones(4))], "lenient_match").value)


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_the_difference_of_two_scores_is_newcombe_s(n, m, p, q):
    one, two = intervals.wilson(round(p * n), n), intervals.wilson(round(q * m), m)
    found = intervals.independent_difference(one, two)
    below = ((one.value - one.low) ** 2 + (two.high - two.value) ** 2) ** 0.5
    above = ((one.high - one.value) ** 2 + (two.value - two.low) ** 2) ** 0.5
    assert (found.low, found.high) == pytest.approx((found.value - below, found.value + above))
    back = intervals.independent_difference(two, one)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low), abs=1e-9)


def test_resamples_are_drawn_in_one_stream_and_in_little_memory():
    units = 3000
    tracemalloc.start()
    counts = intervals._counts.__wrapped__(units, 7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * intervals.RESAMPLES * units  # doubles would take eight bytes each
    whole = np.random.default_rng(7).multinomial(units, np.full(units, 1 / units), size=1200)
    np.testing.assert_array_equal(counts[:1200], whole)
    assert (counts.sum(axis=1) == units).all()


def test_a_cluster_weighs_as_many_times_as_it_is_drawn():
    rng = np.random.default_rng(3)
    top, bottom = rng.random((2, 9)), 1 + rng.random((2, 9))
    clusters = np.array([0, 1, 1, 2, 0, 3, 3, 3, 2])
    (draws,) = intervals._resample([(top, bottom)], clusters, 5)
    counts = intervals._counts(4, 5).astype(float)
    each = [(top[seed] * counts[:, clusters]).sum(1) / (bottom[seed] * counts[:, clusters]).sum(1) for seed in (0, 1)]
    np.testing.assert_allclose(draws, np.mean(each, axis=0))
