"""Temperatures, likelihoods and calibration errors that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from diffalign.scoring.calibration import (
    calibration_error,
    fit_temperature,
    held_out_logits,
    log_likelihood,
    scaled,
)

LN2, LN3, LN9 = math.log(2), math.log(3), math.log(9)


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_three_right_of_four_alike_is_a_log_odds_of_ln_3(scale: float):
    # the slope 3 (1 - sigmoid(k d)) - (1 - sigmoid(-k d)) is 0 where sigmoid(k d) = 3 / 4
    k = fit_temperature(scale * array(1, 1, 1, -1), array(1, 1, 1, 1))
    assert k == pytest.approx(LN3 / scale, rel=1e-9)


def test_a_soft_label_is_fitted_as_a_probability():
    assert fit_temperature(array(2.0), array(0.75)) == pytest.approx(LN3 / 2)  # sigmoid(2 k) = 3 / 4


def test_the_fit_is_the_maximum_that_a_search_finds():
    rng = np.random.default_rng(0)
    differences = rng.normal(size=200)
    labels = (rng.random(200) < 1 / (1 + np.exp(-1.7 * differences))).astype(float)
    found = minimize_scalar(
        lambda k: -log_likelihood(k * differences, labels), bounds=(0, 10), method="bounded"
    )
    assert fit_temperature(differences, labels) == pytest.approx(found.x, rel=1e-4)


def test_no_positive_temperature_helps_a_reward_that_disagrees():
    assert fit_temperature(array(-1, -1, 1), array(1, 1, 1)) == 0
    assert fit_temperature(array(0, 0), array(1, 1)) == 0


def test_ranking_every_pair_right_has_no_finite_temperature():
    assert fit_temperature(array(0.1, 3, 0), array(1, 1, 1)) == math.inf
    assert fit_temperature(array(0.1, -3), array(1, 0)) == math.inf
    assert math.isfinite(fit_temperature(array(0.1, 3), array(1, 0.9)))
    assert scaled(array(-1, 0, 2), math.inf).tolist() == [-math.inf, 0, math.inf]


def test_each_half_is_judged_with_the_temperature_of_the_other():
    differences, labels = array(1, 1, 1, -1, 1, 1, -1), np.ones(7)
    logits = held_out_logits(differences, labels, ["a"] * 4 + ["b"] * 3)
    # a: 3 of 4 right, k = ln 3, used for b; b: 2 of 3 right, k = ln 2, used for a
    np.testing.assert_allclose(logits, [LN2, LN2, LN2, -LN2, LN3, LN3, -LN3], rtol=1e-9)
    expected = (3 * math.log(2 / 3) + math.log(1 / 3) + 2 * math.log(3 / 4) + math.log(1 / 4)) / 7
    assert log_likelihood(logits, labels) == pytest.approx(expected)


def test_pairs_of_a_single_prompt_are_halved_one_by_one():
    differences = array(1, 1, 1, 1, 1, -1, -1, 1)  # even places: 3 of 4 right; odd ones too
    logits = held_out_logits(differences, np.ones(8), ["a"] * 8)
    np.testing.assert_allclose(np.abs(logits), LN3, rtol=1e-9)
    with pytest.raises(ValueError, match="at least two pairs"):
        held_out_logits(array(1), array(1), ["a"])


def test_likelihood_of_a_coin_and_of_certainty():
    assert log_likelihood(array(0, 0), array(1, 0)) == pytest.approx(-LN2)
    assert log_likelihood(array(math.inf, -math.inf), array(1, 0)) == 0
    assert log_likelihood(array(math.inf, 0), array(0, 1)) == -math.inf
    # 0.75 of the time ln(3/4), else ln(1/4)
    assert log_likelihood(array(LN3), array(0.75)) == pytest.approx(
        0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    )


def test_calibration_error_is_confidence_against_how_often_it_is_right():
    right, wrong = array(1), array(0)
    assert calibration_error(array(LN3, LN3, LN3, -LN3), np.ones(4)) == pytest.approx(
        0
    )  # 3/4 sure, 3/4 right
    assert calibration_error(array(LN3), right) == pytest.approx(0.25)
    assert calibration_error(array(LN3), wrong) == pytest.approx(0.75)
    assert calibration_error(array(0), right) == 0  # half sure, half right
    assert calibration_error(array(math.inf), right) == 0
    # 0.75 sure and half right: gap 0.25, twice; 0.9 sure and always right: gap 0.1, twice
    mixed = calibration_error(array(LN3, LN3, LN9, LN9), array(1, 0, 1, 1))
    assert mixed == pytest.approx((2 * 0.25 + 2 * 0.1) / 4)
