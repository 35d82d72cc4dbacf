"""Results as tables: rich for the terminal, markdown for a README, from the same cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from diffalign_eval.results import Pair, RewardResult
from diffalign_eval.statistics import Interval, WinRate

_NUMBERS_FROM = 2  # the first two columns are names, the others numbers


@dataclass(frozen=True)
class ChangeRow:
    """One measure before and after training."""

    metric: str
    prompts: str
    """Name of the prompt set."""
    before: float
    after: float
    change: Interval
    """after - before, paired."""
    percent: bool = False
    """The measure is a share: shown in percent, its change in percentage points (pts)."""
    higher_is_better: bool = True


def change_rows(results: Mapping[str, Mapping[str, Any]]) -> list[ChangeRow]:
    """The rows of a run's summary: set -> reward -> before, after and change, as summary.json has them."""
    return [
        ChangeRow(
            metric=label,
            prompts=set_name,
            before=result["before"]["mean"],
            after=result["after"]["mean"],
            change=Interval(**_finite(result["change"])),
            percent=label.endswith("accuracy"),
        )
        for set_name, rewards in results.items()
        for label, result in rewards.items()
    ]


def _finite(interval: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's null bounds as infinities."""
    infinite = {"low": -math.inf, "high": math.inf}
    return {key: infinite[key] if value is None else value for key, value in interval.items()}


@dataclass(frozen=True)
class _Cell:
    text: str
    style: str = ""


@dataclass(frozen=True)
class _Cells:
    header: list[str]
    rows: list[list[_Cell]]


def before_after_table(rows: Sequence[ChangeRow], title: str | None = None) -> Table:
    """The table that a training run ends with: metric, prompts, before, after, change, n."""
    return _rich(_before_after(rows), title)


def before_after_markdown(rows: Sequence[ChangeRow]) -> str:
    """`before_after_table` as a markdown table."""
    return _markdown(_before_after(rows))


def comparison_table(results: Sequence[RewardResult], title: str | None = None) -> Table:
    """One row per reward and checkpoint: mean, difference from the baseline, win rate against it, p-value.

    A tie is half a win. p is that of the difference, after Holm's correction where the results were adjusted
    (`adjust`); below 5 % it is bold.
    """
    return _rich(_comparison(results), title, sections=True)


def comparison_markdown(results: Sequence[RewardResult]) -> str:
    """`comparison_table` as a markdown table."""
    return _markdown(_comparison(results))


def _before_after(rows: Sequence[ChangeRow]) -> _Cells:
    cells = []
    for row in rows:
        digits = _decimals([row.before, row.after], row.change, row.percent)
        cells.append(
            [
                _Cell(row.metric),
                _Cell(row.prompts),
                _Cell(_number(row.before, digits, percent=row.percent)),
                _Cell(_number(row.after, digits, percent=row.percent)),
                _Cell(
                    _change(row.change, digits, percent=row.percent),
                    _verdict(row.change.low, row.change.high, 0.0, row.higher_is_better),
                ),
                _Cell(str(row.change.n)),
            ]
        )
    return _Cells(["metric", "prompts", "before", "after", "change [95 %]", "n"], cells)


def _comparison(results: Sequence[RewardResult]) -> _Cells:
    pairs = [pair for result in results for pair in result.pairs if pair.before == result.baseline]
    adjusted = bool(pairs) and all(pair.p_holm is not None for pair in pairs)
    header = ["reward", "checkpoint", "mean [95 %]", "change [95 %]", "win rate [95 %]"]
    header.append("p\nHolm" if adjusted else "p")
    rows = []
    for result in results:
        share = result.is_share
        changes = [pair.difference for pair in result.pairs if pair.before == result.baseline]
        means = [mean.mean for mean in result.means.values()]
        digits = max(_decimals(means, change, share) for change in [*changes, None])
        for name, mean in result.means.items():
            is_baseline = name == result.baseline
            row = [
                _Cell(result.label if is_baseline else ""),
                _Cell(name),
                _Cell(_number(mean.mean, digits, percent=share) + _bounds(mean, digits, percent=share)),
            ]
            if is_baseline:
                row += [_Cell("baseline", "dim"), _Cell(""), _Cell("")]
            else:
                pair = result.against_baseline(name)
                ends, wins = pair.difference, pair.win_rate
                row += [
                    _Cell(
                        _change(ends, digits, percent=share),
                        _verdict(ends.low, ends.high, 0.0, result.higher_is_better),
                    ),
                    _Cell(_wins(wins), _verdict(wins.low, wins.high, 0.5, True)),
                    _p_value(pair, adjusted),
                ]
            rows.append(row)
    return _Cells(header, rows)


def _decimals(values: Sequence[float], change: Interval | None, percent: bool) -> int:
    """Three significant digits of the largest value, or more where the change's interval is narrower."""
    if percent:
        return 1
    digits = 2 - _exponent(max(abs(value) for value in values))
    if change is not None and math.isfinite(change.high - change.low):
        needed = -_exponent(change.high - change.low)
        digits = needed if digits < needed <= digits + 2 else digits  # beyond that it is rounding noise
    return min(6, max(0, digits))


def _exponent(value: float) -> int:
    """Of the leading digit: 2 for 250, -1 for 0.25."""
    return math.floor(math.log10(value)) if value > 0 else 0


def _number(value: float, decimals: int, *, percent: bool = False, signed: bool = False) -> str:
    if not math.isfinite(value):
        return "?"
    rounded = round(100 * value if percent else value, decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
    unit = " %" if percent and not signed else ""
    return f"{rounded:{'+' if signed and rounded else ''}.{decimals}f}{unit}"


def _bounds(interval: Interval | WinRate, decimals: int, *, percent: bool, signed: bool = False) -> str:
    """' [low, high]'; an interval that one observation cannot give is said to be none."""
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return " (one picture: no interval)"
    scale = 100 if percent else 1
    low, high = (_number(end * scale, decimals, signed=signed) for end in (interval.low, interval.high))
    return f" [{low}, {high}]"


def _change(change: Interval, decimals: int, *, percent: bool) -> str:
    unit = " pts" if percent else ""
    number = _number(change.mean, decimals, percent=percent, signed=True)
    return number + unit + _bounds(change, decimals, percent=percent, signed=True)


def _wins(rate: WinRate) -> str:
    return _number(rate.rate, 0, percent=True) + _bounds(rate, 0, percent=True)


def _p_value(pair: Pair, adjusted: bool) -> _Cell:
    p = pair.p_holm if adjusted and pair.p_holm is not None else pair.p_value
    text = "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0")
    return _Cell(text, "bold" if p < 0.05 else "")


def _verdict(low: float, high: float, nothing: float, higher_is_better: bool) -> str:
    """Green or red where the interval excludes 'nothing changed', by whether the change is for the better."""
    if low <= nothing <= high:
        return ""
    return "green" if (low > nothing) == higher_is_better else "red"


def _rich(cells: _Cells, title: str | None, *, sections: bool = False) -> Table:
    """Names fold where it gets narrow, numbers do not; one that is cut nevertheless ends in an ellipsis.

    `sections` turns the first column into headings, which saves its width.
    """
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for index, name in enumerate(cells.header[sections:], start=sections):
        if index < _NUMBERS_FROM:
            table.add_column(Text(name), overflow="fold")
        else:
            table.add_column(Text(name), justify="right", no_wrap=True, overflow="ellipsis")
    for row in cells.rows:
        if sections and row[0].text:
            table.add_row(Text(row[0].text, style="bold"))
        table.add_row(*(Text(cell.text, style=cell.style) for cell in row[sections:]))
    return table


def _markdown(cells: _Cells) -> str:
    names = len(cells.header) - _NUMBERS_FROM
    header = [name.replace("\n", " ") for name in cells.header]
    lines = [header, ["---"] * _NUMBERS_FROM + ["---:"] * names]
    lines += [[cell.text.replace("|", "\\|") for cell in row] for row in cells.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
