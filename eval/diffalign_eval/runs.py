"""What is known of the checkpoints to compare from the run folders that they are in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from diffalign.assets import resolve
from diffalign.cli.alignment_args import split_negative
from diffalign.errors import ConfigError
from diffalign.layout import run_of_step
from diffalign_eval.judgement.run_files import RunInfo, find_base_run, find_run, read_run

_STEP = "step-"


def run_info(path: str) -> RunInfo | None:
    """The run that a run folder, its final/ or one of its checkpoints belongs to; None for any other path."""
    folder = resolve(split_negative(path)[0])
    run = find_run(str(run_of_step(folder) or folder))
    return None if run is None else read_run(run)


def chain_of(info: RunInfo) -> Iterator[RunInfo]:
    """The run, the run that it started from, and so on.

    Raises:
        ConfigError: runs that start from each other.
    """
    seen = {info.folder.resolve()}
    yield info
    while info.base_model is not None:
        before = find_base_run(info.folder, info.base_model)
        if before is None:
            return
        if before.resolve() in seen:
            raise ConfigError(
                f"{before} goes back to itself",
                where=str(before / "config.yaml"),
                hint="a run was replaced after another had started from it: name a copy of its final/ instead",
            )
        seen.add(before.resolve())
        info = read_run(before)
        yield info


def root_of(path: str) -> str:
    """The model that a checkpoint goes back to, through all the runs of a chain. Raises ConfigError."""
    info = run_info(path)
    if info is None:
        return path
    *_, first = chain_of(info)
    return first.base_model or path


def training_rewards(info: RunInfo) -> list[str]:
    """Labels of the rewards that a checkpoint was trained on, by its run or by one that it started from."""
    chain = list(chain_of(info))[::-1]
    return list(dict.fromkeys(label for run in chain for label in run.training_rewards))


def steps_of(info: RunInfo, most: int) -> list[tuple[int, str]]:
    """(iteration, path) of at most `most` of a run's kept checkpoints, evenly spread, the last included."""
    found = sorted(
        (int(path.name.removeprefix(_STEP)), str(path))
        for path in (info.folder / "checkpoints").glob(f"{_STEP}*")
        if path.name.removeprefix(_STEP).isdigit() and (path / "manifest.json").is_file()
    )
    if len(found) <= most:
        return found
    return [found[(i + 1) * len(found) // most - 1] for i in range(most)]


def with_baseline(checkpoints: Mapping[str, str]) -> dict[str, str]:
    """The checkpoints with a baseline in front: where only runs are named, the model that all of them go back to.

    Raises:
        ConfigError: the runs go back to different models, so that there is no baseline to choose.
    """
    roots = {name: root_of(path) for name, path in checkpoints.items()}
    if not checkpoints or any(run_info(path) is None for path in checkpoints.values()):
        return dict(checkpoints)
    if len({str(resolve(root)) for root in roots.values()}) > 1:
        raise ConfigError(
            "the runs go back to different base models, so there is no one baseline",
            why=", ".join(f"{name}: {root}" for name, root in roots.items()),
            hint="name the baseline first, e.g. diffalign compare base=PATH " + " ".join(checkpoints),
        )
    name = "base" if "base" not in checkpoints else "base-model"
    return {name: next(iter(roots.values())), **checkpoints}


def watched(infos: Iterable[RunInfo]) -> list[str]:
    """Labels of the rewards that some run listed and none was trained on."""
    runs = list(infos)
    trained = {label for info in runs for label in training_rewards(info)}
    return [
        label for label in dict.fromkeys(label for i in runs for label in i.weights) if label not in trained
    ]
