"""Say what a run will need before it starts: peak memory, time per iteration, and what to change if it does not fit.

The networks are built from their configuration files without weights, and followed by shapes alone: nothing is
computed. A hub id fetches its configuration files only. The exit code is 0 if the run fits, and 10 if it does not.

examples:
  diffalign estimate sd15/ddpo_clip --memory 24GiB
  diffalign estimate my.yaml --gpu rtx4090 --training.gradient_checkpointing true
  diffalign estimate my.yaml --measure               # two real iterations on this machine
  diffalign estimate my.yaml --memory 24GiB --json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from diffalign.config_file import add_place, load_config
from diffalign.errors import ConfigError, DiffalignError, DoesNotFit

if TYPE_CHECKING:
    from diffalign.config import Run
    from diffalign.estimate.advice import Change
    from diffalign.estimate.kernels import DeviceKind
    from diffalign.estimate.measured import Measured
    from diffalign.estimate.run import Estimate

TAKES_OVERRIDES = True


@dataclass(frozen=True)
class Args:
    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A run file, or the name of a shipped one such as tiny/ddpo."""
    memory: Annotated[str | None, tyro.conf.arg(metavar="24GiB", help_behavior_hint="")] = None
    """What it has to fit in. Default: the GPU of this machine, or without one its free RAM."""
    gpu: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """A GPU to estimate for, with its memory and speed: rtx3090, rtx4090, rtx5090, l4, l40s, a6000, a100-40gb,
    a100-80gb, h100 or h200."""
    tflops: Annotated[float | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """TFLOP/s that training really reaches, for the time of an iteration."""
    measure: bool = False
    """Take two real iterations on this machine, without evaluation, and time the second."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class _Limit:
    """`bytes` there are, and in words where that is from."""

    bytes: int
    words: str


def run(args: Args, overrides: Sequence[str]) -> None:
    """Prints the estimate.

    Raises:
        DoesNotFit: it needs more memory than there is, after all was printed.
        ConfigError: wrong arguments. CheckpointError: no configuration to build the networks from.
    """
    if args.tflops is not None and args.tflops <= 0:
        raise ConfigError(f"--tflops must be above 0, not {args.tflops:g}")
    config = load_config(args.config, overrides)

    from diffalign.estimate.advice import advise
    from diffalign.estimate.run import estimate, in_gib

    try:
        kind = _kind(args, config)
        limit = _limit(args, kind)
        found = estimate(config, kind)
        measured = _measured(config) if args.measure else None
    except DiffalignError as error:
        add_place(error, args.config, overrides)
        raise
    fits = limit is None or found.peak <= limit.bytes
    changes = [] if fits or limit is None else advise(config, kind, found, limit.bytes)
    seconds, how = _time(args, config, found, measured)
    if args.json:
        print(json.dumps(_document(found, limit, changes, seconds, how, measured), indent=1))
    else:
        _show(found, limit, changes, seconds, how, measured)
    if not fits and limit is not None:
        enough = bool(changes) and changes[-1].peak <= limit.bytes
        raise DoesNotFit(
            f"the run needs {in_gib(found.peak)} GiB while {found.peak_phase}, and there are {in_gib(limit.bytes)} GiB",
            where=limit.words,
            hint="add the options above" if enough else "a smaller model, fewer pixels, or a larger device",
        )


def _kind(args: Args, config: Run) -> DeviceKind:
    import torch

    if config.training.device == "cpu":
        if args.gpu is not None:
            raise ConfigError("--gpu: the run computes on the CPU", why="training.device: cpu")
        return "cpu"
    asked = args.gpu or args.memory or args.tflops or config.training.device == "cuda"
    return "cuda" if asked or torch.cuda.is_available() else "cpu"


def _limit(args: Args, kind: DeviceKind) -> _Limit | None:
    from diffalign.estimate.hardware import GIB, card, memory_here, parse_memory

    if args.memory is not None:
        return _Limit(parse_memory(args.memory), f"--memory {args.memory}")
    if args.gpu is not None:
        return _Limit(int(card(args.gpu).memory * GIB), f"--gpu {args.gpu}")
    here = memory_here(kind)
    return None if here is None else _Limit(*here)


def _measured(config: Run) -> Measured:
    from diffalign.estimate.measured import measure

    with redirect_stdout(sys.stderr):  # where the estimate goes, nothing else does: it may be JSON
        return measure(config)


def _time(args: Args, config: Run, found: Estimate, measured: Measured | None) -> tuple[float | None, str]:
    """Seconds of an iteration, and how they were got; None with the reason why not."""
    from diffalign.estimate.hardware import UTILISATION, card

    work = f"{found.flops_per_iteration / 1e12:.3g} TFLOP"
    if measured is not None:
        return measured.seconds, f"measured, the second of two iterations on {measured.device}"
    if args.tflops is not None:
        return found.flops_per_iteration / args.tflops / 1e12, f"{work} at {args.tflops:g} TFLOP/s, as given"
    if args.gpu is None:
        return None, f"{work}; give --measure, --tflops or --gpu for the time"
    rate, words = card(args.gpu).tflops, "bf16"
    if config.training.mixed_precision == "no":
        if not config.training.tf32:
            return None, f"{work}; no figure for float32 without TF32 (give --tflops)"
        rate, words = rate / 2, "TF32, half of bf16"
    assumed = f"assuming {UTILISATION:.0%} of {rate:g} TFLOP/s ({args.gpu}, {words})"
    return found.flops_per_iteration / (rate * UTILISATION * 1e12), f"{work}, {assumed}"


def _document(
    found: Estimate,
    limit: _Limit | None,
    changes: Sequence[Change],
    seconds: float | None,
    how: str,
    measured: Measured | None,
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        **found.to_json(),
        "memory": None if limit is None else asdict(limit),
        "fits": None if limit is None else found.peak <= limit.bytes,
        "changes": [asdict(change) for change in changes],
        "seconds_per_iteration": seconds,
        "seconds_from": how,
        "measured": None if measured is None else asdict(measured),
    }


def _show(
    found: Estimate,
    limit: _Limit | None,
    changes: Sequence[Change],
    seconds: float | None,
    how: str,
    measured: Measured | None,
) -> None:
    from diffalign.estimate.run import in_gib

    print(f"{found.subject}, one process on {'a GPU' if found.kind == 'cuda' else 'the CPU'}\n")
    print("\n".join(found.table()))
    print()
    for name in found.not_counted:
        print(f"not counted: {name}")
    if measured is not None:
        print(f"measured peak: {in_gib(measured.peak)} GiB on {measured.device}")
    if limit is None:
        print("memory: not known here; give --memory or --gpu")
    else:
        left = limit.bytes - found.peak
        verdict = (
            f"fits, {in_gib(left)} GiB to spare" if left >= 0 else f"does not fit, {in_gib(-left)} GiB short"
        )
        print(f"memory: {in_gib(limit.bytes)} GiB ({limit.words}): {verdict}")
    print(f"time of an iteration: {'' if seconds is None else f'{seconds:.3g} s, '}{how}")
    if changes:
        print("\nwhat helps, each on top of those before it:")
    for change in changes:
        print(f"  {change.options}")
        print(f"      saves {in_gib(change.saves)} GiB, leaves {in_gib(change.peak)}; costs {change.costs}")
