"""The document of a comparison: everything it found as strict JSON, and its pictures' scores line by line.

docs/comparison-format.md lists the keys. A number that does not exist is null, and `holes` says why.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

from diffalign import __version__
from diffalign.config.sizes import as_resolution
from diffalign.data.prompt_registry import CATEGORY_COLUMNS
from diffalign.data.prompt_sets import PromptSet
from diffalign.errors import StorageError
from diffalign.images import open_image
from diffalign_eval.compare import COLUMNS, Comparison, SetComparison
from diffalign_eval.generate import Source
from diffalign_eval.grid import picture_grid
from diffalign_eval.judgement.run_files import RunInfo
from diffalign_eval.runs import training_rewards
from diffalign_eval.scoring import label_of
from diffalign_eval.store import KIND, digest, write_whole

Document: TypeAlias = dict[str, Any]

FORMAT = 2
GRID_COLUMNS = 8
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "pillow")


def describe_comparison(comparison: Comparison, infos: Mapping[str, RunInfo], command: str) -> Document:
    """What was compared, how, and the results; what follows from them is added by `diffalign_eval.conclude`."""
    return {
        "kind": KIND,
        "format": FORMAT,
        "id": comparison_id(comparison),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "title": " / ".join(source.name for source in comparison.sources),
        "prompt_sets": [_prompt_set(name, compared) for name, compared in comparison.sets.items()],
        "checkpoints": [_checkpoint(comparison, source, infos) for source in comparison.sources],
        "rewards": [
            {
                "label": label_of(reward),
                "name": reward.name,
                "options": reward.options,
                "higher_is_better": comparison.higher_is_better[label_of(reward)],
                "is_share": next(iter(comparison.sets.values())).result(label_of(reward)).is_share,
                "range": _range(comparison.ranges[label_of(reward)]),
                "held_out": label_of(reward) in comparison.held_out,
            }
            for reward in comparison.rewards
        ],
        "sampler": comparison.drawing.sampler.model_dump(),
        "seeds": {"base": comparison.base_seed, "per_prompt": comparison.seeds_per_prompt},
        "resolution": as_resolution(comparison.sources[0].size),
        "mixed_precision": comparison.drawing.mixed_precision,
        "results": {
            name: [result.to_json() for result in compared.results]
            for name, compared in comparison.sets.items()
        },
        "commands": _commands(infos, command),
        "versions": versions(),
    }


def comparison_id(comparison: Comparison) -> str:
    """12 hex digits that stand for these pictures: what votes refer to."""
    pictures = [
        [source.name, source.key, name, [(spec.prompt, spec.seed) for spec in compared.pictures]]
        for source in comparison.sources
        for name, compared in comparison.sets.items()
    ]
    return digest(pictures)[:12]


def rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """One row per picture and checkpoint, by set and picture: the lines of scores.jsonl."""
    for name, compared in comparison.sets.items():
        for number, spec in enumerate(compared.pictures):
            for source in comparison.sources:
                file = comparison.file(source, spec)
                category = compared.category(spec)
                origin = (source.name, name, spec.prompt_index, spec.prompt, category, spec.seed, file)
                yield dict(zip(COLUMNS, origin, strict=True)) | {
                    label: scores[source.name][number] for label, scores in compared.scores.items()
                }


def write_document(document: Document, comparison: Comparison) -> None:
    """comparison.json and scores.jsonl of the store. Raises StorageError."""
    folder = comparison.store.path
    partial = folder / ".scores.jsonl"
    try:
        with partial.open("w", encoding="utf-8") as stream:
            for row in rows(comparison):
                stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        partial.replace(folder / "scores.jsonl")
        write_json(document, folder / "comparison.json")
    except OSError as error:
        raise StorageError(
            "cannot write the comparison", where=str(folder), why=error.strerror, hint="free some space"
        ) from error


def write_json(document: Document, file: Path) -> None:
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(file, (text + "\n").encode())


def draw_grid(comparison: Comparison) -> None:
    """grid.png: the first picture of the first prompts of the first set, from every checkpoint."""
    compared = next(iter(comparison.sets.values()))
    label = compared.results[0].label
    columns = [i for i, spec in enumerate(compared.pictures) if spec.number == 0][:GRID_COLUMNS]
    shown = [compared.pictures[i] for i in columns]
    folder = comparison.store.path
    files = {s.name: [folder / comparison.file(s, spec) for spec in shown] for s in comparison.sources}
    grid = picture_grid(
        {name: [open_image(file, str(file)) for file in row] for name, row in files.items()},
        [spec.prompt for spec in shown],
        {name: [values[i] for i in columns] for name, values in compared.scores[label].items()},
        title="Same prompts, same seeds",
        score_name=label,
    )
    grid.save(folder / "grid.png")


def versions() -> dict[str, str]:
    """Of Python, of this package and of those that pictures depend on."""
    found = {"python": platform.python_version(), "diffalign": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _prompt_set(name: str, compared: SetComparison) -> dict[str, Any]:
    prompts = compared.prompts
    categories = Counter(record.category for record in prompts.prompts if record.category is not None)
    return {
        "name": name,
        "prompts": len(set(prompts.texts)),
        "pictures": len(compared.pictures),
        "categories": dict(categories),
        "duplicates": prompts.duplicates,
        "warnings": [*prompts.warnings, *_oddities(prompts)],
        "licence": None if prompts.info is None else prompts.info.licence,
    }


def _oddities(prompts: PromptSet) -> Iterator[str]:
    """What a reader should know of a file: prompts that come twice, columns that nothing was made of."""
    if prompts.duplicates:
        yield (
            f"{prompts.duplicates} of {len(prompts)} prompts repeat an earlier one; "
            "pictures of one prompt count as one piece of evidence"
        )
    columns = {name: None for record in prompts.prompts for name in record.metadata}
    unused = [name for name in columns if name not in CATEGORY_COLUMNS]
    if prompts.info is None and unused:
        yield f"columns that are not used: {', '.join(unused)}"


def _checkpoint(comparison: Comparison, source: Source, infos: Mapping[str, RunInfo]) -> dict[str, Any]:
    info = infos.get(source.name)
    run = None if info is None else info.to_json() | {"training_rewards": training_rewards(info)}
    return {
        "name": source.name,
        "path": source.path,
        "key": source.key,
        "fingerprint": source.fingerprint,
        "baseline": source.name == comparison.baseline,
        "run": run,
        "alignment": None if source.alignment is None else source.alignment.to_json(),
    }


def _range(ends: tuple[float, float]) -> list[float] | None:
    return list(ends) if all(math.isfinite(end) for end in ends) else None


def _commands(infos: Mapping[str, RunInfo], command: str) -> list[str]:
    runs = [
        f"diffalign train {info.folder}/config.yaml --output-dir {info.folder}" for info in infos.values()
    ]
    return [*dict.fromkeys(runs), command]
