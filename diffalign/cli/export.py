"""Write what a run learned in the format of another tool.

  diffusers    LoRA: pytorch_lora_weights.safetensors, which load_lora_weights reads; else the pipeline's folder
  kohya        LoRA in one file, for ComfyUI, A1111, Forge, SD.Next, InvokeAI
  peft         LoRA as PEFT adapters, a folder a network
  merged       the base model with what the run learned added to its weights, as a diffusers folder
  single-file  the same as one .safetensors in the layout of the original checkpoint, for ComfyUI, A1111 and others

A run that trained all weights has no LoRA: diffusers, merged and single-file are for it. RUN is a run's folder, its
final/, or one of its checkpoints. Every file says in its header how it came about; nothing half-written is left behind.

examples:
  diffalign export runs/ddpo --format kohya
  diffalign export runs/ddpo --format kohya --dtype float16 --output ~/ComfyUI/models/loras/ddpo.safetensors
  diffalign export runs/ddpo/checkpoints/step-40 --format diffusers --output step-40
  diffalign export runs/full --format single-file --dtype float16 --overwrite
  diffalign export runs/ddpo --format kohya --push me/sd15-ddpo
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from diffalign.cli.push import push_export
from diffalign.cli.sampling_args import optional
from diffalign.layout import FINAL, run_of

if TYPE_CHECKING:
    from diffalign.exporting.source import Loaded, RunResult


@dataclass(frozen=True)
class Args:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, its final/, or one of its checkpoints/step-N."""
    format: Literal["diffusers", "kohya", "peft", "merged", "single-file"]
    """See above."""
    output: Annotated[Path | None, optional("PATH")] = None
    """The new folder, or the .safetensors file (kohya, single-file). Default: in the run's folder, below export/."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the weights in the files."""
    overwrite: bool = False
    """Replace an earlier export. Anything else is never replaced."""
    push: Annotated[str | None, optional("REPO_ID")] = None
    """Then push it to OWNER/NAME on the hub, as `diffalign push` does. A push that fails is a warning."""


def run(args: Args) -> None:
    """Writes the export, and says where it is and how to load it.

    Raises:
        DiffalignError: no run, no result yet, a format that cannot hold it, or a place that is taken.
    """
    from rich.console import Console

    from diffalign.exporting.files import DTYPES
    from diffalign.exporting.formats import ONE_FILE, export_result
    from diffalign.exporting.source import find_result
    from diffalign.hub import require_name

    if args.push is not None:
        require_name(args.push)
    result = find_result(args.run)
    path = default_path(result, args.format, args.format in ONE_FILE) if args.output is None else args.output
    path = path.expanduser()
    loaded = export_result(
        result,
        args.format,
        path,
        dtype=DTYPES[args.dtype],
        overwrite=args.overwrite,
        warn=lambda text: print(f"warning: {text}", file=sys.stderr),
    )
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{path}  {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB")
    for line in how_to_load(loaded, args.format, path):
        console.print(line)
    if args.push is not None:
        push_export(path, args.push, result.run if result.is_finished else None)


def default_path(result: RunResult, form: str, is_file: bool) -> Path:
    """RUN/export/FORMAT, or RUN/export/NAME.safetensors."""
    folder = result.run / "export"
    step = "" if result.weights.name == FINAL else f"-{result.weights.name}"
    if not is_file:
        return folder / f"{form}{step}"
    return folder / f"{result.name}{'-lora' if form == 'kohya' else ''}.safetensors"


def how_to_load(loaded: Loaded, form: str, path: Path) -> list[str]:
    """Lines for the terminal, a tool each."""
    from diffalign.model_card.loading_code import LORA_LOADERS

    pipeline, place = type(loaded.pipeline).__name__, str(path.resolve())
    base, is_run = base_model(loaded)
    if form == "single-file" and loaded.family == "Flux":
        return [
            f"diffusers    transformer = FluxTransformer2DModel.from_single_file({place!r})",
            f"             {pipeline}.from_pretrained({base!r}, transformer=transformer)",
            "ComfyUI      models/diffusion_models, then the node Load Diffusion Model",
        ]
    if form == "single-file":
        return [
            f"diffusers    {pipeline}.from_single_file({place!r})",
            "ComfyUI      models/checkpoints, then the node Load Checkpoint",
            "A1111        models/Stable-diffusion",
        ]
    if form == "merged" or (form == "diffusers" and not loaded.result.is_lora):
        return [f"diffusers    {pipeline}.from_pretrained({place!r})"]
    head = f"             (with pipeline = {pipeline}.from_pretrained({base!r}))"
    if is_run:
        head = "             (with pipeline = its base model, the result of a run: export that with --format merged)"
    if form == "peft":
        names = ", ".join(sorted(loaded.updates))
        return [
            f"peft         PeftModel.from_pretrained(pipeline.NAME, {place + '/NAME'!r}) for {names}",
            head,
        ]
    if form == "diffusers":
        loader = LORA_LOADERS.get(pipeline)
        whose = (
            [f"             (from {loader} import {pipeline}; diffusers' own loads no LoRA)"]
            if loader
            else []
        )
        return [f"diffusers    pipeline.load_lora_weights({place!r})", head, *whose]
    tools = [
        "ComfyUI      models/loras, then the node Load LoRA",
        "A1111        models/Lora, then <lora:" + path.stem + ":1> in the prompt",
    ]
    if loaded.family == "StableDiffusion3":
        return [*tools, "diffusers    does not read kohya's layout of SD 3: use --format diffusers"]
    return [f"diffusers    pipeline.load_lora_weights({place!r})", head, *tools]


def base_model(loaded: Loaded) -> tuple[str, bool]:
    """What a LoRA is added to, as diffusers is told of it, and whether that is the result of a run."""
    from diffalign.assets import resolve

    path = loaded.result.config.model.path
    place = resolve(path)
    folder = run_of(place)
    return str(place.resolve()) if place.exists() else path, (folder / "config.yaml").is_file()
