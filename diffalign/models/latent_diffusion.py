"""Families with a variance-preserving schedule: betas from the checkpoint's scheduler, DDIM and DDPM."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from diffalign.config import SamplerConfig
from diffalign.errors import CheckpointError, ConfigError
from diffalign.models.diffusers_denoiser import DiffusersDenoiser
from diffalign.schedule import NoiseSchedule
from diffalign.transitions import Sampler


class LatentDiffusion(DiffusersDenoiser):
    """What Stable Diffusion 1, 2, XL and PixArt have in common: see `DiffusersDenoiser`."""

    schedule: NoiseSchedule
    network_name: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    @property
    def unet(self) -> Any:
        """The denoising network; inside `reference()`, that of the reference."""
        return self.network

    def _require_safe_vae(self) -> None:
        """Raise ConfigError for the VAE of Stable Diffusion XL, which others share, in float16."""
        if self.config.vae_dtype == "float16" and self.vae.config.force_upcast:
            raise ConfigError(
                "model.vae_dtype: this checkpoint's VAE overflows in float16 and returns black pictures",
                hint="use bfloat16 or float32, or a VAE made for float16, whose config has force_upcast: false",
            )

    def _set_schedule(self) -> None:
        self._scheduler_config = self._effective_scheduler_config()
        self._solver = isinstance(self.pipeline.scheduler, DPMSolverMultistepScheduler)
        if self.config.prediction_type is not None or self.config.zero_terminal_snr is not None:
            kept = DPMSolverMultistepScheduler if self._solver else DDIMScheduler  # for the same timesteps
            self.pipeline.scheduler = kept.from_config(self._scheduler_config)  # exported with the weights
        scheduler = DDIMScheduler.from_config(self._scheduler_config)
        self.schedule = NoiseSchedule(
            scheduler.alphas_cumprod, scheduler.config.prediction_type, float(scheduler.final_alpha_cumprod)
        )

    def _effective_scheduler_config(self) -> dict[str, object]:
        name = type(self.pipeline.scheduler).__name__
        settings = dict(self.pipeline.scheduler.config)
        others = name.startswith(("EDM", "FlowMatch")) or settings.get("use_flow_sigmas")
        if others or "beta_schedule" not in settings:
            raise CheckpointError(
                f"{self.config.path} has another noise schedule than its family: {name}",
                why="DDIM and DDPM need the betas of a variance-preserving diffusion",
                hint="give a checkpoint whose scheduler is one of Stable Diffusion's (DDIM, Euler, PNDM, DPM++)",
            )
        settings.update(clip_sample=False, thresholding=False, variance_type="fixed_small")
        if self.config.prediction_type is not None:
            settings["prediction_type"] = self.config.prediction_type
        if self.config.zero_terminal_snr is not None:
            settings["rescale_betas_zero_snr"] = self.config.zero_terminal_snr
            if self.config.zero_terminal_snr:
                settings["timestep_spacing"] = "trailing"  # the noisiest timestep must be visited
        if settings.get("rescale_betas_zero_snr") and settings.get("prediction_type", "epsilon") == "epsilon":
            raise ConfigError(
                "model.zero_terminal_snr: an epsilon-prediction checkpoint cannot have zero terminal SNR",
                why="at zero signal, x_0 cannot be recovered from the predicted noise",
                hint="use a v_prediction checkpoint, or leave zero_terminal_snr out",
            )
        return settings

    def _schedule_settings(self) -> dict[str, object]:
        return self._scheduler_config

    def make_sampler(self, config: SamplerConfig) -> Sampler:
        if config.is_flow:
            raise ConfigError(
                f"sampler.kind: {config.kind} is for flow models",
                why="this checkpoint is a variance-preserving diffusion model",
                hint="use ddim or ddpm",
            )
        scheduler_class = DDIMScheduler if config.kind == "ddim" else DDPMScheduler
        scheduler = scheduler_class.from_config(self._scheduler_config)
        if config.steps > self.schedule.num_timesteps:
            raise ConfigError(
                f"sampler.steps: {config.steps} is more than the {self.schedule.num_timesteps} timesteps "
                "this checkpoint was trained with"
            )
        scheduler.set_timesteps(config.steps)
        timesteps = scheduler.timesteps.long()
        follows_on = self._solver and scheduler.config.timestep_spacing == "linspace"
        if follows_on:
            timesteps = self._solver_timesteps(config.steps)
        if config.kind == "ddim" and not follows_on:
            previous = timesteps - self.schedule.num_timesteps // config.steps
        else:
            previous = torch.cat([timesteps[1:], torch.tensor([-1])])
        eta = config.eta if config.kind == "ddim" else 1.0
        return Sampler(
            self.schedule, timesteps, previous.clamp_min(-1), config.kind, eta, config.guidance_scale
        )

    def _solver_timesteps(self, steps: int) -> Tensor:
        """DPM-Solver's, evenly spaced: of steps + 1 from T - 1 to 0 all but the last, which the picture stands for.

        DDIM's own even spacing is of no use: its steps do not end where the next ones begin.
        """
        spaced = torch.linspace(0, self.schedule.num_timesteps - 1, steps + 1, dtype=torch.float64)
        return spaced.round().flip(0)[:-1].long()
