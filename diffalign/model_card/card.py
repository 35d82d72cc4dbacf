"""`write_card`: README.md of a result, from what its run has written down. What is not known is said to be unknown."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from diffalign.config import Run
from diffalign.config_file import load_config
from diffalign.errors import ConfigError
from diffalign.model_card import sections
from diffalign.model_card.front_matter import front_matter
from diffalign.model_card.loading_code import loading_code
from diffalign.model_card.result import Result, find_result
from diffalign.origins import Licence, Origins, find_licence, read_origins
from diffalign.redaction import redact

CARD = "README.md"
PICTURE = "before-after.png"


@dataclass(frozen=True)
class Facts:
    """Everything a card is made of.

    Attributes:
        summary: what summary.json says.
        origins: None where the run did not write them down.
        licence: of the base model.
    """

    result: Result
    config: Run
    config_text: str
    summary: dict[str, Any]
    origins: Origins | None
    licence: Licence


def write_card(folder: Path, run: Path) -> Path:
    """Write `<folder>/README.md`, a model card as the Hugging Face hub shows it, and return its path.

    The run's grid of pictures before and after, and the licence of the base model where its text is to be had, are
    copied beside it.

    Args:
        folder: a result: the run's final/, or what was exported from it.
        run: the run's folder, finished: config.yaml, summary.json and, for hashes and licences, origins.json.

    Raises:
        ConfigError: `folder` holds no result, or `run` no finished run.
        OSError: it cannot be written.
    """
    facts = _read(folder, run)
    grid = run / "samples" / PICTURE
    if grid.is_file():
        shutil.copyfile(grid, folder / PICTURE)
    text = facts.licence.file
    if text is not None and Path(text).is_file() and not (folder / Path(text).name).exists():
        shutil.copyfile(text, folder / Path(text).name)
    card = folder / CARD
    partial = folder / f".{CARD}.partial"
    partial.write_text(redact(_render(facts, grid.is_file())), encoding="utf-8")
    partial.replace(card)
    return card


def _read(folder: Path, run: Path) -> Facts:
    result = find_result(folder)
    if result is None:
        raise ConfigError(f"{folder} holds no result of a run", hint="name its final/, or an exported folder")
    file = run / "config.yaml"
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        config_text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{run} is not a finished run", why=str(error), hint="the same train command again finishes it"
        ) from error
    origins = read_origins(run)
    licence = origins.base.files.licence if origins is not None else Licence()
    if licence == Licence() and result.kind == "pipeline":
        licence = find_licence(folder, str(folder))  # a base model's own card may have come with its pipeline
    return Facts(result, load_config(file), config_text, summary, origins, licence)


def _render(facts: Facts, has_picture: bool) -> str:
    environment = Environment(
        loader=PackageLoader("diffalign.model_card", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    origins = facts.origins
    base = origins.base if origins is not None else None
    return environment.get_template("card.md.jinja").render(
        front_matter=front_matter(facts.result, facts.config, base, facts.licence),
        title=sections.title(facts.config),
        summary=sections.what_it_is(facts.result, facts.config, facts.summary),
        picture=PICTURE if has_picture else "",
        picture_text=sections.under_the_picture(facts.config),
        gains=sections.gains(facts.summary),
        rewards=sections.rewards(facts.config, origins),
        guards=sections.guards(facts.config, facts.summary),
        code=loading_code(facts.result, facts.config, base),
        code_notes=sections.loading_notes(facts.result, facts.config, base),
        origins=sections.made_from(facts.config, origins, facts.licence),
        cost=sections.cost(facts.summary),
        made=sections.made(facts.config, facts.summary),
        configuration=sections.fenced(facts.config_text, "yaml"),
    )
