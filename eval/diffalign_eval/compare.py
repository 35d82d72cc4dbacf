"""Compare checkpoints on the same prompts and seeds: pictures, scores, paired statistics, a grid.

A result folder holds `<checkpoint>/00000-s0.png` with a `metadata.jsonl` each (`diffalign score` reads it),
`scores.jsonl` (a line per picture), `comparison.json` (what `Comparison` holds, and how it came about) and
`grid.png`. Pictures are scored as stored, 8 bits a channel, and dropped batch by batch.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from diffalign import __version__
from diffalign.config import RewardConfig, SamplerConfig
from diffalign.errors import CheckpointError, ConfigError, DataError
from diffalign.images import open_image
from diffalign.models.loading import load_for_inference, pick_device
from diffalign.picture_folder import PictureSpec, draw_pictures, plan_pictures
from diffalign.result_folder import result_folder
from diffalign.rewards import NonFiniteScore, RewardMixture
from diffalign_eval.grid import picture_grid
from diffalign_eval.results import RewardResult, summarise

KIND = "diffalign-comparison"
FILES = ("comparison.json", "scores.jsonl", "grid.png")
COLUMNS = ("checkpoint", "prompt_index", "prompt", "seed", "file")
"""Columns of scores.jsonl before those of the rewards."""
GRID_COLUMNS = 8
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow")

Scores = dict[str, dict[str, list[float]]]
"""Reward label -> checkpoint -> one score per picture, in the order of the plan."""
Progress = Callable[[str, int, int], None]
"""Called with checkpoint, pictures done and pictures in all (of this checkpoint)."""


@dataclass(frozen=True)
class Comparison:
    """What was compared and what came out; the first checkpoint is the baseline."""

    checkpoints: dict[str, str]
    """Name -> path."""
    pictures: list[PictureSpec]
    """Prompt and seed of every picture; each checkpoint has made all of them."""
    scores: Scores
    results: tuple[RewardResult, ...]
    """One per reward."""
    output_dir: Path


def compare(
    checkpoints: Mapping[str, str],
    prompts: Sequence[str],
    *,
    seeds_per_prompt: int = 1,
    sampler: SamplerConfig,
    rewards: Sequence[RewardConfig],
    output_dir: Path,
    resolution: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    mixed_precision: str = "no",
    base_seed: int = 0,
    on_progress: Progress | None = None,
) -> Comparison:
    """Sample every prompt from every checkpoint, score, and write the comparison.

    Args:
        checkpoints: name (of its folder and table row) -> path; two or more, the first is the baseline.
        prompts: a prompt that comes twice counts as one in the intervals.
        seeds_per_prompt: pictures per prompt; see `plan_pictures` for their seeds.
        output_dir: new, empty, or an earlier comparison, which is replaced once the new one is complete.
        resolution: picture side in pixels; default: what the checkpoints were trained for.
        on_progress: told after every batch.

    Raises:
        ConfigError: names or labels that clash, or an occupied `output_dir`.
        DataError: no prompts.
        CheckpointError: one of the checkpoints cannot be loaded, or makes pictures of another size.
        RewardError, NumericsError: a reward that cannot be built or gives no finite number.
    """
    _check(checkpoints, prompts, rewards)
    specs = plan_pictures(prompts, seeds_per_prompt, base_seed)
    output_dir = Path(output_dir)
    origin = {
        "sampler": sampler.model_dump(),
        "seeds": {"base": base_seed, "per_prompt": seeds_per_prompt},
        "rewards": [reward.model_dump() for reward in rewards],
        "mixed_precision": mixed_precision,
    }
    with result_folder(output_dir, may_replace=is_comparison) as folder:
        target = str(pick_device(device))
        mixture = RewardMixture(rewards, target)
        _require_comparable(checkpoints, resolution)
        scores: Scores = {label: {name: [] for name in checkpoints} for label in mixture.labels}
        with (folder / "scores.jsonl").open("w", encoding="utf-8") as lines:
            for name, path in checkpoints.items():
                (folder / name).mkdir()
                denoiser = load_for_inference(
                    path, device=target, mixed_precision=mixed_precision, resolution=resolution
                )
                done = 0
                for batch, pictures in draw_pictures(denoiser, specs, sampler, batch_size, folder / name):
                    for label, values in _score(mixture, name, batch, pictures, lines).items():
                        scores[label][name] += values
                    done += len(batch)
                    if on_progress is not None:
                        on_progress(name, done, len(specs))
                del denoiser  # before the next one is loaded
        results = _summarise(mixture, scores, specs)
        comparison = Comparison(dict(checkpoints), specs, scores, results, output_dir)
        _write_summary(folder, comparison, origin | {"device": target})
        _draw_grid(folder, comparison)
    return comparison


def is_comparison(folder: Path) -> bool:
    """Whether a folder holds a comparison of ours and nothing else."""
    try:
        summary = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(summary, dict) or summary.get("kind") != KIND:
        return False
    ours = {*FILES, *(entry["name"] for entry in summary["checkpoints"])}
    return all(entry.name in ours for entry in folder.iterdir())


def _check(checkpoints: Mapping[str, str], prompts: Sequence[str], rewards: Sequence[RewardConfig]) -> None:
    problems = []
    if len(checkpoints) < 2:
        problems.append(f"a comparison needs two checkpoints or more; got {len(checkpoints)}")
    for name in checkpoints:
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name) or name in FILES:
            problems.append(
                f"{name!r} cannot be the name of a checkpoint: it becomes a folder's name "
                "(letters, digits, . _ + -, a letter or digit first)"
            )
    for label in (reward.label or reward.name for reward in rewards):
        if label in COLUMNS:
            problems.append(f"a reward cannot be labelled {label}: scores.jsonl has a column of that name")
    if problems:
        raise ConfigError("the comparison cannot be made", problems=problems)
    if not prompts:
        raise DataError("no prompts to compare on")


def _require_comparable(checkpoints: Mapping[str, str], resolution: int | None) -> None:
    """Load every checkpoint once, before hours go into pictures of the first."""
    sizes = {
        name: load_for_inference(path, device="cpu", resolution=resolution).resolution
        for name, path in checkpoints.items()
    }
    if len(set(sizes.values())) > 1:
        raise CheckpointError(
            "the checkpoints make pictures of different sizes, which rewards do not score alike",
            why=", ".join(f"{name}: {size} pixels" for name, size in sizes.items()),
            hint="give all of them one --resolution, or compare checkpoints of one base model",
        )


def _score(
    mixture: RewardMixture,
    checkpoint: str,
    batch: Sequence[PictureSpec],
    pictures: Sequence[Image.Image],
    lines: TextIO,
) -> dict[str, list[float]]:
    """Scores of one batch by label; also written to scores.jsonl."""
    try:
        components = mixture(pictures, [spec.prompt for spec in batch]).components
    except NonFiniteScore as error:
        spec = batch[error.index]
        error.where = f"checkpoint {checkpoint}, prompt {spec.prompt!r}, seed {spec.seed}"
        raise
    columns = {label: values.tolist() for label, values in components.items()}
    for row, spec in enumerate(batch):
        origin = (checkpoint, spec.prompt_index, spec.prompt, spec.seed, f"{checkpoint}/{spec.file_name}")
        line = dict(zip(COLUMNS, origin, strict=True)) | {label: columns[label][row] for label in columns}
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    return columns


def _summarise(
    mixture: RewardMixture, scores: Scores, specs: Sequence[PictureSpec]
) -> tuple[RewardResult, ...]:
    clusters = [spec.prompt for spec in specs]
    return tuple(
        summarise(label, scores[label], clusters, higher_is_better=mixture.rewards[label].higher_is_better)
        for label in mixture.labels
    )


def _write_summary(folder: Path, comparison: Comparison, origin: Mapping[str, Any]) -> None:
    summary = {
        "kind": KIND,
        "format": 1,
        "checkpoints": [{"name": name, "path": path} for name, path in comparison.checkpoints.items()],
        "prompts": len({spec.prompt for spec in comparison.pictures}),
        "pictures_per_checkpoint": len(comparison.pictures),
        **origin,
        "results": [result.to_json() for result in comparison.results],
        "versions": {"python": platform.python_version(), "diffalign": __version__}
        | {name: version(name) for name in PACKAGES},
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")


def _draw_grid(folder: Path, comparison: Comparison) -> None:
    """The first picture of the first prompts, from every checkpoint, with the first reward."""
    label = comparison.results[0].label
    columns = [i for i, spec in enumerate(comparison.pictures) if spec.number == 0][:GRID_COLUMNS]
    shown = [comparison.pictures[i] for i in columns]
    files = {name: [folder / name / spec.file_name for spec in shown] for name in comparison.checkpoints}
    grid = picture_grid(
        {name: [open_image(file, str(file)) for file in row] for name, row in files.items()},
        [spec.prompt for spec in shown],
        {name: [values[i] for i in columns] for name, values in comparison.scores[label].items()},
        title="Same prompts, same seeds",
        score_name=label,
    )
    grid.save(folder / "grid.png")
