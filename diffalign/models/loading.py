"""From a path in the configuration to a `Denoiser`: folders, hub ids, single files, finished runs.

Only safetensors are read: pickle files can run code. Every refusal says what to do instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffalign.assets import resolve
from diffalign.config import AdapterConfig, ModelConfig
from diffalign.config.sizes import Resolution
from diffalign.errors import CheckpointError, DeviceError, first_line
from diffalign.layout import FINAL, LORA_FILE, PICKLE_SUFFIXES, PIPELINE_INDEX, result_in, run_of_step
from diffalign.models.base import Denoiser
from diffalign.models.diffusers_denoiser import DiffusersDenoiser
from diffalign.models.families import family_of, pipeline_of_file
from diffalign.models.lora import TRAINED
from diffalign.models.lora_files import read_lora
from diffalign.models.lora_updates import merge, put_on
from diffalign.models.pipeline_folder import load_parts
from diffalign.models.single_file import load_single_file

COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda".

    Raises:
        DeviceError: "cuda" was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "training.device: cuda was asked for, but PyTorch sees no CUDA device",
            why=f"torch {torch.__version__}, torch.cuda.is_available() is False",
            hint="run `diffalign doctor`, install a CUDA build and driver, or use --training.device cpu",
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_compute_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """The type for "no", "bf16" or "fp16". Raises DeviceError for fp16 without a GPU."""
    if mixed_precision == "fp16" and device.type == "cpu":
        raise DeviceError(
            "training.mixed_precision: fp16 needs a GPU", hint="use bf16 or no on the CPU", where=str(device)
        )
    return COMPUTE_DTYPES[mixed_precision]


def load_denoiser(
    config: ModelConfig,
    *,
    device: str | torch.device = "cpu",
    mixed_precision: str = "no",
    channels_last: bool = True,
    trainable: bool = False,
    seed: int = 0,
) -> DiffusersDenoiser:
    """Build the model of a run.

    Raises:
        CheckpointError: nothing there, not safetensors, damaged, or of no supported family.
        DeviceError: fp16 without a GPU.
    """
    device = pick_device(device) if isinstance(device, str) else device
    compute_dtype = pick_compute_dtype(mixed_precision, device)
    pipeline = load_pipeline(config)
    return family_of(type(pipeline).__name__)(
        pipeline,
        config,
        device=device,
        compute_dtype=compute_dtype,
        channels_last=channels_last,
        trainable=trainable,
        seed=seed,
    )


def load_for_inference(
    path: str,
    *,
    device: str = "auto",
    mixed_precision: str = "no",
    resolution: Resolution | None = None,
    adapters: Sequence[AdapterConfig] = (),
) -> Denoiser:
    """A model to sample from: whatever `ModelConfig.path` takes, a run folder, or a run's `final/`.

    Args:
        resolution: size of the pictures. Default: the run's, or what the checkpoint was trained for.
        adapters: LoRAs to add to it, besides what a run learned.
    """
    final = result_in(resolve(path))
    config = ModelConfig(path=path, lora=None, adapters=list(adapters))
    if (final / LORA_FILE).is_file():  # which holds the run's own adapters, too
        config = _base_of(final).model_copy(update={"path": path, "lora": None, "adapters": list(adapters)})
    elif final.name == FINAL and (final.parent / "config.yaml").is_file() and resolution is None:
        resolution = _base_of(final).resolution  # a checkpoint itself only knows that of square pictures
    if resolution is not None:
        config = config.model_copy(update={"resolution": resolution})
    if config.quantization is None:
        return load_denoiser(config, device=device, mixed_precision=mixed_precision)
    config = config.model_copy(update={"path": _base_of(final).path})
    denoiser = load_denoiser(config, device=device, mixed_precision=mixed_precision)
    _fuse_adapter(
        denoiser.pipeline, final / LORA_FILE, beside=True
    )  # the weights that it was trained on are rounded
    return denoiser


def family_at(path: str) -> type[DiffusersDenoiser] | None:
    """The family of what `load_for_inference` loads from `path`, by its index or the names of its weights alone.

    None where they do not say it: what is wrong is for loading to find.
    """
    from huggingface_hub import hf_hub_download

    place = result_in(resolve(path))
    try:
        if (run := run_of_step(place)) is not None:
            return family_at(_base_of(run / FINAL).path)
        if (place / LORA_FILE).is_file():
            return family_at(_base_of(place).path)
        if place.is_file():
            return family_of(pipeline_of_file(place, ModelConfig(path=path)))
        index = place / PIPELINE_INDEX if place.exists() else Path(hf_hub_download(path, PIPELINE_INDEX))
        return family_of(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except Exception:  # of a hub that cannot be reached, a damaged file, another kind of model
        return None


def _fuse_adapter(pipeline: Any, file: Path, *, beside: bool = False) -> None:
    """Add a LoRA to the pipeline's weights, or put it on them as it is (`beside`).

    Raises:
        CheckpointError: a file that is damaged or of another model.
    """
    family = family_of(type(pipeline).__name__)
    parts = {name: getattr(pipeline, name) for name in (family.network_name, *family.trained_encoders)}
    networks = {name: network for name, network in parts.items() if network is not None}
    for name, updates in read_lora(AdapterConfig(path=str(file)), pipeline, networks).items():
        if beside:
            put_on(networks[name], updates, TRAINED)
            networks[name].requires_grad_(False)
        else:
            merge(networks[name], updates, 1.0)


def _base_of(final: Path) -> ModelConfig:
    """The model section of the run that `final` belongs to."""
    from diffalign.config_file import load_config

    run_config = final.parent / "config.yaml"
    if not run_config.is_file():
        raise CheckpointError(
            f"{final} holds LoRA weights, but not the name of their base model",
            where=str(run_config),
            why="a LoRA changes a base model, which the run's config.yaml names",
            hint="keep final/ inside its run folder",
        )
    return load_config(run_config).model


def load_pipeline(config: ModelConfig) -> Any:
    """The diffusers pipeline at `config.path`, float32, without safety checker.

    A run folder, or its final/, is what the run made: a later run starts from there.

    Raises:
        CheckpointError: nothing there, not safetensors, damaged, or of no supported family.
    """
    if (
        os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == "1"
    ):  # one switch for the bars of all three libraries
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    path = result_in(resolve(config.path))
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{config.path} is a pickle checkpoint, which can run code when it is opened",
            hint="convert it once where you trust it, with diffusers: StableDiffusionPipeline.from_single_file(path)"
            ".save_pretrained(folder, safe_serialization=True)",
        )
    try:
        if (path / LORA_FILE).is_file():
            return _with_lora(path)
        if path.is_file():
            return load_single_file(path, config)
        return load_parts(path, config)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"cannot load a checkpoint from {config.path}",
            where=str(path),
            why=first_line(error),
            hint="a truncated or mixed-up file looks like this: download it again, or try `diffalign doctor`",
        ) from error
    except ImportError as error:
        raise CheckpointError(
            f"{config.path} needs a package that is not there",
            where=str(path),
            why=first_line(error),
            hint="weights that are stored quantised do: give the plain checkpoint, with model.quantization",
        ) from error
    except Exception as error:
        if "safetensor" not in type(error).__name__.lower():
            raise
        raise CheckpointError(
            f"a weight file of {config.path} is damaged",
            why=first_line(error),
            hint="download or export it again",
        ) from error


def _with_lora(final: Path) -> Any:
    """The base model of a LoRA run with what the run learned added to its weights."""
    pipeline = load_pipeline(_base_of(final))
    _fuse_adapter(pipeline, final / LORA_FILE)
    return pipeline
