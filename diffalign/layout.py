"""Names of files in the folders of runs, pipelines and adapters, and which of these folders a path means."""

from __future__ import annotations

from pathlib import Path

FINAL = "final"
"""A run's result, in its folder."""
LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PIPELINE_INDEX = "model_index.json"
PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
"""Of files that can run code when they are opened."""


def result_in(path: Path) -> Path:
    """The result inside a run's folder; any other path as it is."""
    return path / FINAL if (path / FINAL).is_dir() else path


def run_of(path: Path) -> Path:
    """The folder that a `final/` is in; any other path as it is."""
    return path.parent if path.name == FINAL else path


def run_of_step(path: Path) -> Path | None:
    """The run's folder that `checkpoints/step-N` is in; None for any other path."""
    run = path.parent.parent
    is_step = path.name.startswith("step-") and path.parent.name == "checkpoints"
    return run if is_step and (run / "config.yaml").is_file() else None
