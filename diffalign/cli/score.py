"""Score pictures with one or more rewards; or rewards, by how well they agree with people.

PICTURES is a folder, a quoted pattern, picture files, a .jsonl or .parquet with the columns image and prompt.
Prompts come from there, from metadata.jsonl of the folder, from a .txt beside each picture, or from --prompts
(one a picture, in the order of their names). Rewards that look at the picture alone need none.

Scores are kept in OUTPUT.partial.jsonl while the run goes on; after an interruption the same command goes on
from there. Pictures that cannot be read are skipped and listed.

examples:
  diffalign score pictures/ --rewards aesthetic
  diffalign score samples/ --rewards clip,shapes --options clip.checkpoint=bundled:clip
  diffalign score "pictures/**/*.png" --rewards clip --prompts prompts.txt --output scores.parquet
  diffalign score rows.jsonl --rewards my_reward.py:sharpness --output scores.jsonl --sheet scores.html
  diffalign score --pairs bundled:pairs.parquet --rewards shapes,jpeg_compressibility
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from diffalign.cli.sampling_args import optional

if TYPE_CHECKING:
    from diffalign.config import RewardConfig
    from diffalign.rewards import RewardMixture
    from diffalign.scoring.agreement import Agreement
    from diffalign.scoring.journal import Journal
    from diffalign.scoring.run import ScoredPictures
    from diffalign.scoring.sources import PictureSource

COLUMNS = ("pair", "file", "prompt", "preferred", "skipped")
"""Of the output, beside one a reward."""

_MOST_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class Args:
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional, optional("[PICTURES ...]")] = ()
    """A folder (subfolders too), a quoted pattern, picture files, or a .jsonl or .parquet of pictures."""
    rewards: str
    """Reward names, separated by commas; also file.py:function and package.module:function."""
    prompts: Annotated[Path | None, optional("FILE")] = None
    """One prompt a picture (.txt, .jsonl, .csv, .tsv, .parquet), in the order of the pictures."""
    options: Annotated[tuple[str, ...], optional("[NAME.OPTION=VALUE ...]")] = ()
    """Options of the rewards, e.g. clip.checkpoint=bundled:clip."""
    output: Annotated[Path | None, optional("FILE")] = None
    """Write a row a picture here: .parquet or .jsonl. An interrupted run goes on from OUTPUT.partial.jsonl."""
    pairs: Annotated[str | None, optional("FILE")] = None
    """Instead of pictures: preference pairs, as Diffusion-DPO reads them; shows how often each reward agrees."""
    label_column: Annotated[str | None, optional("NAME")] = None
    """Column of the labels of --pairs. Default: label_0."""
    sheet: Annotated[Path | None, optional("FILE.html")] = None
    """Write the best and worst pictures of each reward as one HTML file."""
    sheet_pictures: int = 24
    """Pictures on the sheet from each end."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the rewards run; auto: the GPU if there is one."""


def run(args: Args) -> None:
    """Score, write `--output` and `--sheet` once everything is scored, and print tables.

    Raises:
        ConfigError: options that do not go together, or the partial scores of another run.
        DataError: no pictures, a table without them, prompts that are missing; or no picture can be read.
        NumericsError: a score is not finite (the picture is named).
        RewardError, DeviceError, StorageError: as they say. What was scored before is kept.
    """
    _check(args)

    from diffalign.config import RewardConfig
    from diffalign.config.data import LABEL_COLUMN
    from diffalign.scoring.journal import Journal, journal_header, journal_path
    from diffalign.scoring.sources import PairPictures, open_pictures, prompts_for

    names = reward_names(args.rewards)
    options = reward_options(args.options, names)
    specs = [RewardConfig(name=name, options=options[name]) for name in names]
    if args.pairs is None:
        pictures = open_pictures(args.pictures)
    else:
        pictures = PairPictures(args.pairs, args.label_column or LABEL_COLUMN)
    journal = None
    if args.output is not None:
        journal = Journal(journal_path(args.output), journal_header(pictures, specs))
    mixture = _mixture(specs, args.device)
    prompts = prompts_for(pictures, args.prompts, mixture.needs_prompt)
    scored = _score(pictures, prompts, mixture, journal)
    agreements = _agreements(pictures, scored, mixture)
    _write(args, pictures, scored, agreements, mixture)
    if journal is not None:
        journal.remove()
    _print(pictures, scored, agreements)


def _check(args: Args) -> None:
    """What the words of the command line say by themselves."""
    from diffalign.assets import resolve
    from diffalign.errors import ConfigError
    from diffalign.scoring.output import SUFFIXES, require_output

    if bool(args.pictures) == (args.pairs is not None):
        raise ConfigError(
            "give pictures or --pairs, one of them",
            hint='a folder, a "quoted pattern", a .jsonl, a .parquet; or --pairs FILE',
        )
    if args.pairs is not None and args.prompts is not None:
        raise ConfigError("--prompts does not go with --pairs", why="pairs have prompts of their own")
    if args.label_column is not None and args.pairs is None:
        raise ConfigError("--label-column belongs to --pairs, which is missing")
    if args.sheet_pictures < 1:
        raise ConfigError(f"--sheet-pictures must be at least 1; got {args.sheet_pictures}")
    named = (*args.pictures, args.pairs, args.prompts)
    inputs = [resolve(str(name)).absolute() for name in named if name is not None]
    for option, path, suffixes in (
        ("--output", args.output, SUFFIXES),
        ("--sheet", args.sheet, (".html", ".htm")),
    ):
        if path is not None:
            require_output(path, option, suffixes)
            if path.absolute() in inputs:
                raise ConfigError(f"{option} would overwrite what is to be scored: {path}")


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

    from diffalign.errors import ConfigError, RewardError
    from diffalign.redaction import written_secrets

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
    if problems := list(written_secrets(options)):
        raise ConfigError("--options holds a secret", problems=problems)
    return options


def _mixture(specs: Sequence[RewardConfig], device: str) -> RewardMixture:
    from diffalign.errors import ConfigError
    from diffalign.rewards import RewardMixture

    for spec in specs:
        if spec.name in COLUMNS:
            raise ConfigError(f"a reward cannot be named {spec.name}: the output has a column of that name")
    return RewardMixture(specs, _device(device))


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


def _score(
    pictures: PictureSource, prompts: Sequence[str | None], mixture: RewardMixture, journal: Journal | None
) -> ScoredPictures:
    """With a progress bar, and a word about what is kept whatever ends the run early."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from diffalign.scoring.run import score_pictures

    if journal is not None and journal.scores:
        print(f"going on from {journal.path}: {_counted(len(journal.scores))} scored", file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("scoring", total=len(pictures.files))
            return score_pictures(
                pictures, prompts, mixture, journal, lambda done: progress.update(task, completed=done)
            )
    except BaseException:
        if journal is not None and journal.scores:
            print(
                f"the scores of {_counted(len(journal.scores))} are kept in {journal.path};\n"
                "the same command goes on from there",
                file=sys.stderr,
            )
        raise


def _agreements(pictures: PictureSource, scored: ScoredPictures, mixture: RewardMixture) -> list[Agreement]:
    from diffalign.scoring.agreement import agreement
    from diffalign.scoring.sources import PairPictures

    if not isinstance(pictures, PairPictures):
        return []
    return [
        agreement(label, pictures.pairs, scored, higher_is_better=reward.higher_is_better)
        for label, reward in mixture.rewards.items()
    ]


def _write(
    args: Args,
    pictures: PictureSource,
    scored: ScoredPictures,
    agreements: Sequence[Agreement],
    mixture: RewardMixture,
) -> None:
    from diffalign.scoring.output import write_columns, write_text

    if args.output is not None:
        write_columns(args.output, _columns(pictures, scored))
        if agreements:
            result = {"pairs": pictures.where, "rewards": [each.to_json() for each in agreements]}
            target = args.output.with_name(f"{args.output.name}.agreement.json")
            write_text(target, json.dumps(result, indent=2))
    if args.sheet is not None:
        from diffalign.scoring.sheet import score_sheet

        directions = {label: reward.higher_is_better for label, reward in mixture.rewards.items()}
        write_text(args.sheet, score_sheet(pictures, scored, directions, args.sheet_pictures))


def _columns(pictures: PictureSource, scored: ScoredPictures) -> dict[str, Sequence[Any]]:
    from diffalign.scoring.sources import PairPictures

    count = len(scored.files)
    columns: dict[str, Sequence[Any]] = {"file": scored.files, "prompt": scored.prompts}
    if isinstance(pictures, PairPictures):
        first = [pictures.pairs.probability(pair) for pair in range(count // 2)]
        columns["pair"] = [index // 2 for index in range(count)]
        columns["preferred"] = [share for p in first for share in (p, 1.0 - p)]
    return columns | scored.scores | {"skipped": [scored.skipped.get(index) for index in range(count)]}


def _print(pictures: PictureSource, scored: ScoredPictures, agreements: Sequence[Agreement]) -> None:
    from rich.console import Console

    from diffalign.cli.score_tables import agreement_table, ends_text, score_table, ties_text

    console = Console()
    console.print(score_table(pictures.where, scored))
    print(ends_text(scored))
    if agreements:
        console.print(agreement_table(agreements))
        if agreements[0].label_ties:
            print(ties_text(agreements))
    if scored.skipped:
        print(f"skipped {len(scored.skipped)} of {_counted(len(scored.files))}:", file=sys.stderr)
        for index, reason in list(scored.skipped.items())[:_MOST_LISTED]:
            print(f"  {scored.files[index]}: {reason}", file=sys.stderr)
        if len(scored.skipped) > _MOST_LISTED:
            print(f"  ... and {len(scored.skipped) - _MOST_LISTED} more", file=sys.stderr)


def _counted(pictures: int) -> str:
    return f"{pictures:,} picture" + "s" * (pictures != 1)
