"""Self-play: pictures of the data against the policy's own."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from diffalign.config.data import PicturesConfig
from diffalign.config.model import SamplerConfig
from diffalign.config.run import AlgorithmConfig, Run


class SPINConfig(AlgorithmConfig):
    name: Literal["spin"] = "spin"
    beta: PositiveFloat = 2000.0
    """KL strength to the last generation's policy, for errors *averaged* over latent elements, as in dpo."""
    iterations_per_generation: PositiveInt = 500
    """Iterations after which the present policy becomes the opponent and the reference."""
    batch_size: PositiveInt = 4
    """Captioned pictures per denoiser call and process, each beside a sampled one."""
    gradient_accumulation: PositiveInt = 1
    """Batches per optimizer step."""
    sample_batch_size: PositiveInt = 8
    """Pictures per denoiser call while sampling; changes memory and speed, not the pictures."""


class SPINRun(Run):
    implementation = "diffalign.algorithms.spin"
    algorithm: SPINConfig
    data: PicturesConfig
    sampler: SamplerConfig = SamplerConfig()
    """How the opponent's pictures are sampled."""

    def samples_per_iteration(self, processes: int) -> int:
        return 2 * self.algorithm.batch_size * self.algorithm.gradient_accumulation * processes
