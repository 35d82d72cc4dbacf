"""The formats of `diffalign export`, each a function that writes a loaded result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffalign.errors import ConfigError, DiffalignError
from diffalign.exporting.files import require_finite, stamp, write_tensors
from diffalign.exporting.kohya import clip_name, kohya_weights, require_kohya
from diffalign.exporting.metadata import header, kohya_header
from diffalign.exporting.original import original_weights, require_original
from diffalign.exporting.source import Loaded, RunResult, loaded_result
from diffalign.exporting.target import MARK, check_target, target_file, target_folder
from diffalign.layout import LORA_FILE
from diffalign.model_card import write_card
from diffalign.models.lora_updates import merge, peft_config

ONE_FILE = ("kohya", "single-file")
"""Formats that are one file; the others are folders."""


def export_result(
    result: RunResult,
    form: str,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> Loaded:
    """Write `result` to `path` whole, or leave `path` as it was; returns what was written, as loaded.

    A folder gets the model card of a finished run, too.

    Args:
        form: a key of `WRITERS`.
        path: a new file or folder, or with `overwrite` that of an earlier export.
        dtype: of the weights.
        warn: told of a card that could not be written, which is no failure of the export.

    Raises:
        ConfigError: a format that cannot hold this result, or a place that is taken.
        CheckpointError: the result or its base model is missing, damaged, or they do not fit.
        NumericsError: a weight that is too large for `dtype`.
        StorageError: no room, or no permission.
    """
    require_adapters(result, form)
    check_target(path, is_file=form in ONE_FILE, overwrite=overwrite)
    with loaded_result(result) as loaded:
        _require_family(loaded, form)
        with (target_file if form in ONE_FILE else target_folder)(path) as place:
            WRITERS[form](loaded, place, dtype)
            if form not in ONE_FILE:
                _mark(loaded, form, place, dtype)
                _describe(result, place, warn)
        return loaded


def require_adapters(result: RunResult, form: str) -> None:
    """Raise ConfigError for a format of adapters and a run that trained all weights."""
    if form in ("kohya", "peft") and not result.is_lora:
        raise ConfigError(
            f"--format {form} holds LoRA adapters, and this run trained all weights",
            where=str(result.run),
            why="model.lora is null in its config.yaml",
            hint="use --format single-file (ComfyUI, A1111) or merged (diffusers)",
        )


def _require_family(loaded: Loaded, form: str) -> None:
    if form == "kohya":
        require_kohya(loaded.family)
    if form == "single-file":
        require_original(loaded.family)
        changes_encoder = loaded.result.config.model.train_text_encoder or "text_encoder" in loaded.updates
        if loaded.family == "Flux" and changes_encoder:
            raise ConfigError(
                "--format single-file: FLUX.1's file holds the transformer, and this run changed a text encoder too",
                hint="use --format merged or kohya" if loaded.result.is_lora else "use --format merged",
            )


# Adapters


def write_diffusers(loaded: Loaded, folder: Path, dtype: torch.dtype) -> None:
    """LoRA: pytorch_lora_weights.safetensors as the run has it, alpha in its header. Else the pipeline's folder."""
    if not loaded.result.is_lora:
        write_pipeline(loaded, folder, dtype)
        return
    source = loaded.files / LORA_FILE
    encoders: Mapping[str, Any] = loaded.denoiser.encoders
    clips = [name for name, part in encoders.items() if type(part).__name__.startswith("CLIPTextModel")]
    tensors = {_with_text_model(name, clips): value for name, value in load_file(source).items()}
    with safe_open(source, framework="pt") as opened:
        own = dict(opened.metadata() or {})
    write_tensors(folder / LORA_FILE, tensors, dtype, own | header(loaded, original=False, adapter=True))


def _with_text_model(name: str, encoders: list[str]) -> str:
    """The key of a CLIP text encoder's layer as ComfyUI and diffusers of every version read it."""
    network, _, module = name.partition(".")
    return f"{network}.{clip_name(module)}" if network in encoders else name


def write_kohya(loaded: Loaded, file: Path, dtype: torch.dtype) -> None:
    """One file by kohya's names."""
    tensors, sizes = kohya_weights(loaded.family, loaded.updates, loaded.denoiser.networks())
    original = loaded.family != "StableDiffusion"
    told = header(loaded, original=original, adapter=True) | kohya_header(loaded, sizes)
    write_tensors(file, tensors, dtype, told)


def write_peft(loaded: Loaded, folder: Path, dtype: torch.dtype) -> None:
    """A folder a network that `PeftModel.from_pretrained` reads."""
    told = header(loaded, original=False, adapter=True)
    for name, updates in loaded.updates.items():
        (folder / name).mkdir()
        config = peft_config(updates)
        config.base_model_name_or_path = loaded.result.config.model.path
        config.inference_mode = True
        config.save_pretrained(str(folder / name))
        tensors: dict[str, Tensor] = {}
        for module, update in updates.items():
            start = f"base_model.model.{module}.lora_"
            tensors |= {f"{start}A.weight": update.down, f"{start}B.weight": update.up}
            if update.magnitude is not None:
                tensors[f"{start}magnitude_vector"] = update.magnitude
        write_tensors(folder / name / "adapter_model.safetensors", tensors, dtype, told)


# Whole models


def write_pipeline(loaded: Loaded, folder: Path, dtype: torch.dtype) -> None:
    """The pipeline's folder, adapters added to the weights."""
    add_to_weights(loaded)
    for name, network in loaded.denoiser.networks().items():
        if dtype != torch.float32:
            network.to(dtype)
        require_finite(((f"{name}.{key}", value) for key, value in network.state_dict().items()), dtype)
    loaded.pipeline.save_pretrained(folder, safe_serialization=True)
    told = header(loaded, original=False, adapter=False)
    for file in folder.rglob("*.safetensors"):
        stamp(file, told)


def write_single_file(loaded: Loaded, file: Path, dtype: torch.dtype) -> None:
    """One file in the layout of the original checkpoints, adapters added to the weights."""
    add_to_weights(loaded)
    tensors = original_weights(loaded.family, loaded.pipeline)
    write_tensors(file, tensors, dtype, header(loaded, original=True, adapter=False))


def add_to_weights(loaded: Loaded) -> None:
    """Add what a LoRA changes to the weights of the base model, once."""
    networks = loaded.denoiser.networks()
    for name in list(loaded.updates):
        merge(networks[name], loaded.updates.pop(name), 1.0)


WRITERS: dict[str, Callable[[Loaded, Path, torch.dtype], None]] = {
    "diffusers": write_diffusers,
    "kohya": write_kohya,
    "peft": write_peft,
    "merged": write_pipeline,
    "single-file": write_single_file,
}
"""--format -> what writes it: into an empty folder, or a new file."""


def _mark(loaded: Loaded, form: str, folder: Path, dtype: torch.dtype) -> None:
    """What the folder is, for people and for `--overwrite`."""
    told: dict[str, Any] = {
        **header(loaded, original=False, adapter=form in ("diffusers", "peft") and loaded.result.is_lora),
        "format": form,
        "run": loaded.result.name,
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / MARK).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _describe(result: RunResult, folder: Path, warn: Callable[[str], None]) -> None:
    if not result.is_finished:
        return
    try:
        write_card(folder, result.run)
    except Exception as error:  # whatever it is, the weights are what was asked for
        why = error.what if isinstance(error, DiffalignError) else f"{type(error).__name__}: {error}"
        warn(f"no model card in the export: {why}")
