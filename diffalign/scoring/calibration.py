"""How far differences of scores can be read as probabilities of being preferred; numpy only.

The model is Bradley and Terry's (1952) with one free number: P(first preferred) = sigmoid(k d), where d is the first
picture's score minus the second's and k >= 0 the inverse temperature. Scores of any scale get the k that fits them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BINS = 10
"""Of equal width, for confidences from 0.5 to 1."""

_HALVINGS = 200


def fit_temperature(differences: Floats, labels: Floats) -> float:
    """The k >= 0 of greatest likelihood.

    The log-likelihood is concave in k; its derivative, sum of d (label - sigmoid(k d)), is bisected.

    Args:
        differences: [n] finite score differences, first minus second.
        labels: [n] probabilities that the first is preferred.

    Returns:
        0 where scores and labels do not go together; infinity where every label is certain (0 or 1) and on the side
        of its difference, so that no finite k is best.
    """

    def slope(k: float) -> float:
        return float((differences * (labels - probability(k * differences))).sum())

    if slope(0.0) <= 0:
        return 0.0
    if not np.any((differences != 0) & (labels != (differences > 0))):
        return math.inf
    low, high = 0.0, 1.0 / float(np.abs(differences).max())
    while slope(high) > 0:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2


def held_out_logits(differences: Floats, labels: Floats, groups: Sequence[Hashable]) -> Floats:
    """k d of every pair, with the k fitted on the other half of the groups (two-fold cross-fitting): [n].

    Args:
        differences: [n], as `fit_temperature`.
        labels: [n], likewise.
        groups: [n] what was sampled independently (the prompts): pairs of one are in one half. Halves alternate
            in order of first appearance; of a single group, the pairs do.

    Raises:
        ValueError: fewer than two pairs.
    """
    if len(differences) < 2:
        raise ValueError("two halves need at least two pairs")
    order = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    numbers = [order[group] for group in groups] if len(order) > 1 else list(range(len(groups)))
    half = np.array(numbers) % 2 == 0
    logits = np.empty(len(differences))
    for own, other in ((half, ~half), (~half, half)):
        logits[own] = scaled(differences[own], fit_temperature(differences[other], labels[other]))
    return logits


def scaled(differences: Floats, k: float) -> Floats:
    """k d, where equal scores stay undecided at an infinite k."""
    with np.errstate(invalid="ignore"):
        return np.where(differences == 0, 0.0, k * differences)


def probability(logits: Floats) -> Floats:
    """sigmoid, without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -logits)), dtype=np.float64)


def log_likelihood(logits: Floats, labels: Floats) -> float:
    """Mean log-probability of the labels, in nats a pair; a coin has -ln 2 = -0.693.

    Minus infinity where the model is certain of the wrong picture.
    """
    with np.errstate(invalid="ignore"):
        first = np.where(labels > 0, labels * -np.logaddexp(0.0, -logits), 0.0)
        second = np.where(labels < 1, (1 - labels) * -np.logaddexp(0.0, logits), 0.0)
    return float((first + second).mean())


def calibration_error(logits: Floats, labels: Floats) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599) of the picture that each logit favours.

        sum over bins of |mean confidence - share of labels on that side| * size of the bin / n

    Confidence is sigmoid(|k d|), from 0.5 to 1, in `BINS` bins; an undecided pair is half right.
    """
    confidence = probability(np.abs(logits))
    right = np.where(logits > 0, labels, np.where(logits < 0, 1 - labels, 0.5))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, confidence - right)).sum() / len(logits))
