"""What a comparison found: per reward the mean of each checkpoint, and every pair of checkpoints compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from diffalign_eval.statistics import Clusters, Interval, WinRate, mean_interval, paired_difference, win_rate


@dataclass(frozen=True)
class Pair:
    """Two checkpoints on the same prompts and seeds; the difference is `after` - `before`."""

    before: str
    after: str
    difference: Interval
    win_rate: WinRate
    """Of `after`; a win is a better score, which is a lower one where the reward's higher is not better."""


@dataclass(frozen=True)
class RewardResult:
    """One reward over all checkpoints."""

    label: str
    higher_is_better: bool
    is_share: bool
    """Every score is 0 or 1, so that a mean is a share and is shown in percent."""
    means: dict[str, Interval]
    """Checkpoint -> mean and interval, the baseline first."""
    pairs: tuple[Pair, ...]
    """Every two checkpoints, the one listed earlier as `before`."""

    @property
    def baseline(self) -> str:
        return next(iter(self.means))

    def against_baseline(self, checkpoint: str) -> Pair:
        """The pair (baseline, checkpoint). KeyError for the baseline itself or an unknown name."""
        for pair in self.pairs:
            if (pair.before, pair.after) == (self.baseline, checkpoint):
                return pair
        raise KeyError(checkpoint)

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "higher_is_better": self.higher_is_better,
            "means": {name: mean.to_json() for name, mean in self.means.items()},
            "pairs": [
                {
                    "before": pair.before,
                    "after": pair.after,
                    "difference": pair.difference.to_json(),
                    "win_rate": pair.win_rate.to_json(),
                }
                for pair in self.pairs
            ],
        }


def summarise(
    label: str,
    scores: Mapping[str, Sequence[float]],
    clusters: Clusters,
    *,
    higher_is_better: bool = True,
    tie_tolerance: float = 0.0,
) -> RewardResult:
    """Means and pairwise comparisons of one reward.

    Args:
        label: the reward's name in tables and files.
        scores: checkpoint -> [n] scores in the same order of prompts and seeds; the first is the baseline.
        clusters: [n] prompt of each score.
        higher_is_better: decides who wins a pair; differences keep their sign.
        tie_tolerance: differences up to this size are ties.

    Raises:
        ValueError: no checkpoints, or scores that `paired_difference` refuses.
    """
    if not scores:
        raise ValueError("scores is empty: a comparison needs at least one checkpoint")
    pairs = []
    for before, after in combinations(scores, 2):
        worse, better = (before, after) if higher_is_better else (after, before)
        pairs.append(
            Pair(
                before,
                after,
                paired_difference(scores[before], scores[after], clusters),
                win_rate(scores[worse], scores[better], clusters, tie_tolerance),
            )
        )
    return RewardResult(
        label=label,
        higher_is_better=higher_is_better,
        is_share=all(value in (0, 1) for values in scores.values() for value in values),
        means={name: mean_interval(values, clusters) for name, values in scores.items()},
        pairs=tuple(pairs),
    )
