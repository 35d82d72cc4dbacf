"""Every option of a method, laid out as a commented run file."""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from diffalign.config import RUNS, Options
from diffalign.config_messages import section_of
from diffalign.config_yaml import SECTION_ORDER, to_yaml

_NAMES = {str: "text", int: "whole number", float: "number", bool: "true | false", Any: "anything"}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_WIDTH = 108


def describe_options(algorithm: str) -> str:
    """Every option of the algorithm at its default, under a comment with its meaning and type."""
    fields = RUNS[algorithm].model_fields
    blocks = [
        "\n".join(_option(name, fields[name], _default(fields[name]), ""))
        for name in SECTION_ORDER
        if name in fields
    ]
    return f"# All options of {algorithm}, at their defaults.\n\n" + "\n\n".join(blocks) + "\n"


def _option(name: str, info: FieldInfo, value: Any, pad: str) -> Iterator[str]:
    """The option's meaning in a comment, then `name: value  # type`."""
    section, entry = section_of(info.annotation), _list_entry(info.annotation)
    yield from textwrap.wrap(
        info.description or "", _WIDTH, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# "
    )
    kind = _words(info.annotation, info.metadata)
    if section:
        yield f"{pad}{name}:" + ("" if kind == "section" else f"  # {kind}")
        yield from _section(section, value, pad + "  ")
        return
    is_missing = info.is_required() and value is None
    yield f"{pad}{name}: {'REQUIRED' if is_missing else _inline(value)}  # {kind}"
    if entry:
        yield f"{pad}# each entry has"
        yield from (f"{pad}#   {line}" for line in _section(entry, None, ""))


def _section(section: type[Options], values: Options | None, pad: str) -> Iterator[str]:
    for name, info in section.model_fields.items():
        value = _default(info) if values is None else getattr(values, name)
        yield from _option(name, info, value, pad)


def _default(info: FieldInfo) -> Any:
    return None if info.is_required() else info.get_default(call_default_factory=True)


def _list_entry(annotation: Any) -> type[Options] | None:
    return section_of(get_args(annotation)[0]) if get_origin(annotation) is list else None


def _inline(value: Any) -> str:
    """`value` as one line of YAML."""
    return (
        to_yaml({"value": list(value) if isinstance(value, tuple) else value}).strip().removeprefix("value: ")
    )


def _words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A field's type for a reader: `number > 0 or null`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        nested = [item for extra in parts[1:] for item in getattr(extra, "metadata", [extra])]
        return _words(parts[0], nested)
    bounds = "".join(
        f" {sign} {getattr(item, name):g}"
        for item in metadata
        for name, sign in _SIGNS.items()
        if hasattr(item, name)
    )
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _words(part) for part in parts)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin is list:
        return f"list of {_words(parts[0])}"
    if origin is tuple:
        return f"{len(parts)} values, each {_words(parts[0])}"
    if origin is dict:
        return f"name: {_words(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return "section"
    return _NAMES.get(annotation, str(annotation)) + bounds
