"""Weight files of rewards: fetched once from their publishers, verified, and read without running code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffalign.assets import resolve
from diffalign.errors import RewardError


@dataclass(frozen=True)
class Published:
    """A file at its publisher. `sha256` pins its content, so the address may be a branch."""

    name: str
    url: str
    sha256: str


def cache_dir() -> Path:
    """$DIFFALIGN_CACHE, else ~/.cache/diffalign (or below $XDG_CACHE_HOME)."""
    own = os.environ.get("DIFFALIGN_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffalign"


def fetch(file: Published) -> Path:
    """The file in the cache, downloaded if it is not there; its hash is checked at every use.

    Raises:
        RewardError: it cannot be downloaded (with the place to put it by hand), or is not the pinned file.
    """
    path = cache_dir() / "rewards" / file.name
    if not path.is_file():
        _download(file, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != file.sha256:
        raise RewardError(
            f"{file.name} is not the file that its publisher released",
            where=str(path),
            why=f"SHA-256 {found}, expected {file.sha256}",
            hint=f"remove it; it is fetched again from {file.url}",
        )
    return path


def _download(file: Published, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(file.url, str(path), hash_prefix=file.sha256, progress=False)
    except (OSError, RuntimeError) as error:
        raise RewardError(
            f"the weights {file.name} are missing and cannot be downloaded",
            where=file.url,
            why=f"{type(error).__name__}: {error}",
            hint=f"download the file elsewhere and put it at {path}",
        ) from error


def fetch_hub(repository: str, names: Sequence[str]) -> Path:
    """The first of these files that a Hugging Face repository has; no network is touched once it is cached.

    Raises:
        RewardError: not cached and the hub cannot be reached (said at once, without the hub's retries), or
            the repository has none of the files.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        cached = hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    wanted = f"{repository}, {names[0]}"
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=15)
        for name in names:
            with contextlib.suppress(EntryNotFoundError):
                return Path(hub.hf_hub_download(repository, name))
    except Exception as error:
        raise RewardError(
            f"the weights {wanted} are not cached and cannot be downloaded",
            where=f"{hub.constants.ENDPOINT}, cache {hub.constants.HF_HUB_CACHE}",
            why=f"{type(error).__name__}: {error}".split("\n")[0],
            hint=f"with a network: hf download {repository}; or give a local copy as `checkpoint: FOLDER`",
        ) from error
    raise RewardError(f"{repository} has none of {', '.join(names)}", where=hub.constants.ENDPOINT)


def local_path(path: str, what: str) -> Path:
    """An existing local file or folder, `bundled:` names included."""
    found = Path(resolve(path)).expanduser().resolve()
    if not found.exists():
        raise RewardError(f"{what} does not exist", where=str(found))
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from .safetensors, or from a .pth that holds nothing but tensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise RewardError(
            "the weights cannot be read",
            where=str(path),
            why=str(error).split("\n")[0] or type(error).__name__,
            hint="the file may be truncated, or be a pickle with more than tensors in it (never loaded)",
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise RewardError("the weights are no dictionary of tensors", where=str(path))
    return tensors
