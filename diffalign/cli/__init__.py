"""The command line: finds the command's module, parses its `Args`, runs it, and turns errors into one screen.

A command is a module with a frozen dataclass `Args` and `run(args)`, or `run(args, overrides)` where it sets
`TAKES_OVERRIDES = True` (there `words_of` may rewrite its words first), or `run(args, words)` with the words as typed
where it sets `TAKES_WORDS = True` (to start other processes with them); its docstring is the help text. Nothing heavy
is imported before the command is known: `diffalign --help` must be instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from diffalign import __version__
from diffalign.errors import ConfigError

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("diffalign.cli.quickstart", "align the bundled checkpoint in minutes, see what it gained"),
    "train": ("diffalign.cli.train", "align a checkpoint by SFT, Diffusion-DPO or DDPO"),
    "estimate": ("diffalign.cli.estimate", "say what memory and time a run will need"),
    "status": ("diffalign.cli.status", "say what runs are doing"),
    "watch": ("diffalign.cli.watch", "keep an eye on runs until they end"),
    "sample": ("diffalign.cli.sample", "draw pictures for a list of prompts"),
    "export": ("diffalign.cli.export", "write a run's result for other tools: kohya, peft, one file, ..."),
    "score": ("diffalign.cli.score", "score a folder of pictures with reward models"),
    "serve-rewards": ("diffalign.cli.serve_rewards", "serve rewards over HTTP"),
    "prefer": ("diffalign.cli.prefer", "ask people which of two pictures is better"),
    "compare": ("diffalign_eval.command", "compare checkpoints: same prompts, same seeds, intervals"),
    "push": ("diffalign.cli.push", "push a result to the Hugging Face hub"),
    "prompts": ("diffalign.cli.prompts", "list, show and write prompt sets"),
    "study": ("diffalign_eval.study_command", "train several methods under one budget, and compare them"),
    "config": ("diffalign.cli.config", "list, show and validate run files"),
    "doctor": ("diffalign.cli.doctor", "check versions, device, disk and rewards"),
}

_EXAMPLES = """\
examples:
  diffalign quickstart
  diffalign config show tiny/ddpo
  diffalign train tiny/ddpo --output-dir runs/first --training.iterations 20
  diffalign compare bundled:tiny-sd runs/first/final

diffalign COMMAND --help explains a command. HF_HUB_DISABLE_PROGRESS_BARS=0 shows downloads."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (see `diffalign.errors`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else None
    if command in (None, "-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if command == "--version":
        print(f"diffalign {__version__}")
        return 0
    if command not in COMMANDS:
        print(_unknown(str(command)).render(), file=sys.stderr)
        return ConfigError.exit_code
    return _guarded(lambda: _run(str(command), words[1:]))


def run_module(name: str, words: Sequence[str]) -> int:
    """Runs a module that is made like a command, for `python -m NAME`; returns the exit code."""

    def action() -> None:
        import importlib

        _quiet()
        module: Any = importlib.import_module(name)
        module.run(_parse(f"python -m {name}", module, list(words)))

    return _guarded(action)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    table = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    head = [f"diffalign {__version__}: align diffusion models, and see what it gained", ""]
    usage = ["usage: diffalign COMMAND [options]", "", "commands:"]
    return "\n".join([*head, *usage, *table, "", _EXAMPLES])


def _unknown(command: str) -> ConfigError:
    import difflib

    close = difflib.get_close_matches(command, COMMANDS, n=1)
    return ConfigError(
        f"{command} is not a command of diffalign",
        why=f"there are {', '.join(COMMANDS)}",
        hint=f"did you mean diffalign {close[0]}?" if close else "diffalign --help",
    )


def _guarded(action: Callable[[], None]) -> int:
    """Runs a command; no exception leaves here."""
    try:
        action()
        sys.stdout.flush()
    except SystemExit as stop:  # tyro's --help (0) and its own argument errors (2)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `diffalign config list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        import time

        from diffalign.cli.failure import report
        from diffalign.cli.processes import is_first_process

        if not is_first_process():
            time.sleep(10)  # when all fail alike, the first one's screen is enough: it ends the others
        return report(error)
    return 0


def _run(command: str, words: list[str]) -> None:
    import importlib

    _quiet()
    module: Any = importlib.import_module(COMMANDS[command][0])
    if getattr(module, "TAKES_OVERRIDES", False):
        own, overrides = split_overrides(words)
        own = getattr(module, "words_of", list)(own)
        module.run(_parse(f"diffalign {command}", module, own), overrides)
    elif getattr(module, "TAKES_WORDS", False):
        module.run(_parse(f"diffalign {command}", module, words), words)
    else:
        module.run(_parse(f"diffalign {command}", module, words))


def _parse(program: str, module: Any, words: list[str]) -> Any:
    import tyro

    return tyro.cli(
        module.Args,
        prog=program,
        description=(module.__doc__ or "").strip(),
        args=words,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into the command's own words and `--section.option value` overrides.

    An override is a long option with a dot in its name, or one named like a part of the run configuration.
    """
    from diffalign.config import RUNS

    sections = {name for run in RUNS.values() for name in run.model_fields}
    own: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, has_value, _ = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and ("." in name or name in sections)):
            own.append(word)
            continue
        overrides.append(word)
        if not has_value and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return own, overrides


def _quiet() -> None:
    """Keeps libraries' chatter off the terminal; the user's own environment and -W settings win."""
    import warnings

    for variable, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DIFFUSERS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("PYDANTIC_DISABLE_PLUGINS", "__all__"),  # looking for them takes longer than reading a run file
    ):
        os.environ.setdefault(variable, value)
    if not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
