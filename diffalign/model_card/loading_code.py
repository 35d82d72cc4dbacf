"""The Python that loads a result with plain diffusers and draws as the run was evaluated."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from diffalign.assets import BUNDLED
from diffalign.config import ModelConfig, Run
from diffalign.config.sizes import as_size
from diffalign.layout import FINAL
from diffalign.model_card.result import Result
from diffalign.origins import BaseModel

ANY_PIPELINE = "DiffusionPipeline"
_SCHEDULERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}
"""Kernel -> diffusers' scheduler. Flow models keep their own, which is Euler's."""
_NETWORK_ALONE = {"FluxPipeline": "FluxTransformer2DModel"}
"""Pipelines whose single file is the denoising network without the rest."""
LORA_LOADERS = {"PixArtSigmaPipeline": "diffalign.models.pixart_sigma"}
"""Pipelines of diffusers that cannot load a LoRA -> where there is one that can."""
_AS_GIVEN = {
    "PixArtSigmaPipeline": ["use_resolution_binning=False", "clean_caption=False"],
    "SanaPipeline": ["use_resolution_binning=False"],
}
"""What keeps a pipeline from changing the size and the prompt that it is given."""
_ADD_TO_CONDITIONAL = ("ZImagePipeline",)
"""Pipelines whose guidance_scale g means cond + g (cond - uncond): one less than everywhere else."""


def loading_code(result: Result, config: Run, base: BaseModel | None) -> str:
    """A few lines that run where `result` is the working folder and the base model is to be had.

    Args:
        base: what the run started from; None where it is not known.
    """
    pipeline = result.pipeline or (base.pipeline if base is not None else ANY_PIPELINE)
    lines = _weights(result, config, base, pipeline)
    scheduler = _SCHEDULERS.get(config.evaluation.sampler.kind)
    if scheduler is not None:
        options = ", ".join(["pipeline.scheduler.config", "clip_sample=False", *_overrides(config.model)])
        lines.append(f"pipeline.scheduler = {scheduler}.from_config({options})")
    lines.append(f'picture = pipeline("a prompt", {_drawn_as_evaluated(config, pipeline)}).images[0]')
    return "\n".join([*_imports(result, pipeline, scheduler, lines), "", *lines])


def _imports(result: Result, pipeline: str, scheduler: str | None, lines: list[str]) -> list[str]:
    names = {pipeline, *(network for network in _NETWORK_ALONE.values() if network in lines[0])}
    if scheduler is not None:
        names.add(scheduler)
    found = []
    if any("resolve(" in line for line in lines):
        found.append("from diffalign.assets import resolve")
    if pipeline in LORA_LOADERS and result.kind in ("adapter", "adapter file"):
        names.remove(pipeline)
        found.append(f"from {LORA_LOADERS[pipeline]} import {pipeline}")
    if names:
        found.append(f"from diffusers import {', '.join(sorted(names))}")
    if result.kind == "peft adapter":
        found.append("from peft import PeftModel")
    return found


def _weights(result: Result, config: Run, base: BaseModel | None, pipeline: str) -> list[str]:
    (first, *_) = result.files
    match result.kind:
        case "pipeline":
            return [f'pipeline = {pipeline}.from_pretrained(".")  # this folder, or its id on the hub']
        case "checkpoint file":
            return _single_file(first, base, pipeline)
        case "adapter":
            adapter = ['pipeline.load_lora_weights(".")  # this folder, or its id on the hub']
        case "adapter file":
            adapter = [f'pipeline.load_lora_weights(".", weight_name={quoted(first)})']
        case "peft adapter":
            places = [PurePosixPath(file).parent for file in result.files]
            adapter = [
                f'pipeline.{place} = PeftModel.from_pretrained(pipeline.{place}, "{place}")'
                for place in places
            ]
    if base is None:
        return [f"pipeline = {pipeline}.from_pretrained({quoted(config.model.path)})", *adapter]
    return [*_base(base), *adapter]


def _single_file(file: str, base: BaseModel | None, pipeline: str) -> list[str]:
    """A whole checkpoint; of FLUX.1 the transformer alone, beside which its base model gives the rest."""
    root = _place(base.root) if base is not None else None
    if pipeline in _NETWORK_ALONE and root is not None:
        network = f"{_NETWORK_ALONE[pipeline]}.from_single_file({quoted(file)})"
        return [f"pipeline = {pipeline}.from_pretrained({root}, transformer={network})"]
    has_parts = root is not None and not root.endswith('.safetensors"')
    config = f", config={root}" if has_parts else ""
    return [f"pipeline = {pipeline}.from_single_file({quoted(file)}{config})"]


def _base(base: BaseModel) -> list[str]:
    """Where the base is itself an adapter of a run, that is added to the weights first."""
    path = base.files.path
    if base.is_lora:
        below = (
            _base(base.trained_from) if base.trained_from is not None else ["# its base model is not known"]
        )
        merge = ["pipeline.fuse_lora()", "pipeline.unload_lora_weights()"]
        return [*below, f"pipeline.load_lora_weights({quoted(_result_of(base))})", *merge]
    options = []
    if base.commit is not None:
        options.append(f"revision={quoted(base.commit)}")
    if base.variant is not None:
        options.append(f"variant={quoted(base.variant)}")
    load = "from_pretrained"
    if path.endswith(".safetensors"):
        load = "from_single_file"
        where = base.single_file_config
        options = [f"config={quoted(where)}"] if where is not None else []
    return [f"pipeline = {base.pipeline}.{load}({', '.join([_place(base), *options])})"]


def quoted(text: str) -> str:
    """A string as Python's source has it, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _place(base: BaseModel) -> str:
    """Where a base model is, as Python."""
    path = quoted(_result_of(base))
    return f"resolve({path})" if base.files.path.startswith(BUNDLED) else path


def _result_of(base: BaseModel) -> str:
    """The path of a base; of a run's folder, that of its result."""
    path = base.files.path
    is_run = base.trained_from is not None or base.is_lora
    return path if not is_run or PurePosixPath(path).name == FINAL else f"{path.rstrip('/')}/{FINAL}"


def _overrides(model: ModelConfig) -> list[str]:
    """What the run changed about the checkpoint's noise levels, as arguments of a scheduler."""
    found = []
    if model.prediction_type is not None:
        found.append(f'prediction_type="{model.prediction_type}"')
    if model.zero_terminal_snr is not None:
        found.append(f"rescale_betas_zero_snr={model.zero_terminal_snr}")
    if model.zero_terminal_snr:
        found.append('timestep_spacing="trailing"')
    return found


def _drawn_as_evaluated(config: Run, pipeline: str) -> str:
    sampler, side = config.evaluation.sampler, config.model.resolution
    options = [f"num_inference_steps={sampler.steps}"]
    scale = sampler.guidance_scale - 1 if pipeline in _ADD_TO_CONDITIONAL else sampler.guidance_scale
    options.append(f"guidance_scale={scale:g}")
    if sampler.kind == "ddim" and sampler.eta:
        options.append(f"eta={sampler.eta}")
    if side is not None:
        height, width = as_size(side)
        options.append(f"height={height}, width={width}")
    return ", ".join([*options, *_AS_GIVEN.get(pipeline, [])])
