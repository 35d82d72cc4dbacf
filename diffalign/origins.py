"""What a run was made from: its base model and its data, each by a hash, and the licences that come with them.

`origins.json` is written when a run starts, because later the data may have moved and a branch of the hub gone on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from diffalign.assets import BUNDLED, resolve
from diffalign.config import ModelConfig, Options
from diffalign.layout import FINAL, LORA_FILE, PIPELINE_INDEX, result_in

ORIGINS = "origins.json"
READ_AT_MOST = 16 * 2**30
"""Bytes of a data set that are read for its hash; a larger one is known by the names and sizes of its files."""
OPEN_AT_MOST = 20_000
"""Files of a data set that are, likewise."""
OUR_LICENCE = "Apache-2.0"
"""Of everything bundled."""

_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART_SUFFIXES = (".json", ".txt", ".model", ".safetensors")
"""Of a pipeline's files, those that are loaded; spiece.model is T5's vocabulary."""
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a pipeline that are not loaded."""


class Licence(Options):
    """A licence as it was found stated; nothing where it is not."""

    name: str | None = None
    """An identifier such as apache-2.0, or other, or the name in words."""
    title: str | None = None
    """`license_name` of a model card: what `other` is called."""
    link: str | None = None
    file: str | None = None
    """Where its text is, on this machine."""


class FileSet(Options):
    """Files by one hash."""

    path: str
    """As the run file names them."""
    sha256: str | None = None
    """One file: of its bytes. Several: of the lines that `sha256sum` prints for them, by name. None: not readable."""
    of: Literal["contents", "names and sizes", "prompts"] = "contents"
    """prompts: of a published set, one a line."""
    count: int = 0
    """Files, or prompts."""
    size: int = 0
    """Bytes together."""
    licence: Licence = Licence()


class BaseModel(Options):
    """The checkpoint that training started from."""

    files: FileSet
    pipeline: str
    """Class of diffusers that loads it."""
    hub_id: str | None = None
    commit: str | None = None
    """On the hub."""
    variant: str | None = None
    single_file_config: str | None = None
    is_lora: bool = False
    """It is the adapter of a run, on top of `trained_from`."""
    trained_from: BaseModel | None = None
    """Where it is the result of a run: what that one started from, if it is known."""

    @property
    def root(self) -> BaseModel:
        """The first of a chain of runs."""
        return self if self.trained_from is None else self.trained_from.root


class Origins(Options):
    """What origins.json says: option, e.g. data.path, -> its files; label of a reward -> licence."""

    base: BaseModel
    adapters: dict[str, FileSet] = Field(default_factory=dict)
    data: dict[str, FileSet] = Field(default_factory=dict)
    rewards: dict[str, str] = Field(default_factory=dict)


def read_origins(run: Path) -> Origins | None:
    """What the run in this folder was made from; None where it did not write that down."""
    try:
        return Origins.model_validate_json((run / ORIGINS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def find_base(config: ModelConfig, pipeline: str) -> BaseModel:
    """The checkpoint of a run's model section, which is there (it has just been loaded)."""
    path = result_in(resolve(config.path))
    commit = None
    if not path.exists():
        path = _snapshot(config)
        commit = path.name
    files = hash_files(config.path, *_weights(path, config.variant), limit=None)
    before = read_origins(path.parent) if path.name == FINAL else None
    return BaseModel(
        files=files.model_copy(update={"licence": find_licence(path, config.path)}),
        pipeline=pipeline,
        hub_id=config.path if commit else None,
        commit=commit,
        variant=config.variant,
        single_file_config=config.single_file_config,
        is_lora=(path / LORA_FILE).is_file(),
        trained_from=before.base if before is not None else None,
    )


def find_files(path: str) -> FileSet:
    """The files at a path of the run file: a file, a folder, or a pattern of files (`data/train-*.parquet`)."""
    place = resolve(path)
    if place.is_dir():
        root, files = place, sorted(file for file in place.rglob("*") if file.is_file())
    else:
        root = place.parent
        files = [place] if place.is_file() else sorted(root.glob(place.name))
    found = hash_files(path, root, [file for file in files if not _is_hidden(file.relative_to(root))])
    return found.model_copy(update={"licence": find_licence(root, path)})


def hash_files(path: str, root: Path, files: Sequence[Path], limit: int | None = READ_AT_MOST) -> FileSet:
    """`files` below `root` as one hash.

    Several give that of the lines `SHA-256  NAME`, sorted by name, or `BYTES  NAME` where they have more than `limit`
    bytes together, or are more than `OPEN_AT_MOST`. Without a limit they are read whatever it takes.
    """
    named = {file.relative_to(root).as_posix(): file for file in files}
    try:
        sizes = {name: file.stat().st_size for name, file in named.items()}
        total = sum(sizes.values())
        if limit is not None and (total > limit or len(named) > OPEN_AT_MOST):
            lines = [f"{sizes[name]}  {name}\n" for name in sorted(named)]
            return FileSet(
                path=path, sha256=_sha256(lines), of="names and sizes", count=len(named), size=total
            )
        hashes = {name: _hash_of(file) for name, file in named.items()}
    except OSError:
        return FileSet(path=path, count=len(named))
    if len(hashes) == 1:
        return FileSet(path=path, sha256=next(iter(hashes.values())), count=1, size=total)
    lines = [f"{hashes[name]}  {name}\n" for name in sorted(hashes)]
    return FileSet(path=path, sha256=_sha256(lines) if lines else None, count=len(named), size=total)


def find_licence(place: Path, path: str) -> Licence:
    """What the files at `place` state: the README's front matter, a single file's metadata, a LICENSE beside them."""
    if path.startswith(BUNDLED):
        return Licence(name=OUR_LICENCE)
    folder = place if place.is_dir() else place.parent
    card = read_front_matter(folder / "README.md")
    texts = sorted(file for file in folder.glob("LICEN[SC]E*") if file.is_file()) if folder.is_dir() else []
    name, title, link = (_text(card.get(f"license{part}")) for part in ("", "_name", "_link"))
    if place.suffix == ".safetensors":
        name = _text(read_header(place).get("__metadata__", {}).get("modelspec.license")) or name
    return Licence(name=name, title=title, link=link, file=str(texts[0].resolve()) if texts else None)


def read_front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; nothing where there is none that can be read."""
    try:
        found = _FRONT_MATTER.match(card.read_text(encoding="utf-8-sig"))
        tree = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def read_header(file: Path) -> dict[str, Any]:
    """The JSON at the head of a safetensors file; nothing where it cannot be read."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            tree = json.loads(stream.read(size)) if size <= 100_000_000 else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _snapshot(config: ModelConfig) -> Path:
    """The folder of a hub model in the local cache, its card included where it can be had."""
    from huggingface_hub import hf_hub_download

    index = hf_hub_download(config.path, PIPELINE_INDEX, revision=config.revision, local_files_only=True)
    snapshot = Path(index).parent
    with contextlib.suppress(Exception):  # without it the licence is not known, which the card says
        hf_hub_download(config.path, "README.md", revision=snapshot.name)
    return snapshot


def _weights(path: Path, variant: str | None) -> tuple[Path, list[Path]]:
    """The folder of a checkpoint, and the files in it that a run loads."""
    if path.is_file():
        return path.parent, [path]
    if (path / LORA_FILE).is_file():
        return path, [path / LORA_FILE]
    index_file = path / PIPELINE_INDEX
    index = json.loads(index_file.read_text(encoding="utf-8"))
    files = [index_file]
    for part, library in index.items():
        if isinstance(library, list) and library[0] is not None and part not in _LEFT_OUT:
            files += _weights_of_part(path / part, variant)
    return path, files


def _weights_of_part(part: Path, variant: str | None) -> Iterator[Path]:
    loaded = [file for file in part.glob("*") if file.suffix in _PART_SUFFIXES and file.is_file()]
    weights = [file for file in loaded if file.suffix == ".safetensors"]
    of_variant = [file for file in weights if variant is not None and f".{variant}" in file.stem]
    plain = [file for file in weights if "." not in file.stem]
    yield from of_variant or plain
    yield from (file for file in loaded if file.suffix != ".safetensors")


def _hash_of(file: Path) -> str:
    """SHA-256 of its bytes; of a large file from the hub it is the name that the local cache gives it."""
    stored = file.resolve()
    if stored.parent.name == "blobs" and _SHA256.fullmatch(stored.name):
        return stored.name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _text(value: object) -> str | None:
    return " ".join(value.split()) or None if isinstance(value, str) else None
