"""origins.json of a run that starts, and its model card when it has ended."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from threading import Thread

from diffalign.config import AdapterConfig, Run
from diffalign.data.prompts import PUBLISHED
from diffalign.errors import CheckpointError, DiffalignError
from diffalign.layout import PEFT_CONFIG
from diffalign.model_card import write_card
from diffalign.models.lora_paths import find_lora
from diffalign.origins import (
    ORIGINS,
    FileSet,
    Licence,
    Origins,
    find_base,
    find_files,
    find_licence,
    hash_files,
    read_origins,
)
from diffalign.rewards import RewardMixture
from diffalign.training.run_folder import RunFolder, write_atomically

EARLIER = " (earlier)"
"""After the name of an option that named other data before the run was resumed."""
Warn = Callable[[str, str], None]
"""Told the kind of a warning and its text."""


def start_origins(
    folder: RunFolder, config: Run, pipeline: str, reward: RewardMixture | None, warn: Warn
) -> Thread:
    """`record_origins` beside the run, which then does not wait until gigabytes are hashed."""
    thread = Thread(
        target=record_origins, args=(folder, config, pipeline, reward, warn), name="origins", daemon=True
    )
    thread.start()
    return thread


def record_origins(
    folder: RunFolder, config: Run, pipeline: str, reward: RewardMixture | None, warn: Warn
) -> None:
    """Write `<run>/origins.json`; that of a resumed run stays, unless its run file names other data now.

    Args:
        pipeline: the diffusers class of the base model.
        warn: told where it cannot be written; the run goes on.
    """
    try:
        _record(folder, config, pipeline, reward)
    except Exception as error:
        warn("origins", f"no {ORIGINS}, so no hashes and licences in the model card: {_reason(error)}")


def _record(folder: RunFolder, config: Run, pipeline: str, reward: RewardMixture | None) -> None:
    paths = data_paths(config)
    known = read_origins(folder.path)
    said = known.data if known is not None else {}
    if known is not None and {name: said[name].path for name in said if not name.endswith(EARLIER)} == paths:
        return
    licences = {label: model.license for label, model in reward.rewards.items()} if reward else {}
    origins = Origins(
        base=find_base(config.model, pipeline),
        adapters={
            f"model.adapters.{index}": _adapter(adapter)
            for index, adapter in enumerate(config.model.adapters)
        },
        data={option: _data(path) for option, path in paths.items()} | _left_behind(said, paths),
        rewards=licences,
    )
    write_atomically(folder.path / ORIGINS, origins.model_dump_json(indent=1))


def _left_behind(said: Mapping[str, FileSet], paths: Mapping[str, str]) -> dict[str, FileSet]:
    """What the run learned from before its run file named other data."""
    found: dict[str, FileSet] = {}
    for option, files in said.items():
        if paths.get(option) != files.path:
            name = option if option.endswith(EARLIER) else option + EARLIER
            while name in found:
                name += EARLIER
            found[name] = files
    return found


def data_paths(config: Run) -> dict[str, str]:
    """Option -> path of everything that a run learns from or is evaluated on."""
    found = {
        f"data.{name}": value
        for name, value in config.data
        if isinstance(value, str) and (name == "path" or name.endswith("_path"))
    }
    prior = getattr(getattr(config.algorithm, "prior", None), "path", None)
    if prior is not None:
        found["algorithm.prior.path"] = prior
    return found | {f"evaluation.sets.{name}": path for name, path in config.evaluation.sets.items()}


def conclude_card(folder: RunFolder, warn: Warn, origins: Thread | None = None) -> None:
    """Write final/README.md. A run whose card cannot be written is warned of it, and has succeeded all the same.

    Args:
        origins: what `start_origins` began, and the card waits for.
    """
    if origins is not None:
        origins.join()
    try:
        write_card(folder.final, folder.path)
    except Exception as error:
        warn("model_card", f"no model card in {folder.final}: {_reason(error)}; the same command tries again")


def _reason(error: Exception) -> str:
    return error.what if isinstance(error, DiffalignError) else f"{type(error).__name__}: {error}"


def _adapter(adapter: AdapterConfig) -> FileSet:
    """What was loaded of it: of a run's folder, or of a repository of the hub, that is one file of many."""
    try:
        source = find_lora(adapter)
    except CheckpointError:
        return FileSet(path=adapter.path)
    files = [source.file, source.file.with_name(PEFT_CONFIG)] if source.is_peft else [source.file]
    found = hash_files(adapter.path, source.file.parent, files, limit=None)
    return found.model_copy(update={"licence": find_licence(source.file, adapter.path)})


def _data(path: str) -> FileSet:
    if not path.startswith(PUBLISHED):
        return find_files(path)
    from diffalign.data.prompt_sets import load_prompt_set

    prompts = load_prompt_set(path.removeprefix(PUBLISHED))
    text = "\n".join(prompts.texts).encode()
    return FileSet(
        path=path,
        sha256=hashlib.sha256(text).hexdigest(),
        of="prompts",
        count=len(prompts),
        size=len(text),
        licence=Licence() if prompts.info is None else Licence(name=prompts.info.licence),
    )
