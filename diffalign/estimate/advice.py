"""What to change when a run does not fit: options tried one after the other, each by estimating again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError

from diffalign.config import Run
from diffalign.errors import DiffalignError
from diffalign.estimate.kernels import DeviceKind
from diffalign.estimate.parts import Phase
from diffalign.estimate.run import Estimate, estimate

WORTH = 0.01
"""Share of the peak that an option must save to be named."""


@dataclass(frozen=True)
class Change:
    """Options that help, on top of the changes before it.

    Args:
        options: as they are written on the command line.
        costs: what is lost by it, in words.
        saves: bytes; peak: what is left of it.
    """

    options: str
    costs: str
    saves: int
    peak: int


@dataclass(frozen=True)
class _Candidate:
    """`settings` gives the options to change, by dotted name, or nothing; `phases` are those whose peak it lowers."""

    settings: Callable[[Any], dict[str, Any]]
    phases: tuple[Phase, ...]
    costs: str


def advise(config: Run, kind: DeviceKind, found: Estimate, memory: int) -> list[Change]:
    """Changes that make the run fit into `memory` bytes one after the other, or as many as help at all.

    Those that leave the result as it is come first, and the list ends where the run fits.
    """
    changes: list[Change] = []
    tried: set[int] = set()
    while found.peak > memory:
        for number, candidate in _open_candidates(found, tried):
            settings = candidate.settings(config)
            changed = _changed(config, settings) if settings else None
            again = None if changed is None else _estimated(changed, kind)
            if changed is None or again is None or found.peak - again.peak < WORTH * found.peak:
                tried.add(number)
                continue
            words = " ".join(f"--{name} {_word(value)}" for name, value in settings.items())
            saved = found.peak - again.peak
            if changes and changes[-1].costs == candidate.costs:  # the same option, taken further
                saved += changes.pop().saves
            changes.append(Change(words, candidate.costs, saved, again.peak))
            config, found = changed, again
            break
        else:
            break
    return changes


def _open_candidates(found: Estimate, tried: set[int]) -> Iterator[tuple[int, _Candidate]]:
    for number, candidate in enumerate(CANDIDATES):
        if found.peak_phase in candidate.phases and number not in tried:
            yield number, candidate


def _changed(config: Run, settings: dict[str, Any]) -> Run | None:
    """The run with other settings; None where they do not go with the rest."""
    values = config.model_dump()
    for name, value in settings.items():
        *sections, option = name.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[option] = value
    try:
        return type(config).model_validate(values)
    except ValidationError:
        return None


def _estimated(config: Run, kind: DeviceKind) -> Estimate | None:
    try:
        return estimate(config, kind)
    except DiffalignError:  # this checkpoint cannot have it
        return None


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "'{}'" if value == {} else str(value)


# Each gives {} where the option is set already, or has no place in the method.


def _switch(name: str, value: Any = True, unless: Any = True) -> Callable[[Any], dict[str, Any]]:
    section, _, option = name.partition(".")

    def settings(config: Any) -> dict[str, Any]:
        return {} if getattr(getattr(config, section), option) == unless else {name: value}

    return settings


def _halved(section: str, option: str) -> Callable[[Any], dict[str, Any]]:
    def settings(config: Any) -> dict[str, Any]:
        size = getattr(getattr(config, section), option, 1)
        return {} if size == 1 else {f"{section}.{option}": size // 2}

    return settings


def _accumulated(config: Any) -> dict[str, Any]:
    """Half the batch, twice as often: the update stays what it was."""
    options = config.algorithm
    if not hasattr(options, "gradient_accumulation"):
        return _halved("algorithm", "train_batch_size")(config)
    size = options.batch_size
    if size == 1:
        return {}
    parts = 2 if size % 2 == 0 else size
    return {
        "algorithm.batch_size": size // parts,
        "algorithm.gradient_accumulation": options.gradient_accumulation * parts,
    }


def _bf16(config: Any) -> dict[str, Any]:
    return {"training.mixed_precision": "bf16"} if config.training.mixed_precision == "no" else {}


def _lora(config: Any) -> dict[str, Any]:
    return {"model.lora": {}} if config.model.lora is None else {}


def _quantized(config: Any) -> dict[str, Any]:
    return {"model.quantization": "int8"} if config.model.quantization is None else {}


_ALL: tuple[Phase, ...] = get_args(Phase)
_WITHOUT_PROMPTS = _ALL[1:]
CANDIDATES = (
    _Candidate(_switch("model.offload_text_encoders"), _WITHOUT_PROMPTS, "a copy for each new prompt"),
    _Candidate(
        _switch("model.vae_slicing"), ("encoding pictures", "decoding", "evaluation"), "a little time"
    ),
    _Candidate(
        _halved("algorithm", "sample_batch_size"), ("sampling", "decoding", "encoding prompts"), "time"
    ),
    _Candidate(_halved("evaluation", "batch_size"), ("evaluation", "encoding prompts"), "time in evaluation"),
    _Candidate(
        _switch("training.gradient_checkpointing"), ("training",), "about a third more time per update"
    ),
    _Candidate(_accumulated, ("training",), "time, and nothing of the update"),
    _Candidate(
        _switch("model.offload_vae"), ("sampling", "training", "encoding prompts"), "copies of the VAE"
    ),
    _Candidate(_bf16, _ALL, "precision, and less time on a GPU that has bf16"),
    _Candidate(
        _switch("training.optimizer", "adamw8bit", "adamw8bit"),
        _ALL,
        "precision of the optimizer's moments; needs bitsandbytes",
    ),
    _Candidate(
        _switch("model.vae_tiling"),
        ("decoding", "encoding pictures", "evaluation"),
        "seams in large pictures",
    ),
    _Candidate(_lora, _ALL, "full fine-tuning: an adapter is trained instead"),
    _Candidate(_quantized, _ALL, "precision of the frozen network, and time"),
)
"""In the order in which they are tried: first what leaves the result as it is."""
