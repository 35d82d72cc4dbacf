"""Push a result to the Hugging Face hub: the weights, their model card and its picture.

RESULT is a run's final/, or a folder or file that was exported from one. A run's own folder, with its checkpoints, is
refused. One file gets a model card where --run names its run; a folder has one.
The repository is made if it is not there. Nothing on this machine changes; a push that failed may be repeated, and
sends only what is missing. It needs a token with write access: `hf auth login`, or HF_TOKEN.

examples:
  diffalign push runs/ddpo/final me/sd15-ddpo --dry-run
  diffalign push runs/ddpo/final me/sd15-ddpo --private
  diffalign push runs/ddpo/final me/sd15-ddpo --revision seed-1 --message "seed 1"
  diffalign push runs/ddpo/export/ddpo-lora.safetensors me/sd15-ddpo --run runs/ddpo
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diffalign.cli.sampling_args import optional
from diffalign.errors import DiffalignError, StorageError


@dataclass(frozen=True)
class Args:
    result: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RESULT")]
    """A run's final/, or an exported folder or .safetensors file."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO_ID")]
    """OWNER/NAME on the hub."""
    private: bool = False
    """Make the repository visible to its owner only. One that is there stays as it is."""
    revision: Annotated[str | None, optional("BRANCH")] = None
    """Branch to push to, made if it is not there. Default: main."""
    message: Annotated[str | None, optional("TEXT")] = None
    """Of the commit. Default: the folder's name and the version of diffalign."""
    run: Annotated[Path | None, optional("RUN")] = None
    """The finished run that one exported file came from, for its model card."""
    dry_run: bool = False
    """List what would be pushed, without the network."""


def run(args: Args) -> None:
    """Pushes, and prints the address.

    Raises:
        ConfigError: no result, or no name of the hub.
        StorageError: it did not get there; the last line is the command to run again.
    """
    from diffalign.hub import as_folder, plan_push, push
    from diffalign.model_card import CARD

    with as_folder(args.result, args.run) as folder:
        plan = plan_push(folder, args.repository)
        if CARD not in dict(plan.files):
            print(
                f"warning: {args.result} has no {CARD}, so the hub will not say what it is", file=sys.stderr
            )
        if args.dry_run:
            for name, size in plan.files:
                print(f"{size:>15,}  {name}")
            print(
                f"{plan.size:>15,}  bytes would be pushed to {args.repository}, branch {args.revision or 'main'}"
            )
            return
        print(f"pushing {len(plan.files)} files, {plan.size / 1e6:,.1f} MB", flush=True)
        try:
            address = push(plan, private=args.private, revision=args.revision, message=args.message)
        except StorageError as error:
            error.hint = f"{error.hint}\nthen again: {_again(args)}"
            raise
    print(address)


def push_export(result: Path, repository: str, run_folder: Path | None) -> None:
    """Push what `export` has just written. What goes wrong is a warning, with the command that tries again.

    Args:
        run_folder: the finished run, for the model card of one file.
    """
    from diffalign.redaction import redact

    args = Args(result, repository, run=run_folder if result.is_file() else None)
    try:
        run(args)
    except Exception as error:
        why = error.render() if isinstance(error, DiffalignError) else f"{type(error).__name__}: {error}"
        again = "" if isinstance(error, StorageError) else f"\nagain: {_again(args)}"
        print(
            redact(f"warning: {result} is written, and not pushed to {repository}\n{why}{again}"),
            file=sys.stderr,
        )


def _again(args: Args) -> str:
    words = ["diffalign", "push", str(args.result), args.repository]
    words += ["--run", str(args.run)] if args.run is not None else []
    words += ["--private"] if args.private else []
    words += ["--revision", args.revision] if args.revision is not None else []
    words += ["--message", args.message] if args.message is not None else []
    return shlex.join(words)
