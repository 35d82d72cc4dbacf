"""What the training loop knows of an algorithm: batches and a loss, nothing else."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.losses.base import LossOutput

T = TypeVar("T")


class Batch(Protocol):
    """One forward and backward pass; `weight` is its share of an update (the weights of an update sum to 1)."""

    @property
    def weight(self) -> float: ...


class Algorithm(Protocol):
    """Turns data into updates. Everything it draws is a function of (seed, iteration, position in the run).

    A method inherits it and writes `updates` and `loss`; the other questions are answered as by one that measures
    nothing of its own and has nothing to restore.

    `uses_reference`: it needs the frozen policy that training started from.
    """

    uses_reference: bool = False

    @abstractmethod
    def updates(self, iteration: int) -> Iterator[Sequence[Any]]:
        """The updates of one iteration; each is the batches whose gradients one optimizer step sums."""

    @abstractmethod
    def loss(self, batch: Any) -> LossOutput:
        """The loss of one batch, before its weight."""

    def metrics(self) -> dict[str, float]:
        """Figures of the iteration just sampled (rewards, say), beside the losses' own."""
        return {}

    def validate(self, iteration: int) -> dict[str, float]:
        """Held-out measurements that are due after this many iterations, or nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-safe state that the next iteration depends on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        return


COUNTS = ("sampled_pictures", "training_pictures", "reward_queries", "preference_labels", "captions")
"""What every run counts, from 0: pictures sampled for training; (picture, noise level) pairs that the loss saw; scores
of one picture by one reward; labelled pairs and captioned pictures that training saw, each once."""


@runtime_checkable
class KeepsWork(Protocol):
    """An algorithm whose iteration holds more than a function of (seed, iteration, rank): sampled trajectories, say.

    Where a run is told to stop inside an iteration, this is kept too, so that nothing is done again.
    """

    def unfinished(self, iteration: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and JSON-safe state of what this process has of `iteration`; None: nothing yet."""

    def take_up(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from what `unfinished` gave: the next `updates` is of the same iteration."""


@runtime_checkable
class KeepsTensors(Protocol):
    """An algorithm whose state between iterations is more than JSON: an earlier policy's weights, say.

    Every checkpoint holds it, and all processes have the same.
    """

    def tensors(self) -> dict[str, Tensor]:
        """What `load_tensors` needs, by name."""

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The way back, after `load_state_dict`. Raises KeyError or ValueError if they are of another run."""


class Meter:
    """Seconds by phase and counts of what was consumed: the cost of a run.

    Args:
        device: CUDA work is waited for at the end of a phase, so that its time is its own.
        on_phase: told the name of each phase that begins (for progress displays).
    """

    def __init__(
        self, device: torch.device | None = None, on_phase: Callable[[str], None] | None = None
    ) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self._began = time.perf_counter()
        self._device, self._on_phase = device, on_phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `seconds[name]`."""
        if self._on_phase is not None:
            self._on_phase(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device is not None and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def count(self, name: str, number: int) -> None:
        """Add to `counts[name]`."""
        self.counts[name] = self.counts.get(name, 0) + number

    @property
    def samples(self) -> int:
        """Pictures learnt from so far: those that were sampled, or those that the loss saw where none are."""
        return self.counts["sampled_pictures"] or self.counts["training_pictures"]

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, without the time between an interruption and its resume."""
        return time.perf_counter() - self._began

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": dict(self.seconds), "counts": dict(self.counts), "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.counts = dict(state["seconds"]), {**dict.fromkeys(COUNTS, 0), **state["counts"]}
        self._began = time.perf_counter() - state["elapsed"]


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Context:
    """What an algorithm is told about the run.

    Args:
        seed: the run's seed.
        rank, world: this process and how many there are.
        device: where tensors must be to be gathered.
        gather: concatenates a tensor over all processes, in rank order.
        meter: where it reports its phases.
        say: shows the user a line.
        poll: called between any two pieces of work; raises when the run is told to stop.
    """

    seed: int = 0
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gather: Callable[[Tensor], Tensor] = _alone
    meter: Meter = field(default_factory=Meter)
    say: Callable[[str], None] = print
    poll: Callable[[], None] = lambda: None

    def share(self, prompts: int) -> int:
        """How many of an iteration's prompts are this process's: rows r, r + N, ... of process r of N.

        Raises:
            ConfigError: they cannot be shared evenly.
        """
        if prompts % self.world:
            raise ConfigError(
                f"algorithm.prompts_per_iteration: {prompts} prompts cannot be shared evenly by "
                f"{self.world} processes"
            )
        return prompts // self.world

    def watched(self, pieces: Iterable[T]) -> Iterator[T]:
        """`pieces`, with a poll before each."""
        for piece in pieces:
            self.poll()
            yield piece
