"""What a run shows while it works: phase, bar, key figures, time left. Plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 15.0
SHOWN_METRICS = ("reward/mean", "train/loss", "train/error", "train/accuracy", "validation/accuracy")


class RunProgress:
    """A context manager around a run; `enabled=False` (other processes than the first) shows nothing."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.console = Console(quiet=not enabled)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self._task = self._bar.add_task("starting", total=None, figures="")
        self._stage, self._first = "starting", 0
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line above the bar, or in the log."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        """Start a stage of `total` steps."""
        self._stage, self._first = stage, done
        self._started = self._last_line = time.monotonic()
        self._bar.reset(self._task, description=stage, total=total, completed=done, figures="")

    def phase(self, name: str) -> None:
        """Show what the stage is doing just now."""
        self._bar.update(self._task, description=f"{self._stage}: {name}")

    def advance(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """`done` steps of the stage are finished."""
        shown = {name: metrics[name] for name in SHOWN_METRICS if name in metrics} if metrics else {}
        figures = "  ".join(f"{name.split('/')[-1]} {value:.4g}" for name, value in shown.items())
        if "reward/mean" in shown:
            figures = f"reward {shown['reward/mean']:.4g}"
        self._bar.update(self._task, completed=done, figures=figures)
        now = time.monotonic()
        total = self._bar.tasks[self._task].total or 0
        if self._bar.disable and (now - self._last_line > SECONDS_BETWEEN_LINES or done >= total):
            self._last_line = now
            rate = (now - self._started) / max(done - self._first, 1)
            self.say(f"{self._stage} {done}/{int(total)}  {figures}  {rate * (total - done):.0f} s left")
