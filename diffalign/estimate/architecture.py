"""The networks of a checkpoint without their weights: built on the meta device from its configuration files.

A local folder needs model_index.json and the config.json of each part; of a hub id only these files are fetched.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BatchEncoding

from diffalign.assets import resolve
from diffalign.config import ModelConfig
from diffalign.config_file import load_config
from diffalign.errors import CheckpointError, first_line
from diffalign.layout import LORA_FILE, PIPELINE_INDEX, result_in
from diffalign.models.diffusers_denoiser import DiffusersDenoiser
from diffalign.models.families import require_supported

META = torch.device("meta")
LIBRARIES = {"diffusers": ("ModelMixin", "SchedulerMixin"), "transformers": ("PreTrainedModel",)}
"""Library that a part may come from -> the base classes that it may have there."""


class MetaTokenizer:
    """As much of a tokenizer as families ask for: every prompt has the full length, and no token a value."""

    padding_side = "right"

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, texts: list[str], *, max_length: int | None = None, **_: Any) -> BatchEncoding:
        shape = (len(texts), max_length or self.model_max_length)
        ids = torch.empty(shape, dtype=torch.int64, device=META)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.empty_like(ids)})

    def encode(self, text: str) -> list[int]:
        """About four characters a token, as in English."""
        return [0] * -(-len(text) // 4)

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        """The family pads or cuts it to its own length."""
        return ""


class Configuration:
    """The configuration files of a checkpoint.

    Args:
        config: of the run. A run's folder, or its `final/`, stands for the model that it made.

    Raises:
        CheckpointError: nothing there, or no diffusers layout.
    """

    def __init__(self, config: ModelConfig) -> None:
        folder = result_in(resolve(config.path))
        while (folder / LORA_FILE).is_file() and (folder.parent / "config.yaml").is_file():
            config = load_config(folder.parent / "config.yaml").model
            folder = result_in(resolve(config.path))
        self.path, self.revision = config.path, config.revision
        self._is_single_file = folder.is_file()
        if self._is_single_file:
            if config.single_file_config is None:
                raise CheckpointError(
                    f"{config.path} is a single file, which has no configuration to estimate from",
                    hint="give model.single_file_config: a folder or hub id with the configuration of its base model",
                )
            self.path, self.revision = config.single_file_config, None
            folder = resolve(self.path)
        self.folder = folder if folder.is_dir() else None
        if self.folder is None and (self.path.startswith((".", "/", "~")) or self.path.count("/") != 1):
            raise CheckpointError(
                f"{self.path} does not exist",
                where=f"model.path = {config.path}",
                hint="give a diffusers folder (its configuration files are enough), a hub id, or bundled:tiny-sd",
            )

    def file(self, name: str) -> Path:
        """Where the file `name` (unet/config.json) is; of a hub id it is fetched."""
        if self.folder is not None:
            return self.folder / name
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.path, name, revision=self.revision))
        except Exception as error:
            raise CheckpointError(
                f"{self.path} is neither a local path nor a hub model that can be read",
                where=name,
                why=first_line(error),
                hint="check the spelling and the network; a gated model needs `hf auth login`",
            ) from error

    def read(self, name: str) -> dict[str, Any]:
        """The settings in the file `name`. Raises CheckpointError where it is missing or no JSON object."""
        file = self.file(name)
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            missing = isinstance(error, OSError)
            raise CheckpointError(
                f"{self.path} lacks {name}" if missing else f"{name} of {self.path} is not JSON",
                where=str(file),
                why=None if missing else first_line(error),
                hint="an estimate needs model_index.json and the configuration of every part, but no weights",
            ) from error
        if not isinstance(settings, dict):
            raise CheckpointError(
                f"{name} of {self.path} is no configuration", where=str(file), why="not an object"
            )
        return settings

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to measure with; a hub id is taken to have them."""
        if self._is_single_file or self.folder is None:
            return True
        return any(self.folder.glob("*/*.safetensors"))


def family_and_pipeline(config: ModelConfig, files: Configuration) -> tuple[type[DiffusersDenoiser], Any]:
    """The family of a checkpoint, and its pipeline with every network on the meta device.

    Raises:
        CheckpointError: of no supported family, a part that is missing, or one whose configuration builds nothing.
    """
    index = files.read(PIPELINE_INDEX)
    family = require_supported(index.get("_class_name"), config, files.file(PIPELINE_INDEX))
    parts: dict[str, Any] = {
        name: _part(files, name, index.get(name))
        for name in ("scheduler", family.network_name, "vae", *family.encoder_names)
    }
    for name in family.encoder_names:
        settings = getattr(parts[name], "config", None)
        length = getattr(settings, "max_position_embeddings", None) or 512
        parts[name.replace("text_encoder", "tokenizer")] = (
            None if parts[name] is None else MetaTokenizer(length)
        )
    wanted = inspect.signature(family.pipeline_class.__init__).parameters
    scalars = {name: value for name, value in index.items() if name in wanted and not isinstance(value, list)}
    options = {name: value for name, value in family.load_options.items() if name in wanted}
    try:
        return family, family.pipeline_class(**{**scalars, **options, **parts})
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"the parts of {files.path} make no {index.get('_class_name')}", why=first_line(error)
        ) from error


def _part(files: Configuration, name: str, named: Any) -> Any:
    """A network on the meta device, or a scheduler; None where the index leaves it out."""
    if named in (None, [None, None]):
        return None
    library, kind = named if isinstance(named, list) and len(named) == 2 else (None, None)
    if library not in LIBRARIES:
        raise CheckpointError(
            f"the {name} of {files.path} comes from a library that checkpoints may not name",
            where=str(files.file(PIPELINE_INDEX)),
            why=f"{named}; known are {', '.join(LIBRARIES)}",
        )
    module = importlib.import_module(library)
    found = getattr(module, str(kind), None)
    bases = tuple(getattr(module, base) for base in LIBRARIES[library] if hasattr(module, base))
    if not (inspect.isclass(found) and issubclass(found, bases)):
        raise CheckpointError(
            f"the {name} of {files.path} is a {kind}, which the installed {library} has no network for",
            hint=f"a newer {library} may have it",
        )
    settings = files.read(f"{name}/{'scheduler_config' if name == 'scheduler' else 'config'}.json")
    try:
        return _built(found, settings, of_transformers=library == "transformers")
    except Exception as error:  # whatever a class raises for settings that it was not made for
        raise CheckpointError(
            f"the configuration of the {name} of {files.path} builds no {kind}",
            where=str(files.file(f"{name}/config.json")),
            why=f"{type(error).__name__}: {first_line(error)}",
            hint="take the configuration files of the base model as they were published",
        ) from error


def _built(kind: Any, settings: dict[str, Any], *, of_transformers: bool) -> Any:
    if not issubclass(kind, nn.Module):
        return kind.from_config(settings)
    with META:
        return kind(kind.config_class.from_dict(settings)) if of_transformers else kind.from_config(settings)
