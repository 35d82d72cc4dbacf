"""The run to export: found, checked and loaded, what a LoRA changes apart from the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffalign.assets import resolve
from diffalign.config import AdapterConfig, ModelConfig, Run
from diffalign.config_file import load_config
from diffalign.errors import CheckpointError, ConfigError
from diffalign.exporting.target import writing
from diffalign.layout import FINAL, LORA_FILE, run_of, run_of_step
from diffalign.models.loading import load_denoiser
from diffalign.models.lora_files import read_lora
from diffalign.models.lora_updates import Updates
from diffalign.training.checkpoint import list_checkpoints
from diffalign.training.policies import load_policy


@dataclass(frozen=True)
class RunResult:
    """What a run made, as files.

    Attributes:
        run: the run's folder.
        weights: its final/, or one of its checkpoints.
        config: its config.yaml.
        is_lora: it trained adapters; otherwise all weights of what it trained.
    """

    run: Path
    weights: Path
    config: Run
    is_lora: bool

    @property
    def name(self) -> str:
        """The run's, and of a checkpoint also its step."""
        run = self.run.resolve().name
        return run if self.weights.name == FINAL else f"{run}-{self.weights.name}"

    @property
    def is_finished(self) -> bool:
        """Whether it is what the run ended with, so that there are figures of it."""
        return self.weights.name == FINAL and (self.run / "summary.json").is_file()


@dataclass(frozen=True)
class Loaded:
    """A run's result in memory.

    Attributes:
        denoiser: float32, on the CPU; of a LoRA the base model as it is.
        files: the result as diffusers reads it: a LoRA's file or a pipeline.
        updates: of a LoRA, the pipeline's name of each network that it changes -> how.
    """

    result: RunResult
    denoiser: Any
    files: Path
    updates: dict[str, Updates]

    @property
    def pipeline(self) -> Any:
        return self.denoiser.pipeline

    @property
    def network(self) -> Any:
        """The UNet or transformer."""
        return self.denoiser.network

    @property
    def family(self) -> str:
        """The Denoiser's class, e.g. StableDiffusionXL."""
        return type(self.denoiser).__name__


def find_result(path: str) -> RunResult:
    """The result at a run folder, its final/ or one of its checkpoints. Nothing is loaded.

    Raises:
        ConfigError: no run, or one whose config.yaml is damaged.
        CheckpointError: a run that has no result yet.
    """
    folder = resolve(path)
    step_of = run_of_step(folder)
    run = step_of or run_of(folder)
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{path} is not a run",
            where=str(run / "config.yaml"),
            why="a run's folder has a config.yaml" if run.is_dir() else "there is no such folder",
            hint="name the folder that `diffalign train` wrote, its final/, or one of its checkpoints/step-N",
        )
    config = load_config(run / "config.yaml")
    if step_of is not None:
        return RunResult(run, folder, config, config.model.lora is not None)
    final = run / FINAL
    if not final.is_dir():
        raise _unfinished(run)
    return RunResult(run, final, config, (final / LORA_FILE).is_file())


@contextmanager
def loaded_result(result: RunResult) -> Iterator[Loaded]:
    """Build the model of `result` with what it learned.

    Raises:
        CheckpointError: the base model or the result is missing, damaged, or of another model.
        StorageError: no room for temporary files, which a checkpoint needs.
    """
    with TemporaryDirectory(prefix="diffalign-export-") as folder:
        files = result.weights
        if files.name != FINAL:
            files = Path(folder) / FINAL
            policy = load_policy(str(result.weights), device="cpu")
            with writing(files):
                policy.export(files)
        config = base_config(result.config)
        if not result.is_lora:
            alone = {"path": str(files), "revision": None, "variant": None, "single_file_config": None}
            config = config.model_copy(update=alone)
        denoiser = load_denoiser(config, device="cpu", channels_last=False)
        yield Loaded(result, denoiser, files, _learned(denoiser, files) if result.is_lora else {})


def base_config(config: Run) -> ModelConfig:
    """The model section of a run for its base model alone, in full precision: what its LoRA is added to."""
    alone: dict[str, object] = {"lora": None, "adapters": [], "quantization": None, "vae_dtype": "float32"}
    return config.model.model_copy(update=alone)


def _learned(denoiser: Any, files: Path) -> dict[str, Updates]:
    names = (denoiser.network_name, *denoiser.trained_encoders)
    networks = {name: network for name, network in denoiser.networks().items() if name in names}
    return read_lora(AdapterConfig(path=str(files / LORA_FILE)), denoiser.pipeline, networks)


def _unfinished(run: Path) -> CheckpointError:
    kept = list_checkpoints(run / "checkpoints", cuts=False)
    go_on = f"wait for it, or go on with it: diffalign train {run / 'config.yaml'} --output-dir {run}"
    return CheckpointError(
        f"{run} has no result yet",
        where=str(run / FINAL),
        why="a run writes final/ when it ends",
        hint=go_on + (f"\nor export a checkpoint of it: {kept[-1]}" if kept else ""),
    )
