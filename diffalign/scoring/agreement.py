"""How often, and how surely, a reward prefers the picture that people preferred."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffalign.data.preferences import PairSet
from diffalign.errors import DataError
from diffalign.scoring.calibration import (
    calibration_error,
    fit_temperature,
    held_out_logits,
    log_likelihood,
    probability,
    scaled,
)
from diffalign.scoring.run import ScoredPictures


@dataclass(frozen=True)
class Agreement:
    """One reward on a set of preference pairs. Pairs labelled 0.5 count in the last two fields only."""

    reward: str
    pairs: int
    """Pairs with a preference, both pictures scored."""
    skipped: int
    """Pairs with a picture that could not be read."""
    score_ties: int
    """Pairs among `pairs` whose pictures score exactly alike; each is half right."""
    accuracy: float
    low: float
    high: float
    """Wilson's 95 % interval of the accuracy, with every pair a trial of its own."""
    temperature: float
    """The k of P(preferred) = sigmoid(k (score - score of the other)), of greatest likelihood on all `pairs`."""
    log_likelihood: float | None
    """Mean a pair in nats, each half of the prompts with the k of the other; None for a single pair."""
    calibration_error: float | None
    """Expected calibration error, with the same two values of k."""
    label_ties: int
    """Pairs labelled 0.5, both pictures scored."""
    confidence_on_ties: float | None
    """Mean of sigmoid(k |difference|) over `label_ties`: 0.5 says that the reward is as undecided as people."""

    def to_json(self) -> dict[str, str | int | float | None]:
        """The fields as strict JSON takes them: what is infinite becomes null."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
        }


def agreement(
    reward: str, pairs: PairSet, scored: ScoredPictures, *, higher_is_better: bool = True
) -> Agreement:
    """Compare the scores of `PairPictures` with the labels of its pairs.

    Args:
        reward: label of the scores.
        pairs: the labels.
        scored: pictures 2 i and 2 i + 1 belong to pair i, the preferred one first.
        higher_is_better: False turns the scores round.

    Raises:
        DataError: no pair with a preference has two scores.
    """
    sign = 1.0 if higher_is_better else -1.0
    column = scored.scores[reward]
    both = list(zip(column[::2], column[1::2], strict=True))
    differences = {
        index: sign * (first - second)
        for index, (first, second) in enumerate(both)
        if first is not None and second is not None
    }
    decided = [index for index in differences if pairs.probability(index) != 0.5]
    ties = [index for index in differences if pairs.probability(index) == 0.5]
    if not decided:
        raise DataError(
            f"no pair is left to compare {reward} with",
            why="every pair with a preference has a picture that cannot be read",
        )
    values = np.array([differences[index] for index in decided])
    labels = np.array([pairs.probability(index) for index in decided])
    score_ties = int((values == 0).sum())
    interval = _wilson(int((values > 0).sum()) + score_ties / 2, len(decided))
    temperature = fit_temperature(values, labels)
    prompts = [pairs.prompt(index) for index in decided]
    logits = held_out_logits(values, labels, prompts) if len(decided) > 1 else None
    return Agreement(
        reward=reward,
        pairs=len(decided),
        skipped=len(both) - len(differences),
        score_ties=score_ties,
        accuracy=interval.mean,
        low=interval.low,
        high=interval.high,
        temperature=temperature,
        log_likelihood=None if logits is None else log_likelihood(logits, labels),
        calibration_error=None if logits is None else calibration_error(logits, labels),
        label_ties=len(ties),
        confidence_on_ties=_confidence([differences[index] for index in ties], temperature),
    )


def _confidence(differences: Sequence[float], temperature: float) -> float | None:
    if not differences:
        return None
    return float(probability(np.abs(scaled(np.array(differences), temperature))).mean())


def _wilson(right: float, n: int) -> Any:
    """The evaluation's interval; half a success is fine, its variance is below that of a coin's side."""
    return importlib.import_module("diffalign_eval.statistics").wilson(right, n)
