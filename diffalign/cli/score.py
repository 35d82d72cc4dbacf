"""Score a folder of pictures with one or more rewards.

    diffalign score pictures/ --rewards aesthetic
    diffalign score samples/ --rewards clip,shapes --options clip.checkpoint=bundled:clip
    diffalign score pictures/ --rewards clip --prompts prompts.txt --output scores.jsonl
    diffalign score pictures/ --rewards my_reward.py:sharpness

Prompts come from --prompts (one a picture, in the order of their file names), from metadata.jsonl, or from a
.txt beside each picture. Rewards that look at the picture alone need none.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.rewards import RewardMixture

_CHUNK = 64  # pictures in memory at once


@dataclass(frozen=True)
class Args:
    """Score a folder of pictures with one or more rewards."""

    folder: tyro.conf.Positional[Path]
    """Folder of pictures; subfolders are searched too."""
    rewards: str
    """Reward names, separated by commas; also file.py:function and package.module:function."""
    prompts: Path | None = None
    """One prompt a picture (.txt, .jsonl, .csv, .tsv, .parquet), in the order of the file names."""
    options: tuple[str, ...] = ()
    """Options of the rewards, as NAME.OPTION=VALUE, e.g. clip.checkpoint=bundled:clip."""
    output: Path | None = None
    """Write the scores here as JSON Lines, one picture a line."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the rewards run; auto: the GPU if there is one."""


def run(args: Args) -> None:
    """Score, print a table, and write `--output` once everything is scored."""
    from rich.console import Console

    from diffalign.config import RewardConfig
    from diffalign.rewards import RewardMixture

    pictures = _list_pictures(args.folder)
    names = reward_names(args.rewards)
    options = reward_options(args.options, names)
    _require_writable(args.output)
    specs = [RewardConfig(name=name, options=options[name]) for name in names]
    mixture = RewardMixture(specs, _device(args.device))
    prompts = _prompts(args, pictures, mixture)
    scores = _score_all(mixture, pictures, [prompt or "" for prompt in prompts])
    if args.output is not None:
        columns = {label: values.tolist() for label, values in scores.items()}
        rows: Iterator[dict[str, Any]] = (
            {"file": path.relative_to(args.folder).as_posix(), "prompt": prompts[i]}
            | {label: values[i] for label, values in columns.items()}
            for i, path in enumerate(pictures)
        )
        _write_lines(args.output, rows)
    Console().print(_table(args.folder, pictures, scores))


def _list_pictures(folder: Path) -> list[Path]:
    from diffalign.data.images import SUFFIXES
    from diffalign.errors import DataError

    if not folder.is_dir():
        raise DataError("the folder of pictures does not exist", where=str(folder))
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not found:
        raise DataError(
            "no pictures in this folder", where=str(folder), why=f"looked for {', '.join(sorted(SUFFIXES))}"
        )
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def reward_names(text: str) -> list[str]:
    from diffalign.errors import RewardError
    from diffalign.rewards import available_rewards

    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise RewardError("--rewards names no reward", hint=f"registered: {', '.join(available_rewards())}")
    return names


def reward_options(pairs: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Keyword arguments by reward; values are YAML, so numbers and booleans are what they look like."""
    import yaml

    from diffalign.errors import RewardError

    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for pair in pairs:
        path, equals, value = pair.partition("=")
        name, _, option = path.rpartition(".")
        if not equals or not option or name not in options:
            raise RewardError(
                f"--options does not understand {pair}",
                why=f"the rewards are {', '.join(names)}",
                hint="write NAME.OPTION=VALUE, e.g. clip.checkpoint=bundled:clip",
            )
        try:
            options[name][option] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RewardError(f"--options cannot read the value of {pair}", why=str(error)) from error
    return options


def _prompts(args: Args, pictures: list[Path], mixture: RewardMixture) -> list[str | None]:
    """One prompt a picture, or None for each where no reward needs any and there are none."""
    from diffalign.config import ImagesConfig
    from diffalign.data.images import METADATA, CaptionedImages
    from diffalign.data.prompts import load_prompts
    from diffalign.errors import DataError

    if args.prompts is not None:
        prompts = load_prompts(str(args.prompts))
        if len(prompts) != len(pictures):
            raise DataError(
                f"{len(prompts)} prompts but {len(pictures)} pictures",
                where=f"{args.prompts}, {args.folder}",
                hint="give one prompt a picture, in the order of the file names",
            )
        return list(prompts)
    captioned = (args.folder / METADATA).is_file() or all(p.with_suffix(".txt").is_file() for p in pictures)
    if not captioned and not mixture.needs_prompt:
        return [None] * len(pictures)
    images = CaptionedImages(ImagesConfig(path=str(args.folder)))
    return [images.caption(i) for i in range(len(pictures))]


def _score_all(mixture: RewardMixture, pictures: list[Path], prompts: list[str]) -> dict[str, Tensor]:
    """Scores [number of pictures] by label, on the CPU."""
    import torch
    from rich.progress import Progress

    from diffalign.images import open_image
    from diffalign.rewards import NonFiniteScore

    parts: dict[str, list[Tensor]] = {label: [] for label in mixture.labels}
    with Progress(transient=True) as progress:
        task = progress.add_task("scoring", total=len(pictures))
        for start in range(0, len(pictures), _CHUNK):
            chunk = pictures[start : start + _CHUNK]
            images = [open_image(path, str(path)) for path in chunk]
            try:
                scores = mixture(images, prompts[start : start + _CHUNK])
            except NonFiniteScore as error:
                error.where = f"{chunk[error.index]}, prompt {prompts[start + error.index]!r}"
                raise
            for label, values in scores.components.items():
                parts[label].append(values.cpu())
            progress.advance(task, len(chunk))
    return {label: torch.cat(values) for label, values in parts.items()}


def _table(folder: Path, pictures: list[Path], scores: dict[str, Tensor]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=f"{len(pictures)} pictures in {folder}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("reward", overflow="fold", min_width=min(22, max(map(len, scores))))
    for column in ("mean", "std", "min", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("highest", overflow="fold")
    table.add_column("lowest", overflow="fold")
    for label, values in scores.items():
        spread = values.std(correction=1 if len(values) > 1 else 0)
        numbers = [values.mean(), spread, values.min(), values.max()]
        ends = [
            pictures[int(index)].relative_to(folder).as_posix()
            for index in (values.argmax(), values.argmin())
        ]
        table.add_row(label, *(f"{number.item():.4g}" for number in numbers), *ends)
    return table


def _device(name: str) -> str:
    import torch

    from diffalign.errors import DeviceError

    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "--device cuda was asked for, and PyTorch sees no GPU", hint="use --device auto or cpu"
        )
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _require_writable(output: Path | None) -> None:
    """Said before the scoring, not after it."""
    from diffalign.errors import StorageError

    if output is None:
        return
    if output.is_dir():
        raise StorageError("--output is a folder, not a file", where=str(output))
    if not output.absolute().parent.is_dir() or not os.access(output.absolute().parent, os.W_OK):
        raise StorageError("cannot write --output: its folder is missing or read-only", where=str(output))


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """All lines or no file: written beside `path`, then renamed over it."""
    from diffalign.errors import StorageError

    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.absolute().parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise StorageError("cannot write the scores", where=str(path), why=str(error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
