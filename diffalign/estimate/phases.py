"""The phases of a run, each carried out once on the meta device: what it allocates, and how much it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.config import Run
from diffalign.estimate.architecture import META
from diffalign.estimate.counting import Cost, Counter, weights_of
from diffalign.estimate.kernels import Kernels
from diffalign.estimate.subject import PROMPT, conditioning, prompt_rows
from diffalign.estimate.work import Work
from diffalign.models.base import Conditioning
from diffalign.models.diffusers_denoiser import DiffusersDenoiser

PROMPTS_AT_ONCE = 64
"""As `DiffusersDenoiser` encodes them."""


@dataclass(frozen=True)
class Step:
    """One batch that is learned from: its `peak` beyond weights and gradients that were there, and `flops` apart from
    passes without gradient."""

    peak: int
    flops: int


class Phases:
    """Measures each phase when it is first asked for.

    Args:
        denoiser: from `subject`, with its reference where `work` needs one.
    """

    def __init__(self, denoiser: DiffusersDenoiser, work: Work, config: Run) -> None:
        self.denoiser, self.work, self.config = denoiser, work, config
        self._forwards: dict[tuple[int, float], Cost] = {}
        self._decoded: dict[int, Cost] = {}

    @cached_property
    def given(self) -> list[Tensor]:
        """Everything that lies in memory all the time."""
        frozen = [] if self.denoiser._frozen_copies is None else [self.denoiser._frozen_copies[0]]
        encoders = {} if self.denoiser._frozen_copies is None else self.denoiser._frozen_copies[1]
        return weights_of(*self.denoiser.networks().values(), *frozen, *encoders.values())

    @cached_property
    def prompt(self) -> Mapping[str, Tensor]:
        """Two encoded prompts, by name."""
        return prompt_rows(self.denoiser, 2)

    @property
    def prompt_bytes(self) -> int:
        """Of one encoded prompt."""
        return sum(value[0].numel() * value.element_size() for value in self.prompt.values())

    # Without gradient

    def forward(self, rows: int, guidance: float) -> Cost:
        """One prediction of `rows` latents."""
        key = (rows, guidance)
        if key not in self._forwards:
            self.prompt  # noqa: B018 -- before anything counts
            with torch.no_grad(), Kernels(), Counter(self.given) as counter:
                x = self._latents(rows)
                self._predict(x, conditioning(self.prompt, rows), guidance)
            self._forwards[key] = counter.cost
        return self._forwards[key]

    def decode(self, pictures: int) -> Cost:
        """Pictures from latents, in one call."""
        if pictures not in self._decoded:
            with torch.no_grad(), Kernels(), Counter(self.given) as counter:
                self.denoiser.decode(self._latents(pictures))
            self._decoded[pictures] = counter.cost
        return self._decoded[pictures]

    def encode(self, pictures: int) -> Cost:
        """Latents from pictures, in one call."""
        height, width = (int(side) for side in self.denoiser.size)
        with torch.no_grad(), Kernels(), Counter(self.given) as counter:
            self.denoiser.encode_images(torch.empty(pictures, 3, height, width, device=META))
        return counter.cost

    def prompts(self, count: int) -> Cost:
        """Encoding of `count` prompts that are not in the cache."""
        with Counter(self.given) as counter:
            prompt_rows(self.denoiser, min(count, PROMPTS_AT_ONCE))
        return counter.cost

    # With gradient

    @cached_property
    def training(self) -> Step:
        """Forward and backward pass of one batch. Steps that are all kept in memory are extrapolated from two."""
        depth = self.work.depth
        if depth <= 2:
            return self._step(depth)
        one, two = self._step(1), self._step(2)
        return Step(
            one.peak + (depth - 1) * (two.peak - one.peak), one.flops + (depth - 1) * (two.flops - one.flops)
        )

    def _step(self, depth: int) -> Step:
        parameters = self.denoiser.trainable_parameters().values()
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter) if self.work.accumulates else None
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not self.denoiser.trains_text_encoder:
            self.prompt  # noqa: B018 -- before anything counts
        with Kernels(), Counter([*self.given, *gradients]) as counter:
            loss, frozen = self._loss(depth, counter)
            loss.backward()
        for parameter in parameters:
            parameter.grad = None
        return Step(counter.peak, counter.flops - frozen)

    def _loss(self, depth: int, counter: Counter) -> tuple[Tensor, int]:
        """A scalar with the graph of the method's loss, and the flops of the passes without gradient in it."""
        work, denoiser = self.work, self.denoiser
        x = self._latents(work.rows)
        if denoiser.trains_text_encoder:
            prompts = denoiser.encode_prompts([PROMPT] * work.rows)
        else:
            prompts = conditioning(self.prompt, work.rows)
        out = x
        for _ in range(depth):
            out = self._denoised(out, prompts)
        before = counter.flops
        for _ in range(work.frozen_after):
            with torch.no_grad(), denoiser.reference():
                self._predict(x, prompts, work.guidance)
        frozen = counter.flops - before
        if work.decodes:
            latents = torch.cat([out] * work.decodes)
            out = checkpoint(_with_kernels(denoiser.decode), latents, use_reentrant=False,
                             preserve_rng_state=False)  # fmt: skip
        return out.float().square().mean(), frozen

    def _denoised(self, x: Tensor, prompts: Conditioning) -> Tensor:
        """One prediction, and in sampling that is differentiated the latent after it."""
        work = self.work

        def call(x: Tensor) -> Tensor:
            out = self._predict(x, prompts, work.guidance)
            if work.reference_in_graph:
                with self.denoiser.reference():
                    out = out + self._predict(x, prompts, work.guidance)
            return x + out if work.decodes else out

        if not work.checkpointed_steps:
            return call(x)
        found: Tensor = checkpoint(_with_kernels(call), x, use_reentrant=False, preserve_rng_state=False)
        return found

    def _predict(self, x: Tensor, prompts: Conditioning, guidance: float) -> Tensor:
        return self.denoiser.predict(x, torch.zeros((), device=META), prompts, guidance)

    def _latents(self, rows: int) -> Tensor:
        return torch.empty(rows, *self.denoiser.latent_shape, device=META)


def _with_kernels(function: Any) -> Any:
    """Recomputed in the backward pass, it needs them again."""

    def call(*args: Any) -> Any:
        with Kernels():
            return function(*args)

    return call
