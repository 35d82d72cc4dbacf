"""Preference optimisation on picture pairs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from diffalign.config.base import Share, raise_all
from diffalign.config.data import PairsConfig, bucket_conflicts
from diffalign.config.run import AlgorithmConfig, Run
from diffalign.losses.pair_table import PAIR_LOSSES, PairLoss, problems


class DPOConfig(AlgorithmConfig):
    name: Literal["dpo"] = "dpo"
    loss: Annotated[str, Field(min_length=1)] = "dpo"
    """The loss on pairs: dpo, cdpo, robust_dpo, ipo, hinge, dmpo, dspo, npo, capo, mapo or orpo."""
    beta: PositiveFloat | None = None
    """KL strength, for errors *averaged* over latent elements (the paper's sum convention is beta / D); for dspo, mapo
    and orpo the weight of the preference term. Default: the loss's own, 5000 for dpo."""
    loss_options: dict[str, float] = {}
    """Further numbers of the loss: label_smoothing (cdpo, robust_dpo), alpha (dmpo), snr and scale (mapo)."""
    safeguard: Share | None = None
    """SDPO: scale the loser's gradient so that this share (mu, 0 to 1) of the winner's own descent is left, to first
    order; 0.9 suits dpo and dmpo, 0.2 dspo. Default: off."""
    batch_size: PositiveInt = 4
    """Pairs per denoiser call and process (two pictures each)."""
    gradient_accumulation: PositiveInt = 1
    """Batches per optimizer step."""
    timestep_sampling: Literal["uniform", "stratified", "antithetic"] = "uniform"
    """uniform: independently per pair. stratified: each update spreads its pairs over equal parts of the schedule.
    antithetic: every second pair has the mirror image, T - 1 - t, of the one before."""
    timestep_range: tuple[Share, Share] = (0.0, 1.0)
    """Part of the schedule that is trained on: 0 is the noise, 1 the picture. [0, 0.75] leaves out the least noisy
    quarter, where a loss learns the fine texture of the pairs' pictures rather than what is in them."""
    ties: Literal["drop", "soft"] = "drop"
    """Pairs labelled 0.5: leave them out, or train on them with preference probability 0.5."""
    validation_every: Annotated[int, Field(ge=0)] = 50
    """Iterations between measurements of implicit accuracy on the held-out pairs; 0: never."""
    validation_timesteps: PositiveInt = 10
    """Fixed timesteps (evenly spread) at which held-out pairs are measured, with fixed noise."""

    @property
    def pair_loss(self) -> PairLoss:
        """The table's line of `loss`."""
        return PAIR_LOSSES[self.loss]

    def trained_timesteps(self, total: int) -> range:
        """The timesteps of `total` that are trained on, at least one."""
        first, last = (total - round(share * total) for share in reversed(self.timestep_range))
        return range(min(first, total - 1), max(first + 1, last))

    @model_validator(mode="after")
    def _fits_its_loss(self) -> DPOConfig:
        found = list(problems(self.loss, self.beta, self.loss_options))
        if not self.timestep_range[0] < self.timestep_range[1]:
            found.append(
                f"timestep_range: {list(self.timestep_range)} is empty; the first must be below the second"
            )
        entry = PAIR_LOSSES.get(self.loss)
        if entry is not None and self.ties == "soft" and "probability" not in entry.extras:
            found.append(f"ties: {self.loss} does not know soft labels; leave ties out (drop)")
        if entry is not None and entry.raises_winner and self.safeguard is not None:
            found.append(
                f"safeguard: {self.loss} raises the preferred picture's error by design; leave safeguard out"
            )
        return raise_all(self, found)


class DPORun(Run):
    implementation = "diffalign.algorithms.preference"
    algorithm: DPOConfig
    data: PairsConfig

    def _conflicts(self) -> list[str]:
        return super()._conflicts() + bucket_conflicts(self.data.buckets, self.model.resolution)

    def samples_per_iteration(self, processes: int) -> int:
        return 2 * self.algorithm.batch_size * self.algorithm.gradient_accumulation * processes
