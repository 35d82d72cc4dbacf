"""The verifier of the Shapes world as rewards: exact, and pleased by nothing but the scene."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from diffalign.data.shapes_verifier import Verdict, verify
from diffalign.errors import DataError
from diffalign.images import to_pil
from diffalign.rewards import RewardModel, once_per_batch


class _Verified(RewardModel):
    range = (0.0, 1.0)
    license = "Apache-2.0"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        verdicts = once_per_batch(("shapes", *prompts), images, lambda: _judge(to_pil(images), prompts))
        return self._grades(verdicts)

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._grades(once_per_batch(("shapes", *prompts), pictures, lambda: _judge(pictures, prompts)))

    def _grades(self, verdicts: Sequence[Verdict]) -> Tensor:
        return torch.tensor([self._grade(verdict) for verdict in verdicts], dtype=torch.float32)

    @abstractmethod
    def _grade(self, verdict: Verdict) -> float: ...


class ShapesReward(_Verified):
    """Share of a Shapes caption that the picture fulfils (count, colours, shapes, relation), 0 to 1."""

    name = "shapes"

    def _grade(self, verdict: Verdict) -> float:
        return verdict.score


class ShapesAccuracy(_Verified):
    """1 where the picture is exactly what a Shapes caption says, else 0: the gold measure."""

    name = "shapes_accuracy"

    def _grade(self, verdict: Verdict) -> float:
        return float(verdict.correct)


def _judge(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[Verdict]:
    return [_verify(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]


def _verify(picture: Image.Image, prompt: str) -> Verdict:
    try:
        return verify(picture, prompt)
    except ValueError as error:
        raise DataError(
            f"the shapes rewards cannot judge the prompt {prompt!r}",
            why=str(error),
            hint='they know captions of the Shapes world only, e.g. "a red star above a blue circle"',
        ) from None
