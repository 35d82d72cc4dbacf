"""Families of rectified flow with a transformer: levels from the checkpoint's scheduler, Euler and the three SDEs."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffalign.config import SamplerConfig
from diffalign.errors import CheckpointError, ConfigError
from diffalign.models.diffusers_denoiser import DiffusersDenoiser
from diffalign.schedule import FlowSchedule
from diffalign.transitions import Sampler


class LatentFlow(DiffusersDenoiser):
    """What the families of rectified flow have in common: see `DiffusersDenoiser`."""

    schedule: FlowSchedule
    network_name: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )
    t5_name: ClassVar[str]
    """Which of the encoders is T5."""
    t5_length: ClassVar[int]
    """Tokens of a prompt that T5 reads."""
    samples_whole_range: ClassVar[bool]
    """Sampling levels are 1 .. 1/N before the shift; otherwise they end at the last level of training."""

    def _set_schedule(self) -> None:
        scheduler = self.pipeline.scheduler
        self._solver = _is_flow_solver(scheduler)
        if not (self._solver or isinstance(scheduler, FlowMatchEulerDiscreteScheduler)):
            raise CheckpointError(
                f"{self.config.path} has the scheduler {type(scheduler).__name__}",
                why="the noise levels of a flow are read from a FlowMatchEulerDiscreteScheduler, or from a "
                "DPMSolverMultistepScheduler with use_flow_sigmas and prediction_type flow_prediction",
                hint="use the scheduler/ folder of the base model",
            )
        for option in ("prediction_type", "zero_terminal_snr"):
            if getattr(self.config, option) is not None:
                raise ConfigError(
                    f"model.{option}: this checkpoint is a rectified flow, which has no such setting",
                    hint=f"leave {option} out",
                )
        self._settings: dict[str, Any] = dict(scheduler.config)
        self.schedule = FlowSchedule(int(self._settings["num_train_timesteps"]), self._shift())

    def _shift(self) -> float:
        """Esser et al. 2024, eq. 23; a dynamic one grows with the number of tokens of a picture."""
        if self._solver:
            return float(self._settings["flow_shift"])
        if not self._settings["use_dynamic_shifting"]:
            return float(self._settings["shift"])
        exponential = self._settings["time_shift_type"] == "exponential"
        return math.exp(self._mu()) if exponential else self._mu()

    def _mu(self) -> float:
        """A line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift)."""
        low, high = self._settings["base_image_seq_len"], self._settings["max_image_seq_len"]
        slope = (self._settings["max_shift"] - self._settings["base_shift"]) / (high - low)
        height, width = (side // self._patch_side() for side in self.latent_shape[1:])
        tokens = height * width
        return float(self._settings["base_shift"] + (tokens - low) * slope)

    def _schedule_settings(self) -> dict[str, object]:
        return self._settings

    def make_sampler(self, config: SamplerConfig) -> Sampler:
        if not config.is_flow:
            raise ConfigError(
                f"sampler.kind: {config.kind} is for variance-preserving diffusion",
                why="this checkpoint is a rectified flow",
                hint="use euler, or with noise flow_sde, cps or dance_sde: sampler.kind and evaluation.sampler.kind "
                "in a run file, --sampler-kind in a command",
            )
        times = self._levels(config.steps) * self.schedule.num_timesteps
        return Sampler(self.schedule, times[:-1], times[1:], config.kind, config.noise, config.guidance_scale)

    def _levels(self, steps: int) -> Tensor:
        """The scheduler's levels s [steps + 1], float32, from the noisiest to 0."""
        if self._solver:
            solver = DPMSolverMultistepScheduler.from_config(self._settings, final_sigmas_type="zero")
            solver.set_timesteps(steps)
            return torch.as_tensor(solver.sigmas)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self._settings)
        sigmas = np.linspace(1.0, 1 / steps, steps) if self.samples_whole_range else None
        mu = self._mu() if self._settings["use_dynamic_shifting"] else None
        scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
        return torch.as_tensor(scheduler.sigmas)

    def _times(self, t: Tensor) -> Tensor:
        """The network's time T s [B], float32, of indices or times t [B].

        Rounded down where the checkpoint's scheduler is DPM-Solver, which tells the network whole times.
        """
        times = (self.schedule.level(t) * self.schedule.num_timesteps).float()
        return times.floor() if self._solver else times

    def _encode_t5(self, texts: list[str]) -> Tensor:
        """Hidden states [B, t5_length, C] in T5's own type: it overflows in float16, so that autocast is left out."""
        tokens = self._tokens(self.t5_name, texts, self.t5_length)
        states: Tensor = self.encoders[self.t5_name](tokens.input_ids)[0]
        return states


def _is_flow_solver(scheduler: object) -> bool:
    """A DPM-Solver over the levels of a flow, which Sana's checkpoints come with."""
    if not isinstance(scheduler, DPMSolverMultistepScheduler):
        return False
    settings = scheduler.config
    flow = settings.use_flow_sigmas and settings.prediction_type == "flow_prediction"
    return bool(flow and not settings.use_dynamic_shifting)
