"""One thread per reward, which scores the pictures of several clients as one batch.

That changes no score, because a picture's score never depends on its batch. Pictures stay encoded while they wait:
only a batch is in memory as pixels.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from diffalign.errors import DataError, DiffalignError
from diffalign.rewards.model import NonFiniteScore, RewardModel
from diffalign.rewards.service.limits import Limits
from diffalign.rewards.service.pictures import decode_png

_log = logging.getLogger(__name__)
_STOP_SECONDS = 10


@dataclass(frozen=True)
class Failure:
    """Why one picture has no score."""

    kind: Literal["picture", "non_finite", "reward"]
    message: str


Result = float | Failure


@dataclass
class _Job:
    """One request: base64 PNGs and as many prompts."""

    pictures: Sequence[str]
    prompts: Sequence[str]
    answer: Future[list[Result]] = field(default_factory=Future)


class Worker:
    """Scores with one reward, in the order of arrival.

    A batch is closed when it has the reward's `batch_size`, or after `limits.gather_s`. Whatever waited during the
    batch before is taken at once.
    """

    def __init__(self, name: str, reward: RewardModel, limits: Limits) -> None:
        self.name, self.reward, self.limits = name, reward, limits
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"reward {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish what waits, then end."""
        self._jobs.put(None)
        self._thread.join(_STOP_SECONDS)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, pictures: Sequence[str], prompts: Sequence[str]) -> Future[list[Result]]:
        """A score or a failure for every picture, in their order."""
        job = _Job(pictures, prompts)
        self._jobs.put(job)
        return job.answer

    def _run(self) -> None:
        while (first := self._jobs.get()) is not None:
            jobs = [job for job in self._gather(first) if job.answer.set_running_or_notify_cancel()]
            try:
                results = self._score(
                    [picture for job in jobs for picture in job.pictures],
                    [prompt for job in jobs for prompt in job.prompts],
                )
            except BaseException as error:  # whatever a scorer does, nobody waits for ever
                _log.error("reward %s failed", self.name, exc_info=error)
                for job in jobs:
                    job.answer.set_exception(RuntimeError(f"reward {self.name} failed"))
                continue
            for job in jobs:
                job.answer.set_result(results[: len(job.pictures)])
                results = results[len(job.pictures) :]

    def _gather(self, first: _Job) -> list[_Job]:
        jobs, count = [first], len(first.pictures)
        deadline = time.monotonic() + self.limits.gather_s
        while count < self.reward.batch_size:
            try:
                job = self._jobs.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)
                break
            jobs.append(job)
            count += len(job.pictures)
        return jobs

    def _score(self, pictures: Sequence[str], prompts: Sequence[str]) -> list[Result]:
        results: dict[int, Result] = {}
        decoded: dict[int, Image.Image] = {}
        for row, picture in enumerate(pictures):
            try:
                decoded[row] = decode_png(picture, self.limits.pixels)
            except DataError as error:
                results[row] = Failure("picture", _one_line(error))
        scores = score_each(self.reward, list(decoded.values()), [prompts[row] for row in decoded])
        results.update(zip(decoded, scores, strict=True))
        return [results[row] for row in range(len(pictures))]


def score_each(reward: RewardModel, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[Result]:
    """Scores of all pictures; a batch that fails is halved until the pictures at fault stand alone."""
    if not pictures:
        return []
    try:
        return list(reward(pictures, prompts).tolist())
    except Exception as error:
        if len(pictures) == 1:
            return [_failure(reward, error)]
    half = len(pictures) // 2
    return score_each(reward, pictures[:half], prompts[:half]) + score_each(
        reward, pictures[half:], prompts[half:]
    )


def _failure(reward: RewardModel, error: Exception) -> Failure:
    if isinstance(error, NonFiniteScore):
        return Failure("non_finite", error.what)
    if isinstance(error, DiffalignError):
        return Failure("reward", _one_line(error))
    _log.error("reward %s failed", reward.name, exc_info=error)
    return Failure(
        "reward", f"reward {reward.name} failed with {type(error).__name__} (see the service's log)"
    )


def _one_line(error: DiffalignError) -> str:
    return f"{error.what}: {error.why}" if error.why else error.what
