"""Compare checkpoints: which is better, by how much, at what cost, and did one of them cheat its reward?

Draws every prompt with every checkpoint, from the same seeds, and shows per reward each mean, the paired difference
from the baseline and the win rate against it, with 95 % intervals over prompts. The baseline is the first checkpoint,
or, where only runs are named, the model that they started from. The output folder gets report.html (open it in a
browser), comparison.json, scores.jsonl, grid.png and the pictures.

What is in the output folder already is not made again: continue a comparison that was killed, or add a checkpoint, a
reward or a prompt set, by the same command.

What is not given is taken from the first run among the checkpoints: its rewards, its evaluation sets, and how those
were sampled.

examples:
  diffalign compare runs/ddpo
  diffalign compare base=bundled:tiny-sd sft=runs/sft ddpo=runs/ddpo --seeds-per-prompt 4 --processes 2
  diffalign compare sd15.safetensors runs/mine --prompts parti --limit 200 --rewards aesthetic,pickscore \\
      --held-out pickscore
  diffalign compare runs/ddpo --votes votes.json
  diffalign compare base=bundled:tiny-sd best=bundled:tiny-sd+best-of-n:n=8,reward=shapes \\
      --prompts bundled:prompts/shapes_eval.txt --rewards shapes,shapes_accuracy
  diffalign compare base=bundled:tiny-sd npo=bundled:tiny-sd+negative:runs/npo --guidance-scale 2
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from diffalign.cli.processes import relaunch
from diffalign.cli.sampling_args import SamplingArgs, optional, picture_size, run_behind

if TYPE_CHECKING:
    from rich.progress import TaskID

    from diffalign.config import RewardConfig, Run
    from diffalign.data.prompt_sets import PromptSet
    from diffalign_eval.compare import Comparison
    from diffalign_eval.document import Document

TAKES_WORDS = True


@dataclass(frozen=True)
class Args:
    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional, optional("[NAME=]PATH ...")]
    """Run folders, checkpoints of a run, diffusers folders, hub ids, .safetensors files, or bundled:tiny-sd; any of
    them +METHOD:OPTION=VALUE,...,reward=NAME is aligned at test time, as by `diffalign sample --align`."""
    prompts: Annotated[tuple[str, ...], optional("[NAME=]FILE ...")] = ()
    """Prompt sets: registered names (`diffalign prompts list`), files, or bundled:... Default: the run's."""
    categories: Annotated[tuple[str, ...], optional("NAME ...")] = ()
    """Only prompts of these categories."""
    subset: Annotated[int | None, optional("INT")] = None
    """So many prompts of each set, drawn with a fixed seed."""
    rewards: Annotated[str | None, optional("NAMES")] = None
    """Reward names, separated by commas; also file.py:function and module:function. Default: the run's."""
    options: Annotated[tuple[str, ...], optional("[NAME.OPTION=VALUE ...]")] = ()
    """Options of --rewards, e.g. clip.checkpoint=bundled:clip."""
    held_out: Annotated[str | None, optional("NAMES")] = None
    """Rewards that nothing was trained on, separated by commas. Default: those that no run here was trained on."""
    along: Annotated[int, optional("N")] = 0
    """Also draw up to N kept checkpoints of each run (64 prompts), for its over-optimisation plot."""
    distance_prompts: Annotated[int, optional("N")] = 16
    """Prompts on which the distance from the baseline is measured along the trajectory; 0: not at all."""
    embedding: Annotated[str | None, optional("CLIP")] = None
    """CLIP for diversity: ARCHITECTURE/PRETRAINED, a folder, or bundled:clip. Default: of the reward clip, else
    bundled:clip for the bundled checkpoint and ViT-L-14-quickgelu/openai for others."""
    fid: bool = False
    """Also measure FID and KID against the baseline's pictures (pip install 'diffalign[fid]')."""
    votes: Annotated[Path | None, optional("FILE")] = None
    """Votes that the report's blind A/B mode recorded; may be given with the comparison they are about."""
    format: Literal["html", "markdown"] = "html"
    """markdown: also write report.md, for a model card."""
    output_dir: Path = Path("runs/compare")
    """Folder of the results; what an earlier comparison left in it is used."""
    processes: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Processes on this machine that share the pictures; for several machines use accelerate launch."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingArgs] = field(default_factory=SamplingArgs)


def run(args: Args, words: Sequence[str]) -> None:
    """Compare, print the tables, and write the report."""
    from diffalign_eval.aligned import split_alignments, unspent
    from diffalign_eval.runs import run_info, steps_of, with_baseline

    checkpoints, alignments = split_alignments(named_checkpoints(args.checkpoints))
    checkpoints = with_baseline(checkpoints)
    known = run_behind(list(checkpoints.values()))
    sampler = args.sampling.sampler(known, next(iter(checkpoints.values())))
    for alignment in alignments.values():
        alignment.require(sampler)
    _require_numbers(args)
    _require_prompts_and_rewards(args, known)
    relaunch(args.processes, ["compare", *words])

    from diffalign_eval.compare import compare
    from diffalign_eval.conclude import Wishes, conclude
    from diffalign_eval.generate import Drawing
    from diffalign_eval.shards import Shards

    prompt_sets = _prompt_sets(args, known)
    rewards = _rewards(args, known)
    infos = {name: info for name, path in checkpoints.items() if (info := run_info(path)) is not None}
    held_out = unspent(rewards, infos, alignments)
    if args.held_out is not None:
        held_out = [label.strip() for label in args.held_out.split(",") if label.strip()]
    with progress_bars() as on_progress:
        comparison = compare(
            checkpoints,
            prompt_sets,
            drawing=Drawing(
                sampler,
                args.sampling.batch_size,
                args.sampling.mixed_precision,
                picture_size(args.sampling.resolution),
            ),
            rewards=rewards,
            output_dir=args.output_dir,
            seeds_per_prompt=args.sampling.seeds_per_prompt,
            base_seed=args.sampling.seed,
            held_out=held_out,
            alignments=alignments,
            along={n: steps_of(info, args.along) for n, info in infos.items() if n not in alignments},
            shards=Shards(args.sampling.device),
            on_progress=on_progress,
        )
    if comparison is None:
        return
    wishes = Wishes(
        distance_prompts=args.distance_prompts,
        embedding=args.embedding,
        fid=args.fid,
        votes=args.votes,
        markdown=args.format == "markdown",
        command="diffalign compare " + " ".join(words),
        device=args.sampling.device,
    )
    document = conclude(comparison, infos, wishes)
    print_comparison(comparison, document)


def print_comparison(comparison: Comparison, document: Document) -> None:
    """The tables, what gave alarm, and where the rest is."""
    from rich.console import Console

    from diffalign_eval.table import comparison_table

    console = Console(width=None if sys.stdout.isatty() else 120)
    sampler = comparison.drawing.sampler
    for name, compared in comparison.sets.items():
        title = (
            f"{name}: {len(compared.pictures)} pictures of {len(set(compared.clusters))} prompts "
            f"from each checkpoint\n{sampler.kind}, {sampler.steps} steps, noise {sampler.noise:g}, "
            f"guidance {sampler.guidance_scale:g}"
        )
        console.print(comparison_table(compared.results, title))
    for alarm in document["alarms"]:
        console.print(
            f"{alarm['severity']}: {alarm['checkpoint']}: {alarm['text']}", soft_wrap=True, markup=False
        )
        console.print(f"  try: {alarm['try']}", soft_wrap=True, markup=False)
    for hole in document["holes"]:
        console.print(
            f"missing: {hole['where']}: {hole['reason']}", style="dim", soft_wrap=True, markup=False
        )
    folder = comparison.store.path
    console.print(
        f"report: {folder / 'report.html'}   all numbers: {folder / 'comparison.json'}", soft_wrap=True
    )


def named_checkpoints(entries: Sequence[str]) -> dict[str, str]:
    """Name -> path of `name=path` and bare paths; a bare path is named after its last telling part.

    Raises:
        ConfigError: two of the same name, or none.
    """
    from diffalign.errors import ConfigError

    pairs = [_name_and_path(entry) for entry in entries]
    problems = []
    if not pairs:
        problems.append("compare needs checkpoints")
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


def _require_numbers(args: Args) -> None:
    from diffalign.errors import ConfigError

    least = {"along": 0, "distance_prompts": 0, "processes": 1, "subset": 1}
    given = {name: getattr(args, name) for name in least}
    problems = [
        f"--{name.replace('_', '-')} must be at least {least[name]}; got {value}"
        for name, value in given.items()
        if value is not None and value < least[name]
    ]
    if problems:
        raise ConfigError("numbers that make no sense", problems=problems)


def _require_prompts_and_rewards(args: Args, known: Run | None) -> None:
    from diffalign.errors import ConfigError

    problems = []
    if not args.prompts and (known is None or not known.evaluation.sets):
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


def _prompt_sets(args: Args, known: Run | None) -> list[PromptSet]:
    """Those of --prompts, or the evaluation sets of the run, as many prompts as the run took."""
    from dataclasses import replace

    from diffalign.data.prompt_sets import load_prompt_set

    limit = args.sampling.limit
    specs = {spec: spec for spec in args.prompts}
    if not specs:
        assert known is not None
        specs = known.evaluation.sets
        limit = limit or known.evaluation.prompts_per_set
    sets = {
        name: load_prompt_set(spec, categories=args.categories, limit=limit, subset=args.subset)
        for name, spec in specs.items()
    }
    return [prompts if name == specs[name] else replace(prompts, name=name) for name, prompts in sets.items()]


def _rewards(args: Args, known: Run | None) -> list[RewardConfig]:
    from diffalign.cli.score import reward_names, reward_options
    from diffalign.config import RewardConfig

    if args.rewards is None:
        assert known is not None
        return known.rewards
    names = reward_names(args.rewards)
    options = reward_options(args.options, names)
    return [RewardConfig(name=name, options=options[name]) for name in names]


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per checkpoint on stderr, and the function that moves them; the first process only shows them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from diffalign.cli.processes import is_first_process

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not is_first_process()) as progress:

        def advance(checkpoint: str, done: int, total: int) -> None:
            if checkpoint not in bars:
                bars[checkpoint] = progress.add_task(checkpoint, total=total)
            progress.update(bars[checkpoint], completed=done)

        yield advance


def _name_and_path(entry: str) -> tuple[str, str]:
    from diffalign.cli.alignment_args import split_alignment, split_negative

    name, equals, path = entry.partition("=")
    if equals and path and re.fullmatch(r"[\w.+-]+", name) and not Path(entry).exists():
        return name, path
    path, alignment = split_alignment(entry)
    path, negative = split_negative(path)
    parts = [part for part in re.split(r"[/\\:]", path) if part not in ("", ".", "..", "~")]
    if len(parts) > 1 and parts[-1] == "final":
        parts.pop()
    last = parts[-1].removesuffix(".safetensors") if parts else path
    if negative is not None:
        last += "+negative"
    if alignment is not None:
        last += "+" + alignment.partition(":")[0]
    return re.sub(r"[^\w.+-]+", "-", last), entry
