"""Which options a resumed run may have changed, and what that means for its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import yaml

from diffalign.errors import ConfigError

OPERATION = {
    f"training.{name}"
    for name in (
        "checkpoint_every", "keep_last", "keep_every", "keep_best", "background_checkpoints", "on_full_disk",
        "storage_patience", "skip_bad_updates", "timeout", "preview_every",
    )
} | {
    f"guards.{name}"
    for name in (
        "on_alarm", "window", "patience", "watched_fall", "min_group_std", "min_diversity", "max_kl",
        "max_winner_drift",
    )
} | {"model.offload_text_encoders", "model.offload_vae"}  # fmt: skip
"""How the run is kept and watched: free to change, the numbers stay the same."""

MEMORY = {
    "algorithm.sample_batch_size", "algorithm.train_batch_size", "algorithm.score_in_background",
    "algorithm.checkpoint_steps",
    "evaluation.batch_size", "training.device", "training.gradient_checkpointing", "training.channels_last",
    "training.compile", "model.vae_slicing", "data.cache_latents",
}  # fmt: skip
"""How the same sums are taken: free to change, the numbers agree to rounding."""

BATCH = ("algorithm.batch_size", "algorithm.gradient_accumulation")
"""With the number of processes, the batch of an update: may change where their product does not."""

FIXED = (
    "model.path", "model.lora", "model.adapters", "model.quantization", "model.train_text_encoder",
    "training.optimizer", "algorithm.name", "evaluation.", "seed",
)  # fmt: skip
"""Never: the checkpoint would not fit, or before and after would not be of the same pictures."""


def check_changes(old: str, new: str, *, processes: tuple[int, int], allow: bool) -> list[str]:
    """What to tell the user of a run that is resumed with the YAML `new` after `old`.

    Args:
        processes: how many there were at the last checkpoint, and are now.
        allow: take changes that make it another run, too.

    Raises:
        ConfigError: a change that is not allowed; it is named.
    """
    before, after = dict(_flat(yaml.safe_load(old))), dict(_flat(yaml.safe_load(new)))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    batches = [_batch(values, count) for values, count in zip((before, after), processes, strict=True)]
    free = OPERATION | MEMORY
    if batches[0] == batches[1]:
        free |= set(BATCH[1:] if _has_buckets(before) else BATCH)
    if before.get("training.lr_scheduler") == "constant":
        free.add("training.iterations")
    refused = [name for name in names if name not in free]
    never = [name for name in refused if name.startswith(FIXED)]
    if never or (refused and not allow):
        lines = [
            f"{sign} {name}: {values[name]}"
            for name in (never or refused)
            for sign, values in (("-", before), ("+", after))
            if name in values
        ]
        raise ConfigError(
            "the configuration is not the one that the run was started with",
            why="\n".join(lines[:12]),
            hint="resume with the run's own config.yaml, or start a new run in another folder"
            + ("" if never else ", or take the change with --allow-changes"),
        )
    if batches[0] != batches[1] and not allow:
        raise ConfigError(
            f"{processes[1]} processes would make updates of {batches[1]} samples; so far they were of {batches[0]}",
            why="a batch is algorithm.batch_size x gradient_accumulation x processes",
            hint=f"keep the product: {processes[0]} processes as before, or other algorithm.batch_size or "
            "gradient_accumulation; or take the change with --allow-changes",
        )
    return _notes(names, before, after, processes)


def _notes(
    names: list[str], before: dict[str, Any], after: dict[str, Any], processes: tuple[int, int]
) -> list[str]:
    told = [f"changed: {name} from {before.get(name)} to {after.get(name)}" for name in names]
    if processes[0] != processes[1]:
        told.append(f"changed: {processes[1]} processes instead of {processes[0]}")
    if processes[0] != processes[1] or any(name in MEMORY or name in BATCH for name in names):
        told.append(
            "data order, noise, timesteps and prompts stay the same; sums are taken in another order, so losses and "
            "weights agree with those of the uninterrupted run to rounding and no longer bit for bit"
        )
    return told


def _has_buckets(values: dict[str, Any]) -> bool:
    """Whether a batch is of one size, so that its own length decides which pictures are in it."""
    return any(name.startswith("data.buckets") and value is not None for name, value in values.items())


def _batch(values: dict[str, Any], processes: int) -> int | None:
    """Samples of an update over all processes; None where the number of processes does not change it."""
    sizes = [values[name] for name in BATCH if name in values]
    return math.prod(sizes) * processes if sizes else None


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{index}")
    else:
        yield name, value
