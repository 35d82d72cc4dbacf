"""Pictures that cannot be read: another one stands in, chosen by counter, and too many of them end the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from diffalign.data.textfiles import listed
from diffalign.errors import DataError
from diffalign.seeding import derive_seed

T = TypeVar("T")

MAX_SHARE = 0.001
"""Of a set may be unreadable: a rotten file or two, not a rotten set."""
PAUSES = (0.2, 0.8)
"""Seconds before a picture is tried again that the system could not open: network storage may be away for a moment."""


class Substitutes(Generic[T]):
    """Items by index; for an unreadable one, always the same other.

    Args:
        load: item `index` of 0..count-1; raises DataError where it cannot be read.
        count: items in all.
        seed: chooses the substitutes.
        say: told of every unreadable item, once.
        among: item -> those that may stand in for it; None: all.
    """

    def __init__(
        self,
        load: Callable[[int], T],
        count: int,
        seed: int,
        say: Callable[[str], None] = print,
        among: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        self._load, self._count, self._seed, self._say, self._among = load, count, seed, say, among
        self._instead: dict[int, int] = {}
        self._errors: dict[int, DataError] = {}

    @property
    def unreadable(self) -> int:
        """Items found so far that cannot be read."""
        return len(self._errors)

    def index(self, index: int) -> int:
        """The item that is used for `index`: itself, or its substitute once `load` has found it unreadable."""
        return self._instead.get(index, index)

    def load(self, index: int) -> T:
        """Item `index` or its substitute.

        Raises:
            DataError: more than `MAX_SHARE` of all items cannot be read (of a set below 1,000: one).
        """
        tried, present = 0, self.index(index)
        while True:
            if present not in self._errors:
                try:
                    item = read_patiently(self._load, present)
                except DataError as error:
                    self._remember(present, error)
                else:
                    if present != index:
                        self._instead[index] = present
                    return item
            tried += 1
            others = range(self._count) if self._among is None else self._among(index)
            if all(other in self._errors for other in others):
                raise self._errors[index]
            present = others[derive_seed(self._seed, "substitute", index, tried) % len(others)]

    def _remember(self, index: int, error: DataError) -> None:
        self._errors[index] = error
        if len(self._errors) <= MAX_SHARE * self._count:
            where = f" ({error.where})" if error.where else ""
            self._say(
                f"warning: {error.what}{where}: another stands in for it, {len(self._errors)} of {self._count} so far"
            )
            return
        if len(self._errors) == 1:
            raise error
        raise DataError(
            f"{len(self._errors)} of {self._count} pictures cannot be read, more than {MAX_SHARE:.1%}",
            where=listed([found.where or found.what for found in self._errors.values()]),
            why=error.why or error.what,
            hint="repair them or take them out; diffalign score lists all that cannot be read",
        ) from error


def read_patiently(load: Callable[[int], T], index: int) -> T:
    """`load(index)`, tried again after a while where the system could not open the file."""
    for pause in PAUSES:
        try:
            return load(index)
        except DataError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno is None:  # damaged, not away
                raise
        time.sleep(pause)
    return load(index)
