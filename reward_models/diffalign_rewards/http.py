"""A reward that another process or machine computes (`diffalign serve-rewards`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import RewardError
from diffalign.images import to_pil
from diffalign.rewards import RewardModel
from diffalign_rewards.remote import Endpoint, beginning, png_base64, secret

_ROOM_FOR_THE_REST = 4096  # bytes of a request beside its pictures and prompts
_PER_PAIR = 16  # quotes, commas and spaces


class HTTPReward(RewardModel):
    """A reward of a `diffalign serve-rewards` service, with that reward's attributes.

    Pictures travel as PNG, so tensors are rounded to 8 bits.

    Args:
        url: e.g. http://127.0.0.1:8100.
        reward: its name there; may be left out where the service has one only.
        token_env: environment variable that holds the service's token.
        timeout_s: seconds to wait for an answer.
        retries: further attempts after connection errors, 429 and 5xx, with growing delays.
    """

    def __init__(
        self,
        *,
        url: str,
        reward: str | None = None,
        token_env: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 5,
    ) -> None:
        what = f"the reward service at {url}"
        self.endpoint = Endpoint(
            url, what=what, token=secret(token_env), timeout_s=timeout_s, retries=retries
        )
        described = self.endpoint.call("/rewards")
        try:
            offered, limits = dict(described["rewards"]), described["limits"]
            self.reward = _chosen(what, offered, reward)
            self._take_attributes(offered[self.reward])
            self.batch_size = min(RewardModel.batch_size, _positive(limits["batch"]))
            self._body_bytes = _positive(limits["body_bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise RewardError(
                f"{what} does not describe its rewards",
                why=f"GET /rewards gave {beginning(str(described))}",
                hint="is it a diffalign reward service, of this version?",
            ) from error
        self.name = f"{self.reward} at {self.endpoint.url}"

    def _take_attributes(self, found: dict[str, Any]) -> None:
        low, high = found["range"]
        self.range = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
        for name, kind in (("higher_is_better", bool), ("needs_prompt", bool), ("license", str)):
            if not isinstance(found[name], kind):
                raise TypeError(name)
            setattr(self, name, found[name])

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score_pictures(to_pil(images), prompts)

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        encoded = [png_base64(picture) for picture in pictures]
        scores: list[float] = []
        for rows in self._requests(encoded, prompts):
            asked = {
                "reward": self.reward,
                "images": encoded[rows],
                "prompts": list(prompts[rows]),
            }
            scores += self._scores(self.endpoint.call("/score", asked), prompts[rows])
        return torch.tensor(scores, dtype=torch.float32)

    def _requests(self, encoded: Sequence[str], prompts: Sequence[str]) -> Iterator[slice]:
        """Runs of pictures whose requests stay below the service's largest body."""
        start, size = 0, _ROOM_FOR_THE_REST
        for row, (picture, prompt) in enumerate(zip(encoded, prompts, strict=True)):
            own = len(picture) + len(json.dumps(prompt)) + _PER_PAIR
            if row > start and size + own > self._body_bytes:
                yield slice(start, row)
                start, size = row, _ROOM_FOR_THE_REST
            size += own
        yield slice(start, len(encoded))

    def _scores(self, answer: dict[str, Any], prompts: Sequence[str]) -> list[float]:
        results = answer.get("results")
        if not isinstance(results, list) or len(results) != len(prompts):
            count = len(results) if isinstance(results, list) else "no"
            raise RewardError(
                f"{self.endpoint.what} returned the wrong number of scores",
                why=f"{count} for {len(prompts)} pictures; its answer begins: {beginning(str(answer))}",
            )
        return [self._one(result, prompt) for result, prompt in zip(results, prompts, strict=True)]

    def _one(self, result: Any, prompt: str) -> float:
        """The score; NaN where the service's was not finite, which `__call__` refuses with the picture's place."""
        score = result.get("score") if isinstance(result, dict) else None
        if isinstance(score, int | float) and not isinstance(score, bool):
            return float(score)
        error = result.get("error") if isinstance(result, dict) else None
        if not isinstance(error, dict):
            raise RewardError(
                f"{self.endpoint.what} gave neither a score nor an error",
                why=f"for the prompt {prompt!r} it gave {beginning(str(result))}",
            )
        if error.get("kind") == "non_finite":
            return math.nan
        raise RewardError(
            f"{self.endpoint.what} could not score a picture",
            where=f"reward {self.reward}, prompt {prompt!r}",
            why=str(error.get("message")),
        )


def _chosen(what: str, offered: dict[str, Any], reward: str | None) -> str:
    if reward is None and len(offered) == 1:
        return next(iter(offered))
    if reward not in offered:
        raise RewardError(
            f"{what} has no reward {reward}" if reward else f"{what} has several rewards",
            why=f"it has {', '.join(offered)}",
            hint="name one with the option reward",
        )
    return reward


def _positive(number: object) -> int:
    if not isinstance(number, int) or number < 1:
        raise ValueError(number)
    return number
