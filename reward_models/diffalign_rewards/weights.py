"""Weight files of rewards: fetched once from their publishers, verified, and read without running code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
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


@dataclass(frozen=True)
class HubFile:
    """A file of a Hugging Face repository, pinned by commit and content."""

    repository: str
    name: str
    revision: str
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
    verify(path, file.sha256, hint=f"remove it; it is fetched again from {file.url}")
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


def verify(path: Path, sha256: str, *, hint: str) -> None:
    """Raises RewardError, with the hint, where the file's content is not the pinned one."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise RewardError(
            f"{path.name} is not the file that its publisher released",
            where=str(path),
            why=f"SHA-256 {found}, expected {sha256}",
            hint=hint,
        )


# --- the Hugging Face hub -----------------------------------------------------------------------------------


def fetch_pinned(file: HubFile) -> Path:
    """The file in the hub's cache, downloaded if it is not there; its hash is checked at every use.

    Raises:
        RewardError: as `fetch_hub`, or it is not the pinned file.
    """
    path = fetch_hub(file.repository, [file.name], file.revision)
    verify(path, file.sha256, hint=f"remove it; it is fetched again from {file.repository}")
    return path


def fetch_hub(repository: str, names: Sequence[str], revision: str | None = None) -> Path:
    """The first of these files that a Hugging Face repository has; no network is touched once it is cached.

    Raises:
        RewardError: not cached and the hub cannot be reached (said at once, without the hub's retries), or
            the repository has none of the files.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        cached = hub.try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    try:
        _require_hub()
        for name in names:
            with contextlib.suppress(EntryNotFoundError):
                return Path(hub.hf_hub_download(repository, name, revision=revision))
    except Exception as error:
        raise _unreachable(repository, names[0], names[0] + _commit(revision), error) from error
    raise RewardError(f"{repository} has none of {', '.join(names)}", where=hub.constants.ENDPOINT)


def fetch_hub_folder(
    repository: str, revision: str | None, kinds: Sequence[str], needs: str, option: str = "checkpoint"
) -> Path:
    """The folder in the hub's cache with the files of a repository that match one of `kinds` (globs).

    It counts as complete when a file matches `needs`; no network is touched then. `option` takes a local copy.

    Raises:
        RewardError: as `fetch_hub`, and no file matches `needs`.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError):
        cached = Path(hub.snapshot_download(repository, revision=revision, local_files_only=True))
        if any(cached.glob(needs)):
            return cached
    try:
        _require_hub()
        folder = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(kinds)))
    except Exception as error:
        command = " ".join(f"--include '{kind}'" for kind in kinds) + _commit(revision)
        raise _unreachable(repository, needs, command, error, option) from error
    if not any(folder.glob(needs)):
        raise RewardError(
            f"{repository} has no {needs}",
            where=hub.constants.ENDPOINT,
            hint="only safetensors are read; a pickle can run code when it is loaded",
        )
    return folder


def _require_hub() -> None:
    import huggingface_hub as hub

    hub.get_session().head(hub.constants.ENDPOINT, timeout=15)


def _unreachable(
    repository: str, name: str, command: str, error: Exception, option: str = "checkpoint"
) -> RewardError:
    import huggingface_hub as hub

    return RewardError(
        f"{repository}, {name} is not cached and cannot be downloaded",
        where=f"{hub.constants.ENDPOINT}, cache {hub.constants.HF_HUB_CACHE}",
        why=f"{type(error).__name__}: {error}".split("\n")[0],
        hint=f"with a network: hf download {repository} {command}; or give a local copy as the option {option}",
    )


def _commit(revision: str | None) -> str:
    return f" --revision {revision}" if revision else ""


# --- local files --------------------------------------------------------------------------------------------


def local_path(path: str, what: str) -> Path:
    """An existing local file or folder, `bundled:` names included."""
    found = Path(resolve(path)).expanduser().resolve()
    if not found.exists():
        raise RewardError(f"{what} does not exist", where=str(found))
    return found


def hub_id(name: str) -> tuple[str, str | None] | None:
    """(repository, revision) of `owner/name` or `owner/name@revision` where no local file has this name."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?", name)
    if match is None or name.startswith(".") or Path(name).suffix in _SUFFIXES or Path(name).exists():
        return None
    return match[1], match[2]


_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


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
