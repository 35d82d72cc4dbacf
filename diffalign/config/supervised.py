"""Supervised fine-tuning, on given pictures or on the policy's own, weighted by reward or not."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from diffalign.config.base import Fraction, Options, raise_all
from diffalign.config.data import ImagesConfig, PicturesConfig, PromptsConfig, bucket_conflicts
from diffalign.config.model import SamplerConfig
from diffalign.config.online import OnlineRun
from diffalign.config.run import AlgorithmConfig, Run


class DenoisingConfig(AlgorithmConfig):
    """The denoising loss: what is drawn for a picture, and how its error counts."""

    batch_size: PositiveInt = 4
    """Pictures per denoiser call and process."""
    gradient_accumulation: PositiveInt = 1
    """Batches per optimizer step; the effective batch is batch_size x gradient_accumulation x processes."""
    weighting: Literal["none", "min_snr", "debiased", "p2"] = "none"
    """How noise levels count: all alike, Min-SNR (Hang et al. 2023, arXiv:2303.09556), debiased (Yu et al. 2023,
    arXiv:2310.08442), or P2 (Choi et al. 2022, arXiv:2204.00227)."""
    min_snr_gamma: PositiveFloat | None = None
    """weighting = min_snr: the SNR above which low noise counts no more. Default: 5, the paper's."""
    p2_gamma: PositiveFloat | None = None
    """weighting = p2: how steeply low noise is weighed down. Default: 1."""
    p2_k: PositiveFloat | None = None
    """weighting = p2: the SNR from which on it is. Default: 1."""
    huber_delta: PositiveFloat | None = None
    """Pseudo-Huber loss: errors well above this pull linearly, so that wrong captions and rotten pictures do less harm
    (about 0.1). Default: squared error."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """With huber_delta: the same at every noise level, or from 1 at the picture down to huber_delta at the noise
    (arXiv:2403.16728)."""
    timestep_density: Literal["uniform", "logit_normal", "mode", "cosmap"] = "uniform"
    """How often each timestep is trained on (Stable Diffusion 3, arXiv:2403.03206, section 3.1); for a flow model,
    before its own shift."""
    logit_mean: float = 0.0
    """timestep_density = logit_normal: above 0 more noise, below 0 less."""
    logit_std: PositiveFloat = 1.0
    """timestep_density = logit_normal: the smaller, the more it keeps to the middle."""
    mode_scale: Annotated[float, Field(ge=-1.0, le=1.75)] = 1.29
    """timestep_density = mode: above 0 more of the middle, below 0 more of the ends."""
    timestep_shift: PositiveFloat = 1.0
    """Moves the density towards noise: multiplies the odds t / (1 - t). 1: as it is."""
    noise_offset: NonNegativeFloat = 0.0
    """Std of a per-channel constant added to the noise (about 0.05 helps very dark or bright pictures)."""
    input_perturbation: NonNegativeFloat = 0.0
    """Std of further noise that the network sees but is not asked for, in units of the noise (Ning et al. 2023,
    arXiv:2301.11706, usually 0.1): errors add up less in sampling."""
    caption_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of captions replaced by the empty prompt, which keeps classifier-free guidance alive."""

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        return raise_all(self, self._problems())

    def _problems(self) -> list[str]:
        problems = self._unused("weighting", "min_snr", ["min_snr_gamma"])
        problems += self._unused("weighting", "p2", ["p2_gamma", "p2_k"])
        problems += self._unused("timestep_density", "logit_normal", ["logit_mean", "logit_std"])
        problems += self._unused("timestep_density", "mode", ["mode_scale"])
        if self.huber_schedule != "constant":
            if self.huber_delta is None:
                problems.append("huber_schedule: needs huber_delta, where the schedule ends")
            elif self.huber_delta >= 1:
                problems.append(
                    f"huber_delta: below 1 with a schedule, which starts at 1; got {self.huber_delta:g}"
                )
        return problems

    def _unused(self, option: str, value: str, others: list[str]) -> list[str]:
        """A problem for each of `others` that was changed, though `option` is not `value`."""
        if getattr(self, option) == value:
            return []
        changed = [name for name in others if getattr(self, name) != type(self).model_fields[name].default]
        return [f"{name}: belongs to {option}: {value}; set that too, or leave this out" for name in changed]


class PriorConfig(Options):
    path: Annotated[str, Field(min_length=1)] | None = None
    """The second captioned set, as `data.path`. Default: none, no prior preservation."""
    weight: PositiveFloat = 1.0
    """What the prior's loss is multiplied by."""
    image_column: str | None = None
    """As in `data`."""
    caption_column: str | None = None
    """As in `data`."""
    cache_latents: bool = True
    """As in `data`."""

    @model_validator(mode="after")
    def _has_a_path(self) -> Self:
        changed = [
            name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default
        ]
        problems = (
            [f"{name}: needs a path in the same section" for name in changed] if self.path is None else []
        )
        return raise_all(self, problems)

    @property
    def images(self) -> PicturesConfig | None:
        """What the set is opened by."""
        if self.path is None:
            return None
        return PicturesConfig(
            path=self.path,
            image_column=self.image_column,
            caption_column=self.caption_column,
            cache_latents=self.cache_latents,
        )


class SFTConfig(DenoisingConfig):
    name: Literal["sft"] = "sft"
    prior: PriorConfig = PriorConfig()
    """Prior preservation (DreamBooth, arXiv:2208.12242): a second captioned set, as many pictures of it in every
    batch, so that what the model knew is not forgotten."""


class SFTRun(Run):
    implementation = "diffalign.algorithms.sft"
    algorithm: SFTConfig
    data: ImagesConfig

    def _conflicts(self) -> list[str]:
        problems = super()._conflicts() + bucket_conflicts(self.data.buckets, self.model.resolution)
        if self.data.buckets is not None and self.algorithm.prior.path is not None:
            problems.append(
                "data.buckets: a batch has one size, and algorithm.prior adds pictures of other shapes; leave one out"
            )
        return problems

    def samples_per_iteration(self, processes: int) -> int:
        sets = 1 if self.algorithm.prior.path is None else 2
        return sets * self.algorithm.batch_size * self.algorithm.gradient_accumulation * processes


class SelfTrainingConfig(DenoisingConfig):
    """Supervised updates on pictures that the policy drew itself."""

    prompts_per_iteration: PositiveInt = 32
    """Prompts sampled per iteration, over all processes."""
    group_size: PositiveInt = 8
    """Pictures per prompt."""
    sample_batch_size: PositiveInt = 8
    """Pictures per denoiser call while sampling (and per call of the rewards)."""
    updates_per_iteration: PositiveInt = 8
    """Optimizer steps per iteration; batches walk through the kept pictures, and start anew when all were seen."""


class RAFTConfig(SelfTrainingConfig):
    name: Literal["raft"] = "raft"
    keep: PositiveInt = 1
    """Pictures kept per prompt: those of the highest reward."""

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.group_size < 2:
            problems.append("group_size: the best of one is the one; set it to 2 or more")
        elif self.keep >= self.group_size:
            problems.append(
                f"keep: {self.keep} of {self.group_size} pictures per prompt leaves out none of them"
            )
        return problems


class RAFTRun(OnlineRun):
    implementation = "diffalign.algorithms.raft"
    algorithm: RAFTConfig

    def samples_per_iteration(self, processes: int) -> int:
        return self.algorithm.prompts_per_iteration * self.algorithm.group_size


class RWRConfig(SelfTrainingConfig):
    name: Literal["rwr"] = "rwr"
    source: Literal["samples", "data"] = "samples"
    """Pictures to weigh: the policy's own, sampled anew every iteration for the prompts of data.path; or given ones,
    the captioned pictures of data.path, scored once at the start."""
    weights: Literal["exponential", "top"] = "exponential"
    """exp(reward / temperature), scaled to a mean of 1; or the pictures of the highest reward alone, all alike (DDPO
    paper, section 4.2: RWR and RWR-sparse)."""
    temperature: PositiveFloat = 1.0
    """weights = exponential: reward difference that makes a picture count e times as much."""
    top_share: Fraction = 0.1
    """weights = top: share of the pictures that is kept."""
    compare: Literal["all", "prompt"] = "all"
    """Compare a reward with those of all pictures, or of the same prompt: weights have mean 1, or the top is taken,
    among these."""

    def _problems(self) -> list[str]:
        problems = super()._problems() + self._unused("weights", "exponential", ["temperature"])
        problems += self._unused("weights", "top", ["top_share"])
        problems += self._unused("source", "samples", ["prompts_per_iteration", "group_size"])
        if self.weights == "top" and self.top_share == 1:
            problems.append("top_share: the top 1 is all pictures; set it below 1")
        return problems


class RWRDataConfig(PicturesConfig, PromptsConfig):
    path: Annotated[str, Field(min_length=1)]
    """source = samples: a prompt file, as for online RL. source = data: captioned pictures, as for SFT."""


class RWRRun(OnlineRun):
    implementation = "diffalign.algorithms.reward_weighted"
    algorithm: RWRConfig
    data: RWRDataConfig

    def _conflicts(self) -> list[str]:
        problems = super()._conflicts()
        if self.algorithm.source == "data":
            if self.sampler != SamplerConfig():
                problems.append("sampler: belongs to algorithm.source: samples; with data nothing is sampled")
            return problems
        defaults = {name: RWRDataConfig.model_fields[name].default for name in RWRDataConfig.model_fields}
        return problems + [
            f"data.{name}: belongs to algorithm.source: data; samples have no file"
            for name in ("image_column", "caption_column", "cache_latents")
            if getattr(self.data, name) != defaults[name]
        ]

    def samples_per_iteration(self, processes: int) -> int:
        config = self.algorithm
        if config.source == "samples":
            return config.prompts_per_iteration * config.group_size
        return config.batch_size * config.gradient_accumulation * config.updates_per_iteration * processes
