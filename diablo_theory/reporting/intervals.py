"""95% intervals: Wilson for a proportion, the bootstrap for sums, paired differences and ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest, quantile_test, ttest_rel
from scipy.stats import t as student

from diablo_theory.errors import ResultsError

CONFIDENCE = 0.95
RESAMPLES = 10_000
_AT_ONCE = 500  # resamples that are worked on together: of 10,000 problems 40 MB
METRICS = {  # metric: (numerator, denominator, factor)
    "exact_match": ("exact", None, 100.0),
    "lenient_match": ("lenient", None, 100.0),
    "loss_per_token": ("loss_sum", "tokens", 1.0),
}
#: Those that only some tasks have: shares of each problem from 0 to 1.
METRICS_OF_SOME = {
    name: (name, None, 100.0) for name in ("likelihood", "pass@1", "pass@5", "pass@10", "safe", "safe_response")
}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval.

    Attributes:
        value: The estimate itself, the mean over seeds.
        low: Lower end of the interval.
        high: Upper end of the interval.
        stderr: Standard error.
        n: Test problems (or rounds) behind it.
        seeds: Training seeds behind it.
    """

    value: float
    low: float
    high: float
    stderr: float
    n: int
    seeds: int = 1

    @property
    def contains_zero(self) -> bool:
        """Whether the interval contains zero (or is unknown): for a difference, "no difference seen"."""
        return not (self.low > 0.0 or self.high < 0.0)

    def within(self, low: float = -np.inf, high: float = np.inf) -> bool | None:
        """Whether the whole interval lies between two limits; None where a part of it does."""
        if self.low >= low and self.high <= high:
            return True
        return False if self.high < low or self.low > high else None


def wilson(successes: int, n: int) -> Estimate:
    """Wilson's interval for a proportion, in per cent.

    Args:
        successes: How many of the problems were solved.
        n: How many problems there were.

    Returns:
        The percentage with its interval, which is sensible at 0% and at 100% too.
    """
    interval = binomtest(successes, n).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    share = successes / n
    stderr = 100 * float(np.sqrt(share * (1 - share) / n))
    return Estimate(100 * share, 100 * float(interval.low), 100 * float(interval.high), stderr, n)


def score(items: pd.DataFrame, metric: str, seed: int = 0) -> Estimate:
    """One method's score over its test problems, averaged over its training seeds.

    One seed and independent problems: Wilson's interval for a percentage. Otherwise the bootstrap over clusters of
    problems, with the spread between seeds added; where there is nothing to resample (all solved, or none), Wilson's
    over the clusters.

    Args:
        items: Rows of one task and method: ``item, cluster, seed`` and the metric's columns.
        metric: One of ``METRICS`` or ``METRICS_OF_SOME``.
        seed: Seed of the bootstrap.

    Returns:
        The score (per cent, or nats per token) with its interval; NaN where the task does not have the metric.

    Raises:
        ResultsError: If the seeds did not answer the same problems.
    """
    top, bottom, clusters = _cube(items, metric)
    seeds, n = top.shape
    if np.isnan(top).any():
        return Estimate(np.nan, np.nan, np.nan, np.nan, n, seeds)
    units = int(clusters.max()) + 1
    percentage = _columns(metric)[1] is None
    if percentage and seeds == 1 and units == n and np.isin(top, (0.0, 100.0)).all():
        return wilson(round(top.sum() / 100), n)
    value = float(_by_seed(top, bottom).mean())
    if percentage and value in (0.0, 100.0):
        return _of_all_or_none(value, units, n, seeds)
    (draws,) = _resample([(top, bottom)], clusters, seed)
    found = _estimate(draws, _by_seed(top, bottom), units, n)
    # Nothing measured lies below nought: Student's interval over seeds that differ much may.
    return _within(found, 0.0, 100.0 if percentage else np.inf)


def mean_score(tasks: Sequence[pd.DataFrame], metric: str, seed: int = 0) -> Estimate:
    """The plain mean of one method's scores on several tasks, as published averages are made.

    Problems are resampled task by task; seeds enter as a whole, since one training stands behind all tasks.

    Args:
        tasks: For each task what :func:`score` takes; the same seeds in all of them.
        metric: One of ``METRICS`` or ``METRICS_OF_SOME``.
        seed: Seed of the bootstrap.

    Returns:
        The mean with its interval; NaN where a task does not have the metric. ``n`` counts all problems.

    Raises:
        ResultsError: If a task's seeds did not answer the same problems, or the tasks have different seeds.
    """
    seeds = [tuple(sorted(set(items["seed"]))) for items in tasks]
    if len(set(seeds)) > 1:
        raise ResultsError(f"{_name(tasks[0])}: not every task was scored for the same seeds.")
    cubes = [_cube(items, metric) for items in tasks]
    n = sum(top.shape[1] for top, _, _ in cubes)
    if any(np.isnan(top).any() for top, _, _ in cubes):
        return Estimate(np.nan, np.nan, np.nan, np.nan, n, len(seeds[0]))
    draws = [_resample([(top, bottom)], clusters, seed)[0] for top, bottom, clusters in cubes]
    # In another order they are independent of other tasks', and the resamples need not be drawn again.
    rng = np.random.default_rng(seed)
    draws = [rng.permutation(draw) for draw in draws]
    by_seed = np.mean([_by_seed(top, bottom) for top, bottom, _ in cubes], axis=0)
    units = [int(clusters.max()) + 1 for _, _, clusters in cubes]
    found = _estimate(np.mean(draws, axis=0), by_seed, min(units), n)
    if _columns(metric)[1] is not None:
        return _within(found, 0.0, np.inf)
    # A task that is all solved, or not at all, leaves nothing to resample; it has the width of Wilson's interval.
    below, above = [found.value - found.low], [found.high - found.value]
    for (top, _, _), count in zip(cubes, units, strict=True):
        if np.ptp(top) == 0 and top.flat[0] in (0.0, 100.0):
            bound = _of_all_or_none(float(top.flat[0]), count, n, len(seeds[0]))
            below.append((bound.value - bound.low) / len(cubes))
            above.append((bound.high - bound.value) / len(cubes))
    low, high = found.value - float(np.linalg.norm(below)), found.value + float(np.linalg.norm(above))
    return _within(replace(found, low=low, high=high), 0.0, 100.0)


def independent_difference(first: Estimate, second: Estimate) -> Estimate:
    """Difference ``first - second`` of two scores that cannot be paired, from their own intervals.

    Where both were scored on the same problems this is wider than it need be.

    Source: Zou and Donner (2008), the method of variance estimates recovery (MOVER); Newcombe's method 10 is the same
    for two Wilson intervals.
    """
    below = float(np.hypot(first.value - first.low, second.high - second.value))
    above = float(np.hypot(first.high - first.value, second.value - second.low))
    value, error = first.value - second.value, float(np.hypot(first.stderr, second.stderr))
    return Estimate(value, value - below, value + above, error, min(first.n, second.n), min(first.seeds, second.seeds))


def paired_difference(first: pd.DataFrame, second: pd.DataFrame, metric: str, seed: int = 0) -> Estimate:
    """Difference ``first - second`` of two methods' scores over the same problems and the seeds both have.

    Each resample draws clusters of problems once for both methods; seeds enter as :func:`_estimate` says. Percentages
    that leave nothing to resample get an interval over the clusters: Newcombe's where neither side varies (all solved
    or none), and where both solved the very same problems, as far either way as Wilson's goes for no cluster of all.

    Args:
        first: Rows of one task and method.
        second: Rows of the same task and another method.
        metric: One of ``METRICS`` or ``METRICS_OF_SOME``.
        seed: Seed of the bootstrap.

    Returns:
        The difference (percentage points, or nats per token) with its interval.

    Raises:
        ResultsError: If the two did not answer the same problems or share no seed.
    """
    shared = sorted(set(first["seed"]) & set(second["seed"]))
    if not shared:
        raise ResultsError(f"{_name(first)} and {_name(second)} share no seed, so they cannot be paired.")
    first, second = (side[side["seed"].isin(shared)] for side in (first, second))
    _same_problems(first, second)
    top1, bottom1, clusters = _cube(first, metric)
    top2, bottom2, _ = _cube(second, metric)
    if np.isnan(top1).any() or np.isnan(top2).any():
        return Estimate(np.nan, np.nan, np.nan, np.nan, top1.shape[1], len(shared))
    one, two = _resample([(top1, bottom1), (top2, bottom2)], clusters, seed)
    by_seed = _by_seed(top1, bottom1) - _by_seed(top2, bottom2)
    units = int(clusters.max()) + 1
    found = _estimate(one - two, by_seed, units, top1.shape[1])
    if _columns(metric)[1] is not None:
        return found
    if all(np.ptp(top) == 0 for top in (top1, top2)):
        low, high = _newcombe(float(_by_seed(top1, bottom1).mean()), float(_by_seed(top2, bottom2).mean()), units)
        return replace(found, low=low, high=high)
    if (top1 == top2).all():
        bound = wilson(0, units).high
        return replace(found, low=-bound, high=bound)
    return _within(found, -100.0, 100.0)


def _of_all_or_none(value: float, units: int, n: int, seeds: int) -> Estimate:
    """All solved, or none: there is nothing to resample."""
    bound = wilson(units if value else 0, units)
    return Estimate(value, bound.low, bound.high, 0.0, n, seeds)


def _within(found: Estimate, least: float, most: float) -> Estimate:
    """An estimate whose interval ends where its quantity does, which loses no coverage."""
    return replace(found, low=max(found.low, least), high=min(found.high, most))


def _newcombe(first: float, second: float, units: int) -> tuple[float, float]:
    """Ends of the interval of a difference of two percentages, each of so many units.

    Source: Newcombe (1998), method 10: the two Wilson intervals, put together.
    """
    found = independent_difference(*(wilson(round(value * units / 100), units) for value in (first, second)))
    return found.low, found.high


def mean_ratio(first: pd.Series, second: pd.Series) -> Estimate:
    """Geometric mean of ``first / second`` over pairs, with Student's interval of the mean logarithm.

    Args:
        first: Positive numbers, one a pair.
        second: Those that they are divided by, in the same order.
    """
    logs = np.log(first.to_numpy(float)), np.log(second.to_numpy(float))
    interval: Any = ttest_rel(*logs).confidence_interval(CONFIDENCE)
    value, low, high = np.exp([(logs[0] - logs[1]).mean(), interval.low, interval.high])
    return Estimate(float(value), float(low), float(high), np.nan, len(first))


def time_ratio(step_times: pd.DataFrame, method: str, reference: str) -> Estimate:
    """Median over paired rounds of ``seconds(method) / seconds(reference)``.

    The interval is the exact one for a median, between two of the ordered ratios; fewer than six rounds have none.

    Args:
        step_times: Columns ``round, method, seconds``; rounds that lack either method are left out.
        method: Label of the timed method.
        reference: Label of the method that it is compared to.

    Returns:
        The ratio with its interval; NaN if no round has both.
    """
    rounds = step_times.pivot_table(index="round", columns="method", values="seconds", aggfunc="median")
    if method not in rounds or reference not in rounds:
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0)
    ratios = (rounds[method] / rounds[reference]).dropna().to_numpy(dtype=float)
    if not len(ratios):
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0)
    interval: Any = quantile_test(ratios, p=0.5).confidence_interval(CONFIDENCE)
    return Estimate(float(np.median(ratios)), float(interval.low), float(interval.high), np.nan, len(ratios))


def _estimate(draws: Floats, by_seed: Floats, units: int, n: int) -> Estimate:
    """The mean over seeds with its interval.

    One seed: the bootstrap's quantiles. Several: the items' variance from the bootstrap plus the seeds' sampling
    variance of their mean, with Student's quantile at Welch and Satterthwaite's degrees of freedom. (Resampling two
    or three seeds, as the bootstrap would, covers far less than it says.)

    Args:
        draws: The mean over seeds for each resample of the items.
        by_seed: Each seed's own value.
        units: Clusters of items that were resampled.
        n: Items.
    """
    value, seeds = float(by_seed.mean()), len(by_seed)
    items = float(draws.var(ddof=1))
    if seeds == 1:
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Estimate(value, float(low), float(high), items**0.5, n, seeds)
    between = float(by_seed.var(ddof=1)) / seeds
    error = (items + between) ** 0.5
    if error == 0:
        return Estimate(value, value, value, 0.0, n, seeds)
    freedom = error**4 / (between**2 / (seeds - 1) + items**2 / max(units - 1, 1))
    half = float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Estimate(value, value - half, value + half, error, n, seeds)


def _cube(items: pd.DataFrame, metric: str) -> tuple[Floats, Floats, npt.NDArray[np.intp]]:
    """Numerator and denominator as (seeds, items), and each item's cluster as a number from 0."""
    above, below, factor = _columns(metric)
    ordered = items.sort_values(["seed", "item"])
    seeds = ordered["seed"].nunique()
    if not _each_once(ordered, seeds):
        raise ResultsError(f"{_name(items)}: the seeds did not answer the same test problems, each once.")
    top = ordered[above].to_numpy(float).reshape(seeds, -1) * factor
    bottom = np.ones_like(top) if below is None else ordered[below].to_numpy(float).reshape(seeds, -1)
    clusters = pd.factorize(ordered["cluster"].iloc[: top.shape[1]])[0]
    if clusters.max() == 0:  # one cluster says nothing about the spread between clusters: resample items
        clusters = np.arange(len(clusters))
    return top, bottom, clusters


def _each_once(ordered: pd.DataFrame, seeds: int) -> bool:
    """Whether every seed has the same problems, each once; the rows are in the order of seeds and items."""
    if len(ordered) % seeds:
        return False
    names = ("seed", "item", "prompt", "cluster")
    seed, item, prompt, cluster = (pd.factorize(ordered[name])[0].reshape(seeds, -1) for name in names)
    alike = all((codes == codes[0]).all() for codes in (item, prompt, cluster))
    return bool(alike and (seed == seed[:, :1]).all() and (np.diff(item) != 0).all())


def _columns(metric: str) -> tuple[str, str | None, float]:
    return METRICS[metric] if metric in METRICS else METRICS_OF_SOME[metric]


def _by_seed(top: Floats, bottom: Floats) -> Floats:
    ratios: Floats = top.sum(axis=1) / bottom.sum(axis=1)
    return ratios


def _resample(sides: list[tuple[Floats, Floats]], clusters: npt.NDArray[np.intp], seed: int) -> list[Floats]:
    """Bootstrap the mean over seeds of sum/sum: the same clusters are drawn for every side and seed."""
    units = int(clusters.max()) + 1
    counts = _counts(units, seed)
    sums = [[_by_cluster(table, clusters, units) for table in side] for side in sides]
    draws: list[list[Floats]] = [[] for _ in sides]
    for start in range(0, RESAMPLES, _AT_ONCE):
        some = counts[start : start + _AT_ONCE].astype(float)
        for drawn, (above, below) in zip(draws, sums, strict=True):
            drawn.append(((some @ above) / (some @ below)).mean(axis=1))
    return [np.concatenate(drawn) for drawn in draws]


def _by_cluster(table: Floats, clusters: npt.NDArray[np.intp], units: int) -> Floats:
    """Sums of (seeds, items) over the items of each cluster: (clusters, seeds)."""
    return np.stack([np.bincount(clusters, weights=row, minlength=units) for row in table], axis=1)


@lru_cache(maxsize=4)
def _counts(units: int, seed: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    """How often each resample holds each unit: (resamples, units). Drawing takes longer than all that is done with it.

    Kept, since every metric, experiment and pair of a task is resampled in the same way; in the smallest integers that
    hold a count, since of 10,000 problems doubles would take 0.8 GB.
    """
    rng, shares = np.random.default_rng(seed), np.full(units, 1 / units)
    counts = np.empty((RESAMPLES, units), np.min_scalar_type(units))
    for start in range(0, RESAMPLES, _AT_ONCE):
        some = counts[start : start + _AT_ONCE]
        some[:] = rng.multinomial(units, shares, size=len(some))
    counts.flags.writeable = False
    return counts


def _same_problems(first: pd.DataFrame, second: pd.DataFrame) -> None:
    columns = ["item", "cluster", "prompt", "answer", "tokens"]
    one, two = (side[columns].drop_duplicates().sort_values("item", ignore_index=True) for side in (first, second))
    if not one.equals(two):
        raise ResultsError(
            f"{_name(first)} and {_name(second)} were not tested on the same problems (prompts, answers, "
            "clusters or token counts differ), so no paired difference exists. Run both again with the same task "
            "settings."
        )


def _name(items: pd.DataFrame) -> str:
    name = str(items["label"].iloc[0]) if "label" in items and len(items) else "A method"
    return f"{name} ({', '.join(items['run_id'].unique())})" if "run_id" in items else name
