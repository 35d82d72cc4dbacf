"""Pushing a result to the Hugging Face hub: what may go there, and what to do when it does not get there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffalign import __version__
from diffalign.errors import ConfigError, DiffalignError, StorageError
from diffalign.layout import FINAL
from diffalign.model_card import CARD, find_result, write_card
from diffalign.redaction import REDACTED, redact

HIDDEN = (".*", "*/.*")
"""Patterns of what stays: hidden files and folders."""


@dataclass(frozen=True)
class Push:
    """What is to go where.

    Attributes:
        files: (path relative to `folder`, bytes), by name.
    """

    folder: Path
    repository: str
    files: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """Bytes together."""
        return sum(size for _, size in self.files)


def plan_push(folder: Path, repository: str) -> Push:
    """Check a push without the network.

    Raises:
        ConfigError: `folder` is no result, or `repository` no name of the hub.
    """
    _require_result(folder)
    require_name(repository)
    files = sorted(
        (file.relative_to(folder).as_posix(), file.stat().st_size)
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    return Push(folder, repository, tuple(files))


def require_name(repository: str) -> None:
    """Raise ConfigError for what is no name of a repository on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(
            f"{repository} is not a name of the hub", why=_first_line(error), hint="for example me/my-model"
        ) from error


@contextmanager
def as_folder(path: Path, run: Path | None = None) -> Iterator[Path]:
    """`path`; of one .safetensors file a temporary folder with it, and with a model card where its `run` is given.

    Raises:
        ConfigError: a file that is no result, or a run that has not finished.
    """
    if not path.is_file():
        if run is not None:
            raise ConfigError(
                "--run is for one file: a folder has its own model card", hint="leave --run out"
            )
        yield path
        return
    if path.suffix != ".safetensors" or (path.parent / "manifest.json").is_file():
        raise ConfigError(f"{path} is not an exported .safetensors file", hint="diffalign export writes one")
    with TemporaryDirectory(prefix="diffalign-push-") as place:
        folder = Path(place) / path.stem
        folder.mkdir()
        (folder / path.name).symlink_to(path.resolve())
        if run is not None:
            write_card(folder, run)
        yield folder


def push(
    plan: Push, *, private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Upload a plan's files in one go and return the address of the repository, which is made if it is not there.

    Nothing local changes. A push that failed may be repeated: what is on the hub already is not sent again.

    Args:
        private: a repository that is made is visible to its owner only; one that is there stays as it is.
        revision: branch, made if it is not there. Default: main.
        message: of the commit.

    Raises:
        StorageError: no network, no token, no permission, or a hub that refuses.
    """
    from huggingface_hub import HfApi, constants, get_token

    token = get_token()
    if token is None and not constants.HF_HUB_OFFLINE:
        raise StorageError(
            "the hub does not know who you are: there is no token",
            why="HF_TOKEN is not set, and nobody has logged in on this machine",
            hint="make a token with write access at https://huggingface.co/settings/tokens, then hf auth login",
        )
    api = HfApi(library_name="diffalign", library_version=__version__)
    with _explained(plan.repository, api.endpoint, token):
        made = api.create_repo(plan.repository, private=private or None, exist_ok=True)
        name = made.repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=plan.folder,
            revision=revision,
            commit_message=message or f"{plan.folder.resolve().name} of diffalign {__version__}",
            ignore_patterns=list(HIDDEN),
        )
    return f"{api.endpoint}/{name}" + (f"/tree/{revision}" if revision is not None else "")


def _require_result(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is not a folder", hint="name a run's final/, or a folder that was exported from one"
        )
    run = folder.resolve().parent
    is_run, is_in_run = (place / "config.yaml" for place in (folder, run))
    if is_run.is_file():
        final = folder / FINAL
        raise ConfigError(
            f"{folder} is a run, with its checkpoints and figures, and not a result",
            hint=f"push its result: {final}"
            if final.is_dir()
            else "finish it first: train again, same folder",
        )
    if folder.resolve().name == FINAL and is_in_run.is_file() and not (run / "summary.json").is_file():
        raise ConfigError(
            f"the run of {folder} has not finished",
            where=str(run),
            hint="the same train command again finishes it",
        )
    if find_result(folder) is None:
        raise ConfigError(
            f"{folder} holds no result that diffusers loads",
            why="a result is a pipeline's folder, an adapter, or one .safetensors file",
            hint="name a run's final/, or a folder that was exported from one (a checkpoint is exported first)",
        )


@contextmanager
def _explained(repository: str, endpoint: str, token: str | None) -> Iterator[None]:
    """Turn whatever a client of the hub raises into one screen without secrets."""
    try:
        yield
    except DiffalignError:
        raise
    except Exception as error:
        what, hint = _diagnosis(error, repository, endpoint)
        why = redact(_first_line(error))
        if token:
            why = why.replace(token, REDACTED)
        raise StorageError(what, where=f"{endpoint}/{repository}", why=why, hint=hint) from error


def _diagnosis(error: Exception, repository: str, endpoint: str) -> tuple[str, str]:
    """What happened, and what to do about it."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    status = _status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is switched off on this machine", "unset HF_HUB_OFFLINE"
    if status == 401:
        return (
            "the hub does not accept the token",
            "it may have expired: hf auth login, or another HF_TOKEN",
        )
    if status in (403, 404):
        return (
            f"you may not write to {repository}",
            "the name belongs to somebody else, or the token may only read: choose YOUR-NAME/... or your "
            "organisation's, and a token with write access (https://huggingface.co/settings/tokens)",
        )
    if status in (402, 413):
        return "the hub has no more room for you", "see https://huggingface.co/settings/billing"
    if status == 400 or isinstance(error, ValueError):
        return f"the hub refused the files for {repository}", f"if it names the card, correct {CARD} by hand"
    if isinstance(error, HfHubHTTPError):
        return f"the hub answered with an error ({status})", "wait a little; nothing is lost"
    if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
        return (
            f"{endpoint} cannot be reached",
            "check the network, and HTTPS_PROXY where there is a proxy; nothing is lost",
        )
    return "the push did not get through", "nothing is lost; pip install -U huggingface_hub may help"


def _status_of(error: BaseException) -> int | None:
    """Of the hub's answer, also where the client wraps it in another error."""
    seen: BaseException | None = error
    while seen is not None:
        response: Any = getattr(seen, "response", None)
        if response is not None:
            return int(response.status_code)
        seen = seen.__cause__
    return None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
