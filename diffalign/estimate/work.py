"""What a method does in one iteration on one process, counted: how many rows go through the network, and how.

A row is one latent with its prompt; guidance by two predictions doubles what the network sees of it. `methods.py` has
the figures of each method.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Pictures that the policy draws in an iteration.

    Args:
        rows: pictures per denoiser call.
        calls: rows that go through the denoiser, over all its calls.
        decoded: pictures that are decoded; decoded_at_once: per call of the decoder.
        guidance: see `SamplerConfig.guidance_scale`.
    """

    rows: int
    calls: float
    decoded: float
    decoded_at_once: int
    guidance: float


@dataclass(frozen=True)
class Work:
    """One iteration.

    Args:
        rows: of one batch that is learned from; batches: how many of them, in `updates` optimizer steps.
        guidance: of their predictions.
        frozen_before, frozen_after: passes without gradient per batch, before the policy's and while its graph is kept.
        other_rows: further rows without gradient.
        depth: most denoising steps that a graph goes through; mean_depth: on average.
        checkpointed_steps: each of them keeps its latent only.
        reference_in_graph: each of them has a pass of the reference beside it, with gradient.
        decodes: gradients go through the decoder, from this many pictures for each row.
        reference, snapshot: there is a frozen starting point, and a copy of the trained weights besides.
        kept_elements: bytes that are kept of sampled latents, per latent element; kept_prompts: encoded prompts beside
            them.
        encoded_at_once: pictures per call of the encoder, 0 where none are encoded; encoded: in every iteration.
        sampling: None where nothing is drawn.
    """

    rows: int
    batches: float
    updates: float
    guidance: float = 1.0
    frozen_before: float = 0.0
    frozen_after: int = 0
    other_rows: float = 0.0
    depth: int = 1
    mean_depth: float = 1.0
    checkpointed_steps: bool = False
    reference_in_graph: bool = False
    decodes: int = 0
    reference: bool = False
    snapshot: bool = False
    kept_elements: float = 0.0
    kept_prompts: float = 0.0
    encoded_at_once: int = 0
    encoded: float = 0.0
    sampling: Sampling | None = None

    @property
    def accumulates(self) -> bool:
        """An optimizer step sums the gradients of several batches."""
        return self.batches > self.updates
