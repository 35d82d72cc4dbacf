"""What a folder of weights is: the result of a run, or one of the forms that it is exported in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffalign.layout import LORA_FILE, PEFT_CONFIG, PIPELINE_INDEX
from diffalign.origins import read_header

Kind = Literal["pipeline", "adapter", "peft adapter", "adapter file", "checkpoint file"]


@dataclass(frozen=True)
class Result:
    """A folder that plain diffusers (or peft) loads.

    Attributes:
        kind: a pipeline's folder; an adapter as diffusers writes it; one or several of peft's; one file of an adapter
            in another layout (kohya's); one file of a whole checkpoint.
        files: the weights, relative to the folder; of peft adapters, their configurations.
    """

    folder: Path
    kind: Kind
    files: tuple[str, ...]

    @property
    def is_adapter(self) -> bool:
        """It changes a base model, and is none."""
        return self.kind in ("adapter", "peft adapter", "adapter file")

    @property
    def pipeline(self) -> str | None:
        """The diffusers class that a pipeline's folder names."""
        if self.kind != "pipeline":
            return None
        try:
            index = json.loads((self.folder / PIPELINE_INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        name = index.get("_class_name") if isinstance(index, dict) else None
        return name if isinstance(name, str) else None


def find_result(folder: Path) -> Result | None:
    """What `folder` holds; None where it is no result (a run with its checkpoints, a folder of pictures)."""
    if (folder / PIPELINE_INDEX).is_file():
        return Result(folder, "pipeline", (PIPELINE_INDEX,))
    if (folder / LORA_FILE).is_file():
        return Result(folder, "adapter", (LORA_FILE,))
    configs = sorted(file for depth in ("", "*/") for file in folder.glob(depth + PEFT_CONFIG))
    if configs:
        return Result(folder, "peft adapter", tuple(file.relative_to(folder).as_posix() for file in configs))
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1 or (folder / "manifest.json").exists():
        return None
    names = read_header(files[0])
    has_adapter = any(".lora_" in name for name in names)
    return Result(folder, "adapter file" if has_adapter else "checkpoint file", (files[0].name,))
