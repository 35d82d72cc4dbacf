"""Compare checkpoints: same prompts, same seeds, intervals.

Draws every prompt with every checkpoint and shows, per reward, each mean, the paired difference from the
first checkpoint and the win rate against it (a tie is half a win), with 95 % bootstrap intervals over
prompts. The output folder
gets the pictures, scores.jsonl, comparison.json and grid.png.

What is not given is taken from the first run among the checkpoints: its rewards, its first evaluation set,
and how that was sampled.

examples:
  diffalign compare bundled:tiny-sd runs/ddpo
  diffalign compare base=bundled:tiny-sd sft=runs/sft ddpo=runs/ddpo --seeds-per-prompt 4
  diffalign compare sd15.safetensors runs/mine --prompts prompts.txt --rewards aesthetic,jpeg_compressibility
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diffalign.cli.sampling_args import SamplingArgs, optional, run_behind

if TYPE_CHECKING:
    from rich.progress import TaskID

    from diffalign.config import AnyRun, RewardConfig


@dataclass(frozen=True)
class Args:
    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional, optional("[NAME=]PATH ...")]
    """Two or more, the first is the baseline: run folders, diffusers folders, hub ids, .safetensors files,
    or bundled:tiny-sd."""
    prompts: Annotated[str | None, optional("FILE")] = None
    """Prompt file: .txt (one a line), .jsonl, .csv, .tsv, .parquet, or bundled:... Default: the run's."""
    rewards: Annotated[str | None, optional("NAMES")] = None
    """Reward names, separated by commas; also file.py:function and module:function. Default: the run's."""
    options: Annotated[tuple[str, ...], optional("[NAME.OPTION=VALUE ...]")] = ()
    """Options of --rewards, e.g. clip.checkpoint=bundled:clip."""
    output_dir: Path = Path("runs/compare")
    """Folder of the results; an earlier comparison in it is replaced."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingArgs] = field(default_factory=SamplingArgs)


def run(args: Args) -> None:
    """Compare, and print the table."""
    checkpoints = named_checkpoints(args.checkpoints)
    known = run_behind(list(checkpoints.values()))
    sampler = args.sampling.sampler(known)
    _require_prompts_and_rewards(args, known)

    from rich.console import Console

    from diffalign_eval.compare import compare
    from diffalign_eval.table import comparison_table

    prompts = _prompts(args, known)
    with _progress_bars() as on_progress:
        comparison = compare(
            checkpoints,
            prompts,
            seeds_per_prompt=args.sampling.seeds_per_prompt,
            sampler=sampler,
            rewards=_rewards(args, known),
            output_dir=args.output_dir,
            resolution=args.sampling.resolution,
            batch_size=args.sampling.batch_size,
            device=args.sampling.device,
            mixed_precision=args.sampling.mixed_precision,
            base_seed=args.sampling.seed,
            on_progress=on_progress,
        )
    title = (
        f"{len(comparison.pictures)} pictures of {len(prompts)} prompts from each checkpoint\n"
        f"{sampler.kind}, {sampler.steps} steps, eta {sampler.eta:g}, guidance {sampler.guidance_scale:g}"
    )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(comparison_table(comparison.results, title))
    console.print(f"pictures, scores.jsonl, comparison.json and grid.png: {args.output_dir}", soft_wrap=True)


def named_checkpoints(entries: Sequence[str]) -> dict[str, str]:
    """Name -> path of `name=path` and bare paths; a bare path is named after its last telling part.

    Raises:
        ConfigError: two of the same name, or fewer than two.
    """
    from diffalign.errors import ConfigError

    pairs = [_name_and_path(entry) for entry in entries]
    problems = []
    if len(pairs) < 2:
        problems.append(f"compare needs two checkpoints or more; got {len(pairs)}")
    names = [name for name, _ in pairs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        paths = ", ".join(path for other, path in pairs if other == name)
        problems.append(f"two checkpoints are named {name}: {paths}")
    if problems:
        raise ConfigError(
            "the checkpoints to compare",
            problems=problems,
            hint="give each its own name: compare a=PATH b=PATH",
        )
    return dict(pairs)


def _require_prompts_and_rewards(args: Args, known: AnyRun | None) -> None:
    from diffalign.errors import ConfigError

    problems = []
    if args.prompts is None and (known is None or not known.evaluation.sets):
        problems.append("--prompts is missing, and none of the checkpoints is a run with an evaluation set")
    if args.rewards is None and (known is None or not known.rewards):
        problems.append("--rewards is missing, and none of the checkpoints is a run with rewards")
    if args.rewards is None and args.options:
        problems.append("--options belongs to --rewards, which is missing")
    if problems:
        raise ConfigError(
            "compare needs prompts and rewards",
            problems=problems,
            hint="e.g. --prompts bundled:prompts/shapes_eval.txt --rewards shapes",
        )


def _prompts(args: Args, known: AnyRun | None) -> list[str]:
    """Those of --prompts, or the first evaluation set of the run, as many as the run took."""
    from diffalign.data.prompts import load_prompts

    if args.prompts is not None:
        return load_prompts(args.prompts, args.sampling.limit)
    assert known is not None
    file = next(iter(known.evaluation.sets.values()))
    return load_prompts(file, args.sampling.limit or known.evaluation.prompts_per_set)


def _rewards(args: Args, known: AnyRun | None) -> list[RewardConfig]:
    from diffalign.cli.score import reward_names, reward_options
    from diffalign.config import RewardConfig

    if args.rewards is None:
        assert known is not None
        return known.rewards
    names = reward_names(args.rewards)
    options = reward_options(args.options, names)
    return [RewardConfig(name=name, options=options[name]) for name in names]


@contextmanager
def _progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per checkpoint on stderr, and the function that moves them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def advance(checkpoint: str, done: int, total: int) -> None:
            if checkpoint not in bars:
                bars[checkpoint] = progress.add_task(checkpoint, total=total)
            progress.update(bars[checkpoint], completed=done)

        yield advance


def _name_and_path(entry: str) -> tuple[str, str]:
    name, equals, path = entry.partition("=")
    if equals and path and re.fullmatch(r"[\w.+-]+", name) and not Path(entry).exists():
        return name, path
    parts = [part for part in re.split(r"[/\\:]", entry) if part not in ("", ".", "..", "~")]
    if len(parts) > 1 and parts[-1] == "final":
        parts.pop()
    last = parts[-1].removesuffix(".safetensors") if parts else entry
    return re.sub(r"[^\w.+-]+", "-", last), entry
