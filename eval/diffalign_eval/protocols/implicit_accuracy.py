"""Implicit accuracy: how often a policy, as the reward model that it is, agrees with human preferences.

A diffusion policy and its reference imply a reward (Wallace et al. 2023, arXiv:2311.12908): the denoising error
that the policy saves. On a pair of pictures it agrees where it saves more on the preferred one, at the same
timestep and with the same noise. Ten timesteps (or --timesteps) are fixed, spread evenly; noise is a function of
pair and timestep. A training run's validation/accuracy is this number, on its held-out pairs and with its
validation_timesteps.

examples:
  python -m diffalign_eval.protocols.implicit_accuracy --pairs bundled:pairs.parquet --policy runs/dpo \
      --reference bundled:tiny-sd --held-out 0.1
  python -m diffalign_eval.protocols.implicit_accuracy --pairs "pickapic/validation_unique-*.parquet" \
      --policy mhdang/dpo-sd1.5-text2image-v1 --reference runwayml/stable-diffusion-v1-5
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from diffalign.cli.sampling_args import optional, picture_size

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.data.preferences import PairSet
    from diffalign.models.base import Denoiser
    from diffalign_eval.statistics import Interval


@dataclass(frozen=True, kw_only=True)
class Args:
    pairs: str
    """Preference pairs as Diffusion-DPO reads them: .parquet (or a pattern), .jsonl, or bundled:..."""
    policy: str
    """The trained checkpoint: a run folder or its final/, a diffusers folder, a hub id, or a .safetensors file."""
    reference: str
    """The checkpoint that training started from."""
    held_out: Annotated[float | None, optional("FLOAT")] = None
    """Only the pairs that a run with this data.validation_fraction held out of the same file. Default: all pairs."""
    label_column: Annotated[str | None, optional("NAME")] = None
    """Column of the labels, as the run's data.label_column. Default: label_0."""
    timesteps: int = 10
    """Timesteps of every pair, at the middles of as many equal parts of the schedule."""
    seed: int = 0
    """Of the noise."""
    limit: Annotated[int | None, optional("INT")] = None
    """The first n pairs only."""
    batch_size: int = 8
    """Pairs per forward pass."""
    resolution: Annotated[str | None, optional("INT|HEIGHTxWIDTH")] = None
    """Picture side in pixels, or height and width, as 512x768. Default: what the checkpoints were trained for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Compute type of the denoisers."""
    output: Annotated[Path | None, optional("FILE.json")] = None
    """Write the numbers here too."""


@dataclass(frozen=True)
class ImplicitAccuracy:
    """Ties count half everywhere; intervals are over prompts."""

    accuracy: Interval
    """Share of (pair, timestep) on which the policy agrees with the label."""
    pair_accuracy: Interval
    """Share of pairs on which it agrees when a pair's margins are averaged over the timesteps first."""
    margin: Interval
    """Mean of (reference - policy error on the preferred) - (the same on the other); errors are means over latents."""
    by_timestep: dict[int, float]
    """Timestep -> share of pairs."""

    def to_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name).to_json() for name in ("accuracy", "pair_accuracy", "margin")}
        return own | {"by_timestep": {str(t): share for t, share in self.by_timestep.items()}}


def run(args: Args) -> None:
    """Print the accuracy, and write it to `output`.

    Raises:
        ConfigError: numbers out of range.
        DataError: unreadable pairs, or none held out.
        CheckpointError: a checkpoint that cannot be loaded, or two that do not go together.
    """
    _check(args)
    resolution = picture_size(args.resolution)

    from rich.console import Console
    from rich.progress import Progress

    from diffalign.models.loading import load_for_inference
    from diffalign.scoring.output import require_output, write_text

    if args.output is not None:
        require_output(args.output, "--output", (".json",))
    pairs = _pairs(args)
    count = len(pairs) if args.limit is None else min(args.limit, len(pairs))
    policy, reference = (
        load_for_inference(
            path,
            device=args.device,
            mixed_precision=args.mixed_precision,
            resolution=resolution,
        )
        for path in (args.policy, args.reference)
    )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("pairs", total=count)
        result = implicit_accuracy(
            policy,
            reference,
            pairs,
            range(count),
            timesteps=args.timesteps,
            seed=args.seed,
            batch_size=args.batch_size,
            on_progress=lambda done: progress.update(task, completed=done),
        )
    print(f"{args.policy} against {args.reference}: {count:,} pairs, {args.timesteps} timesteps")
    for name, share in (("per timestep", result.accuracy), ("per pair", result.pair_accuracy)):
        print(f"implicit accuracy, {name:<12} {share.mean:.1%}  [{share.low:.1%}, {share.high:.1%}]")
    print("by timestep: " + ", ".join(f"{t}: {share:.1%}" for t, share in result.by_timestep.items()))
    if args.output is not None:
        write_text(args.output, json.dumps(result.to_json(), indent=2, allow_nan=False))


def implicit_accuracy(
    policy: Denoiser,
    reference: Denoiser,
    pairs: PairSet,
    indices: Sequence[int] | None = None,
    *,
    timesteps: int = 10,
    seed: int = 0,
    batch_size: int = 8,
    on_progress: Callable[[int], None] = lambda done: None,
) -> ImplicitAccuracy:
    """How often `policy` improves on `reference` more for the preferred picture than for the other.

    Args:
        pairs: pictures are encoded by the reference's autoencoder.
        indices: some of the pairs; default: all.
        timesteps: K; t_k = (k + 1/2) T / K.
        seed: noise is a function of (seed, pair, k).
        batch_size: pairs per forward pass.
        on_progress: told how many pairs are done.

    Raises:
        CheckpointError: the two differ in schedule, prediction type, resolution or latents.
        DataError: a picture that cannot be read.
    """
    import torch

    from diffalign_eval.statistics import mean_interval, share_interval

    _require_alike(policy, reference)
    chosen = list(range(len(pairs)) if indices is None else indices)
    total = reference.schedule.num_timesteps
    steps = [int((k + 0.5) * total / timesteps) for k in range(timesteps)]
    parts = []
    for start in range(0, len(chosen), batch_size):
        parts.append(_margins(policy, reference, pairs, chosen[start : start + batch_size], steps, seed))
        on_progress(min(start + batch_size, len(chosen)))
    margins = torch.cat(parts).double()  # [N, K]
    agrees = _agrees(margins)
    prompts = [pairs.prompt(i) for i in chosen]
    each = [prompt for prompt in prompts for _ in steps]
    return ImplicitAccuracy(
        accuracy=share_interval(agrees.flatten().numpy(), each),
        pair_accuracy=share_interval(_agrees(margins.mean(dim=1)).numpy(), prompts),
        margin=mean_interval(margins.flatten().numpy(), each),
        by_timestep=dict(zip(steps, agrees.mean(dim=0).tolist(), strict=True)),
    )


def _agrees(margins: Tensor) -> Tensor:
    """1 where positive, 1/2 where exactly 0, else 0."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()


def _margins(
    policy: Denoiser,
    reference: Denoiser,
    pairs: PairSet,
    indices: Sequence[int],
    steps: Sequence[int],
    seed: int,
) -> Tensor:
    """(ref_w - err_w) - (ref_l - err_l), float32 [len(indices), K] on the CPU."""
    import torch

    from diffalign.algorithms.base import Context
    from diffalign.algorithms.preference import LatentPairs
    from diffalign.seeding import sample_noise

    with torch.no_grad():
        latents = LatentPairs(pairs, reference, Context(say=_warn), cached=False)
        x0 = torch.cat(latents.latents(list(indices)))
        prompts = [pairs.prompt(i) for i in indices] * 2
        columns = []
        for k, step in enumerate(steps):
            noise = sample_noise(x0.shape[1:], indices, "validation", seed, k).repeat(2, 1, 1, 1)
            t = torch.full((len(x0),), step)
            saved = _errors(reference, x0, noise, t, prompts) - _errors(policy, x0, noise, t, prompts)
            preferred, other = saved.chunk(2)
            columns.append((preferred - other).cpu())
    return torch.stack(columns, dim=1)


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def _errors(denoiser: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
    """Squared errors [B] of the prediction, averaged over latent elements."""
    from diffalign.losses.denoising import squared_error

    x0, noise, t = (tensor.to(denoiser.device) for tensor in (x0, noise, t))
    noisy = denoiser.schedule.add_noise(x0, noise, t)
    prediction = denoiser.predict(noisy, t, denoiser.encode_prompts(prompts))
    return squared_error(prediction, denoiser.schedule.target(x0, noise, t))


def _require_alike(policy: Denoiser, reference: Denoiser) -> None:
    from diffalign.config.sizes import in_words
    from diffalign.errors import CheckpointError

    first, second = policy.schedule, reference.schedule
    if not first.same_levels(second):
        difference = "their noise schedules"
    elif first.prediction_type != second.prediction_type:
        difference = f"what they predict: {first.prediction_type} and {second.prediction_type}"
    elif policy.size != reference.size or policy.latent_shape != reference.latent_shape:
        difference = (
            f"the size of their pictures: {in_words(policy.size)} and {in_words(reference.size)} pixels"
        )
    else:
        return
    raise CheckpointError(
        "policy and reference do not go together",
        why=f"they differ in {difference}",
        hint="the reference is the checkpoint that the policy was trained from",
    )


def _check(args: Args) -> None:
    from diffalign.errors import ConfigError

    least = {"--timesteps": args.timesteps, "--batch-size": args.batch_size, "--limit": args.limit}
    problems = [
        f"{name} must be at least 1; got {number}"
        for name, number in least.items()
        if number is not None and number < 1
    ]
    if args.held_out is not None and not 0 < args.held_out < 1:
        problems.append(f"--held-out must lie between 0 and 1; got {args.held_out:g}")
    if problems:
        raise ConfigError("implicit accuracy", problems=problems)


def _pairs(args: Args) -> PairSet:
    from diffalign.config import PairsConfig
    from diffalign.config.data import LABEL_COLUMN
    from diffalign.data.preferences import PreferencePairs
    from diffalign.errors import DataError

    config = PairsConfig(
        path=args.pairs,
        validation_fraction=args.held_out or 0.0,
        label_column=args.label_column or LABEL_COLUMN,
    )
    pairs = PreferencePairs(config, "drop")
    chosen = pairs.train if args.held_out is None else pairs.validation
    if not len(chosen):
        raise DataError("no pairs are held out", where=args.pairs, hint="raise --held-out, or leave it away")
    return chosen


if __name__ == "__main__":
    from diffalign.cli import run_module

    sys.exit(run_module("diffalign_eval.protocols.implicit_accuracy", sys.argv[1:]))
