"""What `diffalign score` prints: a row a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from diffalign.scoring.agreement import Agreement
from diffalign.scoring.run import ScoredPictures


def score_table(where: str, scored: ScoredPictures) -> Table:
    """Mean, spread and ends of each reward's scores."""
    total = len(scored.files)
    count = total - len(scored.skipped)
    heading = f"{total} pictures" if count == total else f"{count} of {total} pictures"
    table = _table(f"{heading} in {where}", list(scored.scores))
    for column in ("mean", "std", "min", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, scores in scored.scores.items():
        values = np.array([score for score in scores if score is not None])
        spread = values.std(ddof=1 if len(values) > 1 else 0)
        numbers = (values.mean(), spread, values.min(), values.max())
        table.add_row(Text(label), *(f"{number:.4g}" for number in numbers))
    return table


def ends_text(scored: ScoredPictures) -> str:
    """The pictures of the highest and the lowest score, a line a reward: their names may be long."""
    lines = []
    for label, scores in scored.scores.items():
        found = {index: score for index, score in enumerate(scores) if score is not None}
        highest, lowest = (scored.files[end(found, key=found.__getitem__)] for end in (max, min))
        lines.append(f"{label}: highest {highest}; lowest {lowest}")
    return "\n".join(lines)


def agreement_table(agreements: Sequence[Agreement]) -> Table:
    """How often each reward agrees with people, and how well its differences predict them."""
    first = agreements[0]
    title = f"agreement with {first.pairs} preferences"
    if first.skipped:
        title += f" ({first.skipped} pairs skipped)"
    table = _table(title, [each.reward for each in agreements])
    for column in ("accuracy", "95 % interval", "ties", "k", "log-lik.", "ECE"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in agreements:
        table.add_row(
            Text(each.reward),
            f"{100 * each.accuracy:.1f} %",
            f"{100 * each.low:.1f} to {100 * each.high:.1f}",
            str(each.score_ties),
            f"{each.temperature:.4g}",
            _number(each.log_likelihood, 3),
            _number(each.calibration_error, 3),
        )
    return table


def ties_text(agreements: Sequence[Agreement]) -> str:
    """Pairs on which people were undecided, and how undecided the rewards were there."""
    confidences = ", ".join(f"{each.reward} {_number(each.confidence_on_ties, 2)}" for each in agreements)
    return (
        f"{agreements[0].label_ties} more pairs are labelled 0.5; mean confidence there "
        f"(0.5 is undecided): {confidences}"
    )


def _table(title: str, labels: Sequence[str]) -> Table:
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("reward", overflow="fold", min_width=min(22, max(map(len, labels))))
    return table


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)
