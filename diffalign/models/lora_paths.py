"""Where a LoRA's file is: by itself, in a folder, in a finished run, on the hub. Only safetensors are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffalign.assets import resolve
from diffalign.config import AdapterConfig
from diffalign.errors import CheckpointError, first_line
from diffalign.layout import FINAL, LORA_FILE, PEFT_CONFIG, PEFT_FILE, PICKLE_SUFFIXES, PIPELINE_INDEX

_CONVERT = (
    'convert it once where you trust it: python -c "import torch; from safetensors.torch import save_file; '
    "t = torch.load('lora.bin', weights_only=True); save_file({k: v.contiguous() for k, v in t.items()}, "
    "'lora.safetensors')\""
)


@dataclass(frozen=True)
class LoraSource:
    """A file with a LoRA's weights; `given` is what the user calls it."""

    given: str
    file: Path

    @property
    def is_peft(self) -> bool:
        """PEFT's own format, whose settings are in a file beside it."""
        return (self.file.parent / PEFT_CONFIG).is_file() and self.file.name == PEFT_FILE


def find_lora(config: AdapterConfig) -> LoraSource:
    """The file that an adapter's configuration means.

    Raises:
        CheckpointError: nothing there, a pickle, a whole model, or several files to choose from.
    """
    path = resolve(config.path)
    if path.is_file():
        _refuse_pickle(config.path, path.name)
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{config.path} is not a .safetensors file", where=str(path))
        return LoraSource(config.path, path)
    if path.is_dir():
        return LoraSource(config.path, _in_folder(config, path))
    return LoraSource(config.path, _on_hub(config))


def _in_folder(config: AdapterConfig, folder: Path) -> Path:
    final = folder / FINAL
    folder = final if final.is_dir() and (folder / "config.yaml").is_file() else folder
    if (folder / PIPELINE_INDEX).is_file():
        raise CheckpointError(
            f"{config.path} is a whole model, not an adapter",
            where=str(folder),
            hint="give it as model.path; a run that trained all weights has no adapter",
        )
    return folder / _choose(config, [file.name for file in sorted(folder.iterdir())], str(folder))


def _choose(config: AdapterConfig, names: Sequence[str], where: str) -> str:
    """The LoRA among the files of a folder or repository."""
    if config.weight_name is not None:
        _refuse_pickle(config.path, config.weight_name)
        if config.weight_name in names:
            return config.weight_name
        raise CheckpointError(
            f"{config.path} has no {config.weight_name}", where=where, why=f"there are {', '.join(names)}"
        )
    for usual in (LORA_FILE, PEFT_FILE):
        if usual in names:
            return usual
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{config.path} holds several files",
            where=where,
            why=", ".join(found[:8]),
            hint="name one: weight_name in model.adapters",
        )
    for name in names:
        _refuse_pickle(config.path, name)
    raise CheckpointError(f"{config.path} holds no LoRA", where=where, why="no .safetensors file is there")


def _refuse_pickle(given: str, name: str) -> None:
    if PurePosixPath(name).suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{given} is a pickle file, which can run code when it is opened", where=name, hint=_CONVERT
        )


def _on_hub(config: AdapterConfig) -> Path:
    parts = config.path.split("/")
    if config.path.startswith((".", "/", "~")) or len(parts) != 2 or not all(parts):
        raise CheckpointError(
            f"{config.path} does not exist",
            where=f"model.adapters: {config.path}",
            hint="give a .safetensors file, a folder with one, a finished run, or a hub id",
        )
    from huggingface_hub import HfApi, hf_hub_download

    try:
        names = HfApi().list_repo_files(config.path, revision=config.revision)
        chosen = _choose(config, names, config.path)
        if chosen == PEFT_FILE:
            hf_hub_download(config.path, PEFT_CONFIG, revision=config.revision)
        return Path(hf_hub_download(config.path, chosen, revision=config.revision))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{config.path} is neither a local path nor a hub repository that can be read",
            where=f"model.adapters: {config.path}"
            + (f", revision {config.revision}" if config.revision else ""),
            why=first_line(error),
            hint="check the spelling and the network; a gated model needs `hf auth login`",
        ) from error
