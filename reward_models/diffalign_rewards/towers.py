"""What a CLIP model is to a reward, whichever library it comes from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffalign_rewards.preprocessing import Preprocessing


@dataclass(frozen=True)
class Towers:
    """Two encoders into one space, and what they are fed with. Their embeddings are not normalised."""

    model: Any
    """The torch module that holds all weights, and the `logit_scale` (a logarithm)."""
    preprocessing: Preprocessing
    encode_image: Callable[[Tensor], Tensor]
    """[B, 3, *size] to [B, width]."""
    encode_text: Callable[[Tensor], Tensor]
    """Token ids [B, context] to [B, width]."""
    tokenize: Callable[[list[str], int], Tensor]
    """B prompts and a length n to token ids [B, n], padded on the right, cut before the end token."""
    context: int
    """Tokens of a prompt, start and end included."""


class Shortener:
    """Says once that a prompt was too long."""

    def __init__(self, model: str, context: int) -> None:
        self.model, self.context, self._said = model, context, False

    def compare(self, prompts: list[str], tokens: Tensor, room: Tensor) -> None:
        """Warn where `tokens` [B, context] are not the start of `room` [B, context + 1], cut one later."""
        cut = (tokens != room[:, :-1]).any(1)
        if self._said or not cut.any():
            return
        self._said = True
        first = prompts[int(cut.nonzero()[0])]
        warnings.warn(
            f"{self.model} reads the first {self.context - 2} tokens of a prompt; the rest of {first[:60]!r}... "
            "is ignored (said once)",
            stacklevel=2,
        )
