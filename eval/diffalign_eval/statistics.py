"""Intervals and paired comparisons of scores; numpy only, every function a function of its arguments.

Pictures of one prompt resemble each other, so they are not independent evidence: pass the prompts as
`clusters` and whole prompts are resampled (percentile cluster bootstrap, Efron and Tibshirani 1993, ch. 13;
clusters: Field and Welsh 2007). An observation weighs the same whatever the size of its cluster.

How far to trust them (simulated, normal data): a nominal 95 % interval covers 94 to 95 % of the time from 40
prompts on, 93 % at 20, 89 % at 10 and 85 % at 5; a percentile bootstrap is too narrow for few clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
Clusters: TypeAlias = Sequence[str] | Sequence[int] | NDArray[np.generic]

_DRAWS_AT_ONCE = (
    4_000_000  # bounds the memory of a bootstrap to about 100 MB, whatever the number of clusters
)


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Interval:
    """A mean of n observations and its confidence interval; infinite ends where n = 1 gives no spread."""

    mean: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """The fields as strict JSON takes them: an infinite end becomes null."""
        return {
            "mean": self.mean,
            "low": _json_number(self.low),
            "high": _json_number(self.high),
            "n": self.n,
        }


@dataclass(frozen=True)
class WinRate:
    """How many pairs the second of two wins, draws and loses; `rate` counts a tie as half a win."""

    win: int
    tie: int
    loss: int
    rate: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | int | None]:
        """The fields as strict JSON takes them: an infinite end becomes null."""
        return asdict(self) | {"low": _json_number(self.low), "high": _json_number(self.high)}


def mean_interval(
    values: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of [n] values with a percentile bootstrap interval.

    Args:
        values: [n] finite numbers.
        clusters: [n] labels of what was sampled independently (the prompts); default: every value by itself.
            With a single label the values inside it are resampled: the interval speaks of that prompt only.
        level: nominal coverage.
        resamples: bootstrap draws.
        seed: of the draws; the same arguments always give the same interval.

    Raises:
        ValueError: empty or non-finite values, another number of clusters, level outside (0, 1).
    """
    data = _vector(values, "values")
    _check(level, resamples)
    if data.size == 1:
        return Interval(float(data[0]), -math.inf, math.inf, 1)
    shift = data[0]  # constant data then gives an interval of exactly that constant
    sums, counts = _cluster_sums(data - shift, clusters)
    means = _resampled_means(sums, counts, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) + shift
    return Interval(float(sums.sum() / data.size + shift), float(low), float(high), data.size)


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of after - before over pairs that share prompt and seed: [n] and [n], as `mean_interval`.

    What the pairs have in common (an easy prompt, a lucky seed) cancels, so the interval is usually much
    narrower than two separate ones suggest. Identical inputs give exactly 0 with an interval of exactly 0.

    Raises:
        ValueError: as `mean_interval`, and when the lengths differ.
    """
    first, second = _pair(before, after)
    return mean_interval(second - first, clusters, level, resamples, seed)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Share of successes in n independent trials with its score interval (Wilson 1927).

        (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n),   p = successes / n

    Raises:
        ValueError: n below 1, successes outside [0, n], level outside (0, 1).
    """
    _check(level, resamples=1)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson needs 0 <= successes <= n and n >= 1, not {successes} of {n}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - half_width) / scale
    high = 1.0 if successes == n else (centre + half_width) / scale
    return Interval(share, low, high, n)


def win_rate(
    before: ArrayLike,
    after: ArrayLike,
    clusters: Clusters | None = None,
    tie_tolerance: float = 0.0,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> WinRate:
    """Share of pairs in which `after` scores higher, ties counted half, with a cluster bootstrap interval.

    When one side wins every pair a bootstrap would claim certainty; the interval is Wilson's then, with the
    clusters as its trials.

    Args:
        before: [n] scores; before[i] and after[i] share prompt and seed.
        after: [n] scores, higher is better.
        clusters: [n] labels, as in `mean_interval`.
        tie_tolerance: differences up to this size are ties.
        level: nominal coverage.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: as `paired_difference`, and for a negative tolerance.
    """
    if not tie_tolerance >= 0:
        raise ValueError(f"tie_tolerance must be 0 or more, not {tie_tolerance}")
    first, second = _pair(before, after)
    difference = second - first
    win = int((difference > tie_tolerance).sum())
    loss = int((difference < -tie_tolerance).sum())
    tie = difference.size - win - loss
    points = 0.5 + 0.5 * (difference > tie_tolerance) - 0.5 * (difference < -tie_tolerance)
    interval = mean_interval(points, clusters, level, resamples, seed)
    if points.size in (win, loss) and points.size > 1:
        trials = _cluster_sums(points, clusters)[0].size
        interval = wilson(trials if win else 0, trials, level)
    return WinRate(win, tie, loss, interval.mean, interval.low, interval.high)


def _vector(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(f"{name}[{bad[0]}] is {array[bad[0]]}; {bad.size} of {array.size} are not finite")
    return array


def _pair(before: ArrayLike, after: ArrayLike) -> tuple[Floats, Floats]:
    first, second = _vector(before, "before"), _vector(after, "after")
    if first.size != second.size:
        raise ValueError(
            f"before has {first.size} values and after {second.size}; pairs need as many of each"
        )
    return first, second


def _check(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")


def _cluster_sums(values: Floats, clusters: Clusters | None) -> tuple[Floats, Floats]:
    """Sum and size of each cluster, [g] and [g]; every value is its own cluster without or with one label."""
    if clusters is not None:
        if len(clusters) != values.size:
            raise ValueError(f"{values.size} values but {len(clusters)} cluster labels")
        labels, membership = np.unique(np.asarray(clusters), return_inverse=True)
        if labels.size > 1:
            sums, counts = np.bincount(membership, weights=values), np.bincount(membership)
            return sums.astype(np.float64), counts.astype(np.float64)
    return values, np.ones(values.size)


def _resampled_means(sums: Floats, counts: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Means of `resamples` draws of whole clusters, with replacement: [resamples]."""
    rows = max(1, _DRAWS_AT_ONCE // sums.size)
    means = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, sums.size, (min(rows, resamples - start), sums.size))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)
