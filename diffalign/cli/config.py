"""List, show and validate run files.

examples:
  diffalign config list                     the shipped run files
  diffalign config show ddpo                every option of a method: default, type, meaning
  diffalign config show tiny/ddpo           a run file with every option filled in
  diffalign config validate my.yaml --training.learning_rate 3e-4
  diffalign config schema ddpo > ddpo.json  JSON schema, for editors that complete and check YAML
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffalign.assets import list_configs
from diffalign.config import RUNS
from diffalign.config_file import config_schema, dump_config, load_config
from diffalign.config_help import describe_options
from diffalign.errors import ConfigError

TAKES_OVERRIDES = True


@dataclass(frozen=True)
class Args:
    action: tyro.conf.Positional[Literal["list", "show", "validate", "schema"]]
    """What to do."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ""
    """show: a method (sft, dpo, ddpo), a shipped name or a file; validate: a file; schema: a method."""


def run(args: Args, overrides: Sequence[str]) -> None:
    """Prints what was asked for.

    Raises:
        ConfigError: a run file is wrong or missing, or an argument is.
    """
    if not args.target and args.action in ("show", "validate"):
        raise ConfigError(
            f"config {args.action} needs a name", hint="diffalign config list shows the run files"
        )
    if overrides and (args.action not in ("show", "validate") or args.target in RUNS):
        raise ConfigError(f"{overrides[0]}: only a run file takes options", hint="name a run file")
    match args.action, args.target:
        case "list", _:
            print("\n".join(_listing()))
        case "schema", target:
            print(json.dumps(config_schema(target or None), indent=2))
        case "show", target if target in RUNS:
            print(describe_options(target), end="")
        case "show", target:
            print(dump_config(load_config(target, overrides)), end="")
        case _, target:
            config = load_config(target, overrides)
            print(f"{target} is a valid {config.algorithm.name} run")


def _listing() -> Iterator[str]:
    configs = list_configs()
    width = max(map(len, configs), default=0)
    for name, path in configs.items():
        yield f"{name:<{width}}  {_summary(path)}".rstrip()


def _summary(path: Path) -> str:
    """The first line of the file's head comment."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
