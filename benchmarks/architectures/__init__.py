"""Published sizes of full-size models, by name: the configuration files that an architecture is built from.

Each JSON file here maps the names of a diffusers folder's files to what is in them: sizes and schedules only, of
stabilityai/stable-diffusion-xl-base-1.0, stable-diffusion-3.5-medium and black-forest-labs/FLUX.1-dev.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent


def architectures() -> list[str]:
    """The names there are."""
    return sorted(file.stem for file in HERE.glob("*.json"))


def write_architecture(name: str, folder: Path) -> Path:
    """Write the configuration files of a model into `folder`, and return it: a checkpoint without weights."""
    for path, settings in json.loads((HERE / f"{name}.json").read_text(encoding="utf-8")).items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return folder
