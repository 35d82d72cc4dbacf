"""Options that every command which samples pictures shares, and where their defaults come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from diffalign.errors import ConfigError
from diffalign.layout import FINAL, run_of, run_of_step

if TYPE_CHECKING:
    from diffalign.config import Run, SamplerConfig
    from diffalign.config.sizes import Resolution

BUNDLED_WORLD = {"bundled:tiny-sd": "tiny/ddpo"}
"""Bundled checkpoint -> the shipped run that says how it is meant to be sampled."""


def optional(metavar: str) -> Any:
    """How an option whose docstring states its default is shown in --help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class SamplingArgs:
    seeds_per_prompt: int = 1
    """Pictures per prompt."""
    seed: int = 0
    """Seed of the first picture; the others count up from it."""
    steps: Annotated[int | None, optional("INT")] = None
    """Denoising steps per picture. Default: as a run in the command was evaluated, else 50."""
    sampler_kind: Annotated[
        Literal["ddim", "ddpm", "euler", "flow_sde", "cps", "dance_sde"] | None, optional("NAME")
    ] = None
    """Transition kernel: ddim or ddpm for diffusion; euler, flow_sde, cps or dance_sde for flow models (SD 3, FLUX).
    Default: as the run's, else what adds no noise: ddim, or euler for a flow model."""
    eta: Annotated[float | None, optional("FLOAT")] = None
    """DDIM noise scale: 0 is deterministic, 1 as noisy as DDPM. Default: as the run's, else 0."""
    guidance_scale: Annotated[float | None, optional("FLOAT")] = None
    """Classifier-free guidance weight; 1 turns guidance off. Default: as the run's, else 7.5."""
    resolution: Annotated[str | None, optional("INT|HEIGHTxWIDTH")] = None
    """Picture side in pixels, or height and width, as 512x768. Default: what the checkpoint was trained for."""
    batch_size: int = 8
    """Pictures per denoiser call: more memory, more speed, the same pictures."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Compute type of the denoiser."""
    limit: Annotated[int | None, optional("INT")] = None
    """The first n prompts only."""

    def sampler(self, run: Run | None, checkpoint: str) -> SamplerConfig:
        """What the options say, over how `run` was evaluated, over what suits the checkpoint.

        Raises:
            ConfigError: values out of range, all of them at once.
        """
        from pydantic import ValidationError

        from diffalign.config import EvaluationConfig, SamplerConfig

        least = {"seeds_per_prompt": 1, "seed": 0, "batch_size": 1, "limit": 1}
        numbers = {name: getattr(self, name) for name in least}
        problems = [
            f"{_option(name)} must be at least {least[name]}; got {number}"
            for name, number in numbers.items()
            if number is not None and number < least[name]
        ]
        try:
            picture_size(self.resolution)
        except ConfigError as error:
            problems.append(error.what)
        evaluation = EvaluationConfig() if run is None else run.evaluation
        given = {"steps": self.steps, "eta": self.eta, "guidance_scale": self.guidance_scale}
        options = evaluation.sampler.model_dump()
        kind = self.sampler_kind
        is_told = bool(problems or evaluation.sets or evaluation.sampler.is_flow)
        if kind is None and not is_told and _is_flow(checkpoint):
            kind = "euler"
        if kind not in (None, evaluation.sampler.kind):
            options |= {"kind": kind, "noise_level": None}
            options["eta"] = 0.0 if kind == "ddim" else 1.0  # what leaving it out means
        options |= {name: value for name, value in given.items() if value is not None}
        try:
            sampler = SamplerConfig(**options)
        except ValidationError as error:
            problems += [_problem(detail["loc"], detail["msg"], detail["input"]) for detail in error.errors()]
        if problems:
            raise ConfigError("sampling options are wrong", problems=problems)
        return sampler


def picture_size(resolution: str | None) -> Resolution | None:
    """What --resolution says. Raises ConfigError for what is neither a side nor HEIGHTxWIDTH."""
    from diffalign.config.sizes import parse_resolution

    try:
        return None if resolution is None else parse_resolution(resolution)
    except ValueError as error:
        raise ConfigError(
            f"--resolution must be a side in pixels, or HEIGHTxWIDTH, of at least 1; got {resolution}"
        ) from error


def run_behind(checkpoints: Sequence[str]) -> Run | None:
    """The configuration of the first run among the checkpoints, and what they are guided away from, else of the bundled
    world, else None.

    Raises:
        ConfigError: a run folder's config.yaml is damaged.
        DataError: a bundled: path that there is not.
    """
    from diffalign.assets import list_configs, resolve
    from diffalign.cli.alignment_args import split_negative
    from diffalign.config_file import load_config

    paths = [path for checkpoint in checkpoints for path in split_negative(checkpoint) if path is not None]
    for path in paths:
        place = resolve(path)
        run = run_of_step(place) or run_of(place)
        if (run / "config.yaml").is_file() and (run != place or (run / FINAL).is_dir()):
            return load_config(run / "config.yaml")
    shipped = [BUNDLED_WORLD[path] for path in paths if BUNDLED_WORLD.get(path) in list_configs()]
    return load_config(shipped[0]) if shipped else None


def _is_flow(checkpoint: str) -> bool:
    """Whether a checkpoint is of a flow model, as far as its index says it; what is wrong with it, loading says."""
    from diffalign.cli.alignment_args import split_negative
    from diffalign.models.latent_flow import LatentFlow
    from diffalign.models.loading import family_at

    family = family_at(split_negative(checkpoint)[0])
    return family is not None and issubclass(family, LatentFlow)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _problem(location: tuple[int | str, ...], message: str, value: object) -> str:
    """One pydantic error as a line about the command's option; a conflict of options has no location."""
    text = message.removeprefix("Value error, ").removeprefix("Input ")
    return f"{_option(str(location[-1]))} {text}; got {value}" if location else text
