"""Every error a user can meet, and the exit code of each.

A `DiffalignError` is one screen: what happened, where, why, and what to do next. The command line prints
`render()` and exits with `exit_code`; the traceback goes to the log only. `ValueError` from a pure function
(a loss, a transition) is for the caller's own mistake in Python and never reaches the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class DiffalignError(Exception):
    """Base of all user-facing errors.

    Args:
        what: one line, what went wrong.
        where: file, line, option or sample the error is about.
        why: the cause, where it is not plain from `what`.
        hint: what to do next.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: str | None = None, why: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.hint = what, where, why, hint

    def render(self) -> str:
        """The error as the terminal shows it: `error: ...` and one labelled line per part."""
        parts = [("where", self.where), ("why", self.why), ("next", self.hint)]
        lines = [f"error: {self.what}"]
        for label, text in parts:
            if text:
                indented = text.replace("\n", "\n         ")
                lines.append(f"  {label + ':':<6} {indented}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render().removeprefix("error: ")


class ConfigError(DiffalignError):
    """One or more mistakes in a configuration or on the command line; all of them at once."""

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        problems: Sequence[str] = (),
        where: str | None = None,
        why: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what, where=where, why=why, hint=hint)
        self.problems = list(problems)

    def render(self) -> str:
        if not self.problems:
            return super().render()
        lines = [f"error: {problem}" for problem in self.problems]
        if self.hint:
            lines.append(f"  next:  {self.hint}")
        return "\n".join(lines)


class DataError(DiffalignError):
    """Prompts, images or preference pairs that are missing, unreadable or inconsistent."""

    exit_code = 3


class NumericsError(DiffalignError):
    """A loss, gradient, reward or importance ratio that must not reach the optimizer.

    `evidence`: JSON-safe, which samples it was found in (prompts, seeds), where that is known.
    """

    exit_code = 4
    evidence: dict[str, Any] | None = None


class CheckpointError(DiffalignError):
    """A model or run checkpoint that is missing, damaged, unsafe or of the wrong kind."""

    exit_code = 5


class RewardError(DiffalignError):
    """A reward model that cannot be built or failed to score."""

    exit_code = 6


class DeviceError(DiffalignError):
    """A device or precision that was asked for and is not there, or memory that ran out."""

    exit_code = 7


class StorageError(DiffalignError):
    """No room, or no permission, where results should go."""

    exit_code = 8


class ProcessError(DiffalignError):
    """Another process of the run is missing, or failed in a way that only it can explain.

    `shared`: the other processes know, or cannot be told.
    """

    exit_code = 9
    shared = False


class DoesNotFit(DiffalignError):
    """An estimate that is above the memory there is; nothing is wrong with the run otherwise."""

    exit_code = 10


def first_line(error: BaseException) -> str:
    """What an error of another library says, without the rest; its class where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
