"""Same-seed win rate: how often the second model's picture scores higher than the first's (Wallace et al. 2023).

BEFORE and AFTER are two folders of pictures as `diffalign sample` writes them, or two checkpoints, which then draw the
prompts of --prompts into --output-dir (as `diffalign compare` does). Pictures of one prompt and seed are a pair. The
papers score with PickScore or HPS v2, one picture a prompt, and compare with the model that training started from.

examples:
  python -m diffalign_eval.protocols.win_rate pictures/base pictures/dpo --rewards pickscore,hpsv2
  python -m diffalign_eval.protocols.win_rate runwayml/stable-diffusion-v1-5 runs/dpo --rewards pickscore \
      --prompts parti --guidance-scale 7.5 --steps 50
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from diffalign.cli.sampling_args import SamplingArgs, optional, picture_size, run_behind

if TYPE_CHECKING:
    from diffalign.config import RewardConfig
    from diffalign.scoring.sources import PictureSource
    from diffalign_eval.statistics import Interval, WinRate

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Args:
    before: Annotated[str, tyro.conf.Positional]
    """A folder of pictures, or a checkpoint: what training started from."""
    after: Annotated[str, tyro.conf.Positional]
    """A folder of pictures, or a checkpoint: what training made of it."""
    rewards: str = "pickscore"
    """Reward names, separated by commas."""
    options: Annotated[tuple[str, ...], optional("[NAME.OPTION=VALUE ...]")] = ()
    """Options of the rewards, e.g. clip.checkpoint=bundled:clip."""
    ties: Literal["half", "drop", "loss"] = "half"
    """What equal scores count as: half a win, nothing at all, or a loss (as in code that asks for after > before)."""
    prompts: Annotated[str | None, optional("SPEC")] = None
    """Checkpoints only: a published prompt set (parti, hpdv2, pickapic-test, ...), NAME=FILE or a prompt file."""
    output_dir: Path = Path("runs/win-rate")
    """Checkpoints only: pictures and scores, which a second run uses again."""
    output: Annotated[Path | None, optional("FILE.json")] = None
    """Write the numbers here too."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingArgs] = field(default_factory=SamplingArgs)


@dataclass(frozen=True)
class RewardWins:
    """One reward on pairs of one prompt and seed; intervals are over prompts."""

    reward: str
    win_rate: WinRate
    """Of the second model; a win is a better score, which is a lower one where the reward's higher is not better."""
    difference: Interval
    """Mean of after - before."""
    median_before: float
    median_after: float
    pairs: int
    prompts: int

    def to_json(self) -> dict[str, Any]:
        own = dict(vars(self))
        return own | {"win_rate": self.win_rate.to_json(), "difference": self.difference.to_json()}


@dataclass(frozen=True)
class Scored:
    """Both models' scores of the same pictures."""

    prompts: list[str]
    """[n], of each pair."""
    before: dict[str, list[float]]
    """Reward -> [n]."""
    after: dict[str, list[float]]
    higher_is_better: dict[str, bool]


def run(args: Args) -> None:
    """Print a line a reward, and write the numbers to `output`.

    Raises:
        ConfigError: a folder and a checkpoint, or checkpoints without --prompts.
        DataError: pictures that do not pair up, or cannot be read.
        CheckpointError, RewardError, NumericsError: as sampling and scoring give them.
    """
    from rich.console import Console
    from rich.table import Table

    from diffalign.scoring.output import require_output, write_text

    if args.output is not None:
        require_output(args.output, "--output", (".json",))
    results = win_rates(_scored(args), args.ties)
    table = Table("reward", "win rate [95 %]", "win-tie-loss", "change [95 %]", "medians", box=None)
    for result in results:
        rate, change = result.win_rate, result.difference
        table.add_row(
            result.reward,
            f"{rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}]",
            f"{rate.win}-{rate.tie}-{rate.loss}",
            f"{change.mean:+.4g} [{change.low:+.4g}, {change.high:+.4g}]",
            f"{result.median_before:.4g} -> {result.median_after:.4g}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"{results[0].pairs} pairs of {results[0].prompts} prompts; a tie counts as: {args.ties}")
    if args.output is not None:
        numbers = {"before": args.before, "after": args.after, "ties": args.ties}
        rows = [result.to_json() for result in results]
        write_text(args.output, json.dumps(numbers | {"rewards": rows}, indent=2, allow_nan=False))


def win_rates(scored: Scored, ties: Literal["half", "drop", "loss"] = "half") -> list[RewardWins]:
    """One entry a reward. ValueError where there are no pairs."""
    from statistics import median

    from diffalign_eval.statistics import paired_difference, win_rate

    results = []
    for reward, before in scored.before.items():
        after = scored.after[reward]
        worse, better = (before, after) if scored.higher_is_better[reward] else (after, before)
        results.append(
            RewardWins(
                reward,
                win_rate(worse, better, scored.prompts, ties=ties),
                paired_difference(before, after, scored.prompts),
                median(before),
                median(after),
                len(before),
                len(set(scored.prompts)),
            )
        )
    return results


def score_folders(before: Path, after: Path, rewards: Sequence[RewardConfig], device: str = "auto") -> Scored:
    """Score two folders of pictures, paired by prompt and seed.

    Raises:
        DataError: a folder without metadata.jsonl, rows without seeds, pictures that have no partner, or one that
            cannot be read.
        RewardError, NumericsError: a reward that cannot be built, or gives no finite number.
    """
    from diffalign.models.loading import pick_device
    from diffalign.rewards import RewardMixture

    sides = [_rows(folder) for folder in (before, after)]
    _require_partners(sides, (before, after))
    keys = list(sides[0][1])
    mixture = RewardMixture(rewards, str(pick_device(device)))
    columns = [_score(source, rows, keys, mixture) for source, rows in sides]
    higher = {label: reward.higher_is_better for label, reward in mixture.rewards.items()}
    return Scored([prompt for prompt, _, _ in keys], columns[0], columns[1], higher)


Key = tuple[str, int, int]
"""Prompt, seed, and how often the two have come before."""


def _scored(args: Args) -> Scored:
    from diffalign.cli.score import reward_names, reward_options
    from diffalign.config import RewardConfig
    from diffalign.errors import ConfigError

    names = reward_names(args.rewards)
    options = reward_options(args.options, names)
    rewards = [RewardConfig(name=name, options=options[name]) for name in names]
    folders = [(Path(side).expanduser() / METADATA).is_file() for side in (args.before, args.after)]
    if all(folders):
        return score_folders(Path(args.before), Path(args.after), rewards, args.sampling.device)
    if any(folders):
        raise ConfigError(
            "one side is a folder of pictures and the other is not",
            why=f"{args.after if folders[0] else args.before} has no {METADATA}",
            hint="sample both first (diffalign sample), or name two checkpoints",
        )
    if args.prompts is None:
        raise ConfigError(
            f"neither {args.before} nor {args.after} is a folder of pictures with {METADATA}",
            hint="name two such folders; or, for two checkpoints, add --prompts, e.g. --prompts parti",
        )
    return _compared(args, args.prompts, rewards)


def _compared(args: Args, prompts: str, rewards: Sequence[RewardConfig]) -> Scored:
    """Two checkpoints, drawn and scored by `diffalign_eval.compare`."""
    from diffalign.data.prompt_sets import load_prompt_set
    from diffalign_eval.compare import compare
    from diffalign_eval.generate import Drawing
    from diffalign_eval.shards import Shards

    options = args.sampling
    drawing = Drawing(
        options.sampler(run_behind([args.before, args.after]), args.before),
        options.batch_size,
        options.mixed_precision,
        picture_size(options.resolution),
    )
    comparison = compare(
        {"before": args.before, "after": args.after},
        [load_prompt_set(prompts, limit=options.limit)],
        drawing=drawing,
        rewards=rewards,
        output_dir=args.output_dir,
        seeds_per_prompt=options.seeds_per_prompt,
        base_seed=options.seed,
        shards=Shards(options.device),
    )
    assert comparison is not None, "one process is always the first"
    (compared,) = comparison.sets.values()
    columns = [
        {label: scores[name] for label, scores in compared.scores.items()} for name in ("before", "after")
    ]
    return Scored(compared.clusters, columns[0], columns[1], comparison.higher_is_better)


def _rows(folder: Path) -> tuple[PictureSource, dict[Key, int]]:
    """The pictures of a folder, and the row of each (prompt, seed)."""
    from collections import Counter

    from diffalign.data.tables import JsonTable
    from diffalign.errors import DataError
    from diffalign.scoring.sources import open_pictures

    file = folder.expanduser() / METADATA
    table = JsonTable(file)
    if "seed" not in table.columns:
        raise DataError(
            "pictures without seeds",
            where=str(file),
            why=f"found: {', '.join(table.columns)}",
            hint="a same-seed win rate pairs pictures by prompt and seed, as diffalign sample writes them",
        )
    source = open_pictures([str(file)])
    prompts = source.prompts(required=True)
    rows: dict[Key, int] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for row, (prompt, seed) in enumerate(zip(prompts, table.column("seed"), strict=True)):
        pair = (str(prompt), seed)
        rows[(*pair, seen[pair])] = row
        seen[pair] += 1
    return source, rows


def _require_partners(sides: Sequence[tuple[PictureSource, dict[Key, int]]], folders: Sequence[Path]) -> None:
    from diffalign.data.textfiles import listed
    from diffalign.errors import DataError

    alone = [
        f"{folders[side]}: {prompt!r}, seed {seed}"
        for side in (0, 1)
        for prompt, seed, number in sides[side][1]
        if (prompt, seed, number) not in sides[1 - side][1]
    ]
    if alone:
        raise DataError(
            f"{len(alone)} pictures have no partner of the same prompt and seed in the other folder",
            where=listed(alone),
            hint="sample both models with the same prompts, --seed and --seeds-per-prompt",
        )


def _score(
    source: PictureSource, rows: dict[Key, int], keys: Sequence[Key], mixture: Any
) -> dict[str, list[float]]:
    """Reward -> scores in the order of `keys`."""
    from diffalign.data.textfiles import listed
    from diffalign.errors import DataError
    from diffalign.scoring.run import score_pictures

    scored = score_pictures(source, source.prompts(required=True), mixture)
    if scored.skipped:
        reasons = [f"{scored.files[index]}: {reason}" for index, reason in scored.skipped.items()]
        raise DataError(f"{len(reasons)} pictures cannot be read", where=listed(reasons))
    columns = {}
    for label, values in scored.scores.items():
        columns[label] = [value for key in keys if (value := values[rows[key]]) is not None]
    return columns


if __name__ == "__main__":
    from diffalign.cli import run_module

    sys.exit(run_module("diffalign_eval.protocols.win_rate", sys.argv[1:]))
