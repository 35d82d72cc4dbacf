"""Test-time alignment as typed: `METHOD:OPTION=VALUE,...,reward=NAME`, alike in every command that draws pictures."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from diffalign.config.test_time import Alignment

EXAMPLE = "best-of-n:n=8,reward=shapes"
NEGATIVE = "negative:"
"""CHECKPOINT+negative:PATH is guided away from what PATH predicts without a prompt."""


def split_negative(path: str) -> tuple[str, str | None]:
    """(checkpoint, negative) of CHECKPOINT+negative:PATH; a path that exists is a checkpoint, whatever its name."""
    own, found, negative = path.partition(f"+{NEGATIVE}")
    return (path, None) if not found or Path(path).expanduser().exists() else (own, negative)


def split_alignment(path: str) -> tuple[str, str | None]:
    """(checkpoint, alignment) of CHECKPOINT+METHOD:...; a path that exists is a checkpoint, whatever its name."""
    found = re.search(rf"\+(?!{NEGATIVE})(?=[\w-]+(:|$))", path)
    if found is None or Path(path).expanduser().exists():
        return path, None
    return path[: found.start()], path[found.end() :]


def parse_alignment(text: str) -> Alignment:
    """A method, its options, its rewards (`reward=NAME`) and theirs (`NAME.OPTION=VALUE`, `NAME.weight=0.5`).

    Values are those of a run file; a list of steps is written 4/8/12. Values hold no commas.

    Raises:
        ConfigError: an unknown method or option, a value out of range, no reward; all problems at once.
    """
    from pydantic import ValidationError

    from diffalign.config.test_time import METHODS, Alignment

    name, _, rest = text.partition(":")
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        raise ConfigError(
            f"{name or 'nothing'} is not a method of test-time alignment",
            where=text,
            why=f"there are {', '.join(METHODS)}",
            hint=f"did you mean {close[0]}?" if close else f"e.g. {EXAMPLE}",
        )
    problems: list[str] = []
    options: dict[str, Any] = {}
    rewards: dict[str, dict[str, str]] = {}
    later: list[tuple[str, str]] = []
    known = [option for option in METHODS[name].model_fields if option != "name"]
    for pair in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = pair.partition("=")
        if not equals or not value:
            problems.append(f"{name}: {pair} is no OPTION=VALUE")
        elif key in options:
            problems.append(f"{name}: {key} is given twice")
        elif key == "reward":
            rewards.setdefault(value, {})
        elif key in known:
            options[key] = value.split("/") if key == "steps" and name != "dno" else value
        elif "." in key:
            later.append((key, value))
        else:
            problems.append(f"{name}: {key} is not an option of {name}{_meant(key, [*known, 'reward'])}")
    for key, value in later:
        reward, _, option = key.rpartition(".")
        if reward not in rewards:
            problems.append(
                f"{name}: {key}={value} is an option of a reward, and there is no reward={reward}"
            )
            continue
        rewards[reward][option] = value
    if not rewards:
        problems.append(f"{name}: its reward is missing; add reward=NAME")
    if problems:
        raise ConfigError("the alignment cannot be read", problems=problems, hint=f"e.g. {EXAMPLE}")
    try:
        return Alignment.model_validate(
            {"method": {"name": name, **options}, "rewards": [_reward(*entry) for entry in rewards.items()]}
        )
    except ValidationError as error:
        problems = [_problem(name, detail["loc"], detail["msg"]) for detail in error.errors()]
        raise ConfigError(
            "the alignment cannot be read", problems=problems, hint=f"e.g. {EXAMPLE}"
        ) from error


def _reward(name: str, options: dict[str, str]) -> dict[str, Any]:
    import yaml

    read: dict[str, Any] = {}
    for option, value in options.items():
        try:
            read[option] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}.{option}: {value} cannot be read", why=str(error)) from error
    weight = {"weight": read.pop("weight")} if "weight" in read else {}
    return {"name": name, "options": read, **weight}


def _meant(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; it has {', '.join(known)}"


def _problem(name: str, location: tuple[int | str, ...], message: str) -> str:
    """One pydantic error as a line: the option is the last name of its place."""
    option = next((str(part) for part in reversed(location) if isinstance(part, str) and part != name), "")
    text = message.removeprefix("Value error, ").removeprefix("Input ")
    return f"{name}: {option} {text}" if option else f"{name}: {text}"
