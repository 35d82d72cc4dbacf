"""Where a run begins: at the start, or after the newest checkpoint that can be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from diffalign.config import Run
from diffalign.config_file import dump_config, load_config
from diffalign.errors import ConfigError
from diffalign.training.changes import check_changes
from diffalign.training.checkpoint import (
    Place,
    Snapshot,
    list_checkpoints,
    read_checkpoint,
    read_newest,
    set_aside,
)
from diffalign.training.processes import Processes
from diffalign.training.run_folder import RunFolder

Resume = str | Path
"""auto: go on if the folder holds a run. must: so, or it is an error. never. Or the path of a checkpoint."""


@dataclass(frozen=True)
class Beginning:
    """What all processes do at the start.

    `checkpoint`: its name, or None to train from the beginning. `evaluated`: the pictures before are there.
    `preview_due`: the last iteration's preview is not. `finished`: there is nothing left to do.
    """

    resumes: bool = False
    checkpoint: str | None = None
    evaluated: bool = False
    preview_due: bool = False
    finished: bool = False


def find_beginning(
    folder: RunFolder,
    config: Run,
    resume: Resume,
    processes: Processes,
    say: Callable[[str], None],
    *,
    allow_changes: bool,
) -> Beginning:
    """What process 0 finds in the run's folder, for all processes alike.

    Raises:
        ConfigError: the folder is taken, there is nothing to resume, or the configuration differs.
        CheckpointError: the named checkpoint, or every one, is damaged.
    """
    found = Beginning()
    if processes.is_main and folder.resumes(resume):
        found = _find(folder, config, resume, processes.world, say, allow_changes)
    return Beginning(**json.loads(processes.meet(json.dumps(asdict(found)))[0]))


def _find(
    folder: RunFolder, config: Run, resume: Resume, world: int, say: Callable[[str], None], allow: bool
) -> Beginning:
    for leftover in folder.checkpoints.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    found: tuple[Path, Snapshot] | None
    if isinstance(resume, Path):
        path = _named(folder, resume)
        found = path, read_checkpoint(path)[0]
    else:
        found = read_newest(folder.checkpoints, say)
    before = found[1].state["processes"] if found else world
    old = dump_config(load_config(folder.config))  # what an earlier version did not know yet has its default
    new = dump_config(config)
    notes = check_changes(old, new, processes=(before, world), allow=allow)
    if found and before != world and Place.of(found[0]).cut:
        say(
            f"{found[0].name} was taken inside an iteration by {before} processes: going back to the one before"
        )
        found = read_newest(folder.checkpoints, say, cuts=False)
    for note in notes:
        say(note)
    if old != new:
        folder.replace_config(config)
    if isinstance(resume, Path):
        for later in list_checkpoints(folder.checkpoints):
            if found and Place.of(later) > Place.of(found[0]):
                set_aside(later)
    place, every = Place.of(found[0]) if found else Place(0), config.training.preview_every
    preview = folder.samples / f"iteration-{place.iteration}" / "before-after.png"
    return Beginning(
        resumes=True,
        checkpoint=found[0].name if found else None,
        evaluated=(folder.samples / "before.json").is_file(),
        preview_due=bool(every and place.iteration and not place.cut)
        and place.iteration % every == 0
        and not preview.exists(),
        finished=folder.summary.is_file() and old == new and not isinstance(resume, Path),
    )


def _named(folder: RunFolder, path: Path) -> Path:
    inside = folder.checkpoints / path.name
    if path.resolve() != inside.resolve():
        raise ConfigError(
            f"{path} is not a checkpoint of {folder.path}",
            hint=f"name one of {', '.join(p.name for p in list_checkpoints(folder.checkpoints)) or '(none)'} in "
            f"{folder.checkpoints}",
        )
    return inside
