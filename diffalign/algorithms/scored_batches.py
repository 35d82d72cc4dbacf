"""Pictures of an iteration, sampled batch by batch and scored beside it; can be interrupted and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.algorithms.base import Context
from diffalign.errors import NumericsError
from diffalign.models.base import Denoiser
from diffalign.rewards import BackgroundScorer, RewardMixture
from diffalign.rewards.mixture import Scores

SCORE = "score."
"""Start of the names of a batch's scores among its tensors."""


@dataclass
class _Batch:
    sampled: dict[str, Tensor]
    components: dict[str, Tensor] | None = None
    future: Future[Scores] | None = None

    def note_scores(self) -> None:
        """Keep the scores if they are there."""
        future = self.future
        if future is not None and future.done() and not future.cancelled() and future.exception() is None:
            self.components = future.result().components

    def failed_with(self, error: Exception) -> bool:
        return self.future is not None and self.future.done() and self.future.exception() is error


class ScoredBatches:
    """What this process has of an iteration so far.

    What is sampled of a batch is a dictionary of tensors, of which "latents" become the pictures: [B, C, H, W], or
    [N + 1, B, C, H, W] of trajectories, whose last are finished.

    Args:
        size: pictures per batch; changes memory and speed only.
        trajectories: all tensors are of trajectories, [steps, B, ...].
        in_background: score a batch in a thread while the next one is sampled.
    """

    def __init__(
        self,
        reward: RewardMixture,
        denoiser: Denoiser,
        context: Context,
        *,
        size: int,
        trajectories: bool = False,
        in_background: bool = True,
    ) -> None:
        self.reward, self.denoiser, self.context = reward, denoiser, context
        self.size, self.trajectories, self.in_background = size, trajectories, in_background
        self._batches: list[_Batch] = []

    def __len__(self) -> int:
        return len(self._batches)

    def clear(self) -> None:
        self._batches = []

    def final(self, sampled: dict[str, Tensor]) -> Tensor:
        """The finished latents [B, C, H, W]."""
        return sampled["latents"][-1] if self.trajectories else sampled["latents"]

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], draw: Callable[[slice], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What `draw` gives for all prompts, and the components [B] of their rewards; what is there already is kept.

        Args:
            draw: samples the pictures at some places of `prompts` and `seeds`.

        Raises:
            NumericsError: a score that is not finite, with the prompts and seeds of its batch as evidence.
        """
        meter = self.context.meter
        try:
            with BackgroundScorer(self.reward, self.denoiser.device) as scorer:
                for number, start in enumerate(range(0, len(prompts), self.size)):
                    self.context.poll()
                    rows = slice(start, start + self.size)
                    with meter.phase("sampling"), torch.no_grad():
                        if number == len(self._batches):
                            self._batches.append(_Batch(draw(rows)))
                        batch = self._batches[number]
                        if batch.components is not None:
                            continue
                        pictures = self.denoiser.decode(self.final(batch.sampled))
                    batch.future = scorer.submit(pictures, prompts[rows])
                    if not self.in_background:
                        self._wait_for_scores()
                self._wait_for_scores()
        except NumericsError as error:
            error.evidence = self._evidence(error, prompts, seeds) or error.evidence
            raise
        finally:
            for batch in self._batches:
                batch.note_scores()
        self.reward.offload()
        return self._joined(), self._components()

    def _wait_for_scores(self) -> None:
        with self.context.meter.phase("reward"):
            for batch in self._batches:
                self.context.poll()
                if batch.future is not None:
                    batch.future.result()
                batch.note_scores()
                batch.future = None

    def _evidence(
        self, error: NumericsError, prompts: Sequence[str], seeds: Sequence[int]
    ) -> dict[str, Any] | None:
        """Prompts and seeds of the batch whose scoring raised this error, if one did."""
        for number, batch in enumerate(self._batches):
            if batch.failed_with(error):
                rows = slice(number * self.size, (number + 1) * self.size)
                return {"prompts": list(prompts[rows]), "seeds": list(seeds[rows])}
        return None

    def _joined(self) -> dict[str, Tensor]:
        parts = [batch.sampled for batch in self._batches]
        dimension = int(self.trajectories)
        return {name: torch.cat([part[name] for part in parts], dim=dimension) for name in parts[0]}

    def _components(self) -> dict[str, Tensor]:
        parts = [batch.components for batch in self._batches if batch.components is not None]
        device = self.denoiser.device
        return {label: torch.cat([part[label] for part in parts]).to(device) for label in self.reward.labels}

    # What is kept when a run is told to stop while sampling

    def tensors(self) -> dict[str, Tensor]:
        """The batches so far, by number and name; `take_up` is the way back."""
        return {
            f"{number}.{name}": tensor
            for number, batch in enumerate(self._batches)
            for name, tensor in {**batch.sampled, **named_scores(batch.components or {})}.items()
        }

    def take_up(self, tensors: dict[str, Tensor], count: int) -> None:
        """Go on from `count` batches that `tensors` gave."""
        self._batches = []
        for number in range(count):
            prefix = f"{number}."
            mine = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            scores = scores_of(mine)
            sampled = {name: t for name, t in mine.items() if not name.startswith(SCORE)}
            self._batches.append(_Batch(sampled, scores or None))


def named_scores(components: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores under names that no other tensor has."""
    return {f"{SCORE}{label}": scores for label, scores in components.items()}


def scores_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back from `named_scores`."""
    return {name.removeprefix(SCORE): t for name, t in tensors.items() if name.startswith(SCORE)}
