"""The statistics against hand-derived numbers, scipy, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from diffalign_eval.statistics import Interval, WinRate, mean_interval, paired_difference, wilson, win_rate


def test_the_mean_of_unequal_clusters_weighs_every_value_the_same():
    interval = mean_interval([1.0, 1.0, 1.0, 5.0], clusters=["a", "a", "a", "b"])
    assert interval.mean == 2.0  # (3 * 1 + 5) / 4, not the mean of cluster means (1 + 5) / 2 = 3
    # Two clusters: aa, ab, ba, bb are equally likely, so aa (mean 1) and bb (mean 5) have 25 % each.
    assert (interval.low, interval.high, interval.n) == (1.0, 5.0, 4)


def test_two_values_give_the_three_means_that_a_bootstrap_of_two_can_give():
    assert mean_interval([0.0, 1.0], level=0.4) == Interval(0.5, 0.5, 0.5, 2)  # P(0) = 1/4, P(1/2) = 1/2
    assert mean_interval([0.0, 1.0], level=0.6) == Interval(0.5, 0.0, 1.0, 2)


def test_the_interval_is_scipys_percentile_bootstrap_under_the_same_draws():
    values = np.random.default_rng(3).exponential(size=37)
    ours = mean_interval(values, resamples=500, seed=11)
    theirs = scipy.stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=500,
        rng=np.random.default_rng(11),
        vectorized=True,
    ).confidence_interval
    np.testing.assert_allclose((ours.low, ours.high), (theirs.low, theirs.high), rtol=1e-12)


def test_the_cluster_interval_is_scipys_bootstrap_of_the_ratio_of_cluster_sums_and_sizes():
    rng = np.random.default_rng(4)
    clusters = rng.integers(0, 15, size=80)
    values = rng.normal(size=80) + 0.3 * clusters
    ours = mean_interval(values, clusters, resamples=500, seed=5)
    labels = np.unique(clusters)
    theirs = scipy.stats.bootstrap(
        ([values[clusters == c].sum() for c in labels], [(clusters == c).sum() for c in labels]),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=500,
        rng=np.random.default_rng(5),
        vectorized=True,
    ).confidence_interval
    np.testing.assert_allclose((ours.low, ours.high), (theirs.low, theirs.high), rtol=1e-12)


def test_draws_in_pieces_equal_draws_at_once(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).normal(size=30)
    at_once = mean_interval(values)
    monkeypatch.setattr("diffalign_eval.statistics._DRAWS_AT_ONCE", 7 * 30)
    assert mean_interval(values) == at_once


def test_identical_inputs_differ_by_exactly_zero():
    scores = np.random.default_rng(0).normal(size=24)
    assert paired_difference(scores, scores.copy(), np.repeat(np.arange(8), 3)) == Interval(0.0, 0.0, 0.0, 24)


@pytest.mark.parametrize("clusters", [None, ["a"] * 3 + ["b"] * 4, ["a"] * 7])
def test_constant_data_give_an_interval_of_exactly_that_constant(clusters: list[str] | None):
    assert mean_interval([0.1] * 7, clusters) == Interval(0.1, 0.1, 0.1, 7)


def test_a_single_cluster_is_resampled_within():
    values = [0.0, 1.0, 2.0, 4.0]
    assert mean_interval(values, clusters=["the prompt"] * 4) == mean_interval(values)


def test_one_observation_has_a_mean_and_no_bounds():
    assert mean_interval([0.7]) == Interval(0.7, -math.inf, math.inf, 1)
    assert mean_interval([0.7]).to_json() == {"mean": 0.7, "low": None, "high": None, "n": 1}


def test_what_a_pair_shares_cancels():
    prompt_difficulty = np.linspace(-100.0, 100.0, 50)
    gain = paired_difference(prompt_difficulty, prompt_difficulty + np.tile([0.5, 1.5], 25))
    assert gain.mean == pytest.approx(1.0)
    assert 0.8 < gain.low < 1.0 < gain.high < 1.2  # standard error 0.5 / sqrt(50) = 0.07


def test_pictures_of_one_prompt_are_not_independent_evidence():
    rng = np.random.default_rng(2)
    prompts = np.repeat(np.arange(30), 8)
    values = rng.normal(size=30)[prompts]  # eight identical pictures a prompt
    naive, honest = mean_interval(values), mean_interval(values, prompts)
    ratio = (honest.high - honest.low) / (naive.high - naive.low)
    assert ratio == pytest.approx(math.sqrt(8), rel=0.1)


def test_the_same_seed_repeats_the_interval_and_another_moves_it():
    values = np.random.default_rng(0).normal(size=20)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


@pytest.mark.parametrize(
    ("successes", "n", "level"), [(0, 9, 0.95), (1, 3, 0.9), (50, 100, 0.95), (12, 12, 0.99)]
)
def test_wilson_equals_scipys(successes: int, n: int, level: float):
    ours = wilson(successes, n, level)
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert (ours.mean, ours.n) == (successes / n, n)
    np.testing.assert_allclose((ours.low, ours.high), (theirs.low, theirs.high), rtol=1e-12, atol=1e-15)


def test_ties_count_half_a_win():
    result = win_rate([0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, -1.0])
    assert (result.win, result.tie, result.loss) == (2, 1, 1)
    assert result.rate == 0.625  # (2 + 1/2) / 4
    assert result.low < 0.625 < result.high


def test_differences_up_to_the_tolerance_are_ties():
    result = win_rate([0.0, 0.0, 0.0], [0.25, -0.25, 0.5], tie_tolerance=0.25)
    assert (result.win, result.tie, result.loss) == (1, 2, 0)
    assert result.rate == pytest.approx(2 / 3)


def test_a_checkpoint_against_itself_wins_exactly_half():
    assert win_rate([0.3, 0.1], [0.3, 0.1]) == WinRate(0, 2, 0, 0.5, 0.5, 0.5)


def test_swapping_the_sides_mirrors_the_win_rate():
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=40), rng.normal(size=40)
    forward, backward = win_rate(a, b), win_rate(b, a)
    assert (forward.win, forward.loss) == (backward.loss, backward.win)
    assert forward.rate == pytest.approx(1 - backward.rate)
    assert forward.low == pytest.approx(1 - backward.high)


def test_winning_every_pair_is_not_certainty():
    prompts = np.repeat(np.arange(10), 2)
    result = win_rate(np.zeros(20), np.ones(20), prompts)
    assert (result.win, result.rate, result.high) == (20, 1.0, 1.0)
    assert result.low == pytest.approx(scipy.stats.binomtest(10, 10).proportion_ci(method="wilson").low)
    assert win_rate(np.ones(20), np.zeros(20), prompts).high == pytest.approx(1 - result.low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "values is empty"),
        (lambda: mean_interval([0.0, math.nan, math.inf]), r"values\[1\] is nan; 2 of 3 are not finite"),
        (lambda: mean_interval([[0.0, 1.0]]), r"one dimension, not shape \(1, 2\)"),
        (lambda: mean_interval([0.0, 1.0], clusters=[0]), "2 values but 1 cluster labels"),
        (lambda: mean_interval([0.0, 1.0], level=95), "level must lie between 0 and 1"),
        (lambda: mean_interval([0.0, 1.0], resamples=0), "resamples must be at least 1"),
        (lambda: paired_difference([0.0], [0.0, 1.0]), "before has 1 values and after 2"),
        (lambda: paired_difference([0.0], [math.inf]), r"after\[0\] is inf"),
        (lambda: win_rate([0.0, 1.0], [0.0]), "before has 2 values and after 1"),
        (lambda: win_rate([0.0], [0.0], tie_tolerance=-1.0), "tie_tolerance must be 0 or more"),
        (lambda: wilson(3, 2), "not 3 of 2"),
        (lambda: wilson(0, 0), "not 0 of 0"),
    ],
)
def test_input_that_has_no_statistics_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_95_percent_intervals_of_a_paired_difference_cover_93_to_97_percent():
    rng = np.random.default_rng(1)
    prompts, gain, trials = np.repeat(np.arange(60), 2), 0.3, 1500
    covered = 0
    for trial in range(trials):
        before = rng.normal(0, 1.0, 60)[prompts] + rng.normal(0, 0.5, 120)
        after = before + rng.normal(gain, 0.5, 60)[prompts] + rng.normal(0, 0.5, 120)
        interval = paired_difference(before, after, prompts, resamples=600, seed=trial)
        covered += interval.low <= gain <= interval.high
    assert 0.93 <= covered / trials <= 0.97


def test_95_percent_intervals_of_an_accuracy_cover_93_to_97_percent_only_when_prompts_are_clusters():
    rng = np.random.default_rng(2)
    prompts, trials = np.repeat(np.arange(60), 4), 1000
    clustered = independent = 0
    for trial in range(trials):
        right = (rng.random(240) < rng.beta(1.0, 1.0, 60)[prompts]).astype(float)  # mean 1/2, prompts differ
        honest = mean_interval(right, prompts, resamples=600, seed=trial)
        naive = mean_interval(right, resamples=600, seed=trial)
        clustered += honest.low <= 0.5 <= honest.high
        independent += naive.low <= 0.5 <= naive.high
    assert 0.93 <= clustered / trials <= 0.97
    assert independent / trials < 0.90
