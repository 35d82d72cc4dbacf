"""The measures of a comparison: its stored pictures, and how far each checkpoint has moved from the baseline.

What cannot be measured here leaves a hole with its reason, and the comparison stands without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from diffalign.errors import DiffalignError
from diffalign.images import open_image
from diffalign.models.base import Denoiser
from diffalign_eval.compare import Comparison, SetComparison
from diffalign_eval.generate import Source
from diffalign_eval.judgement.run_files import Hole
from diffalign_eval.measures.distance import NOISE_LEVELS, denoising_drift, stochastic, trajectory_kl
from diffalign_eval.measures.diversity import SetDiversity
from diffalign_eval.measures.fidelity import fidelity
from diffalign_eval.measures.stream import PromptPictures, measure_prompts
from diffalign_eval.measures.summary import Column, MeasureResult, collect, measure_results
from diffalign_eval.statistics import Interval
from diffalign_eval.store import digest, write_whole

if TYPE_CHECKING:
    from PIL import Image

    from diffalign_eval.measures.embedding import PictureEmbedder

BUNDLED_CLIP = "bundled:clip"


@dataclass(frozen=True)
class SetMeasures:
    """Measures of one prompt set."""

    columns: dict[str, dict[str, Column]]
    """Checkpoint -> label -> its numbers, picture by picture or prompt by prompt."""
    results: list[MeasureResult]


@dataclass(frozen=True)
class Distance:
    """How far a checkpoint is from the baseline."""

    trajectory_kl: Interval
    """Nats per picture, over a whole trajectory."""
    denoising_drift: Interval
    """Change of the denoising error on the baseline's pictures."""
    base_error: float
    """The baseline's own error on them."""

    def to_json(self) -> dict[str, Any]:
        return {
            "trajectory_kl": self.trajectory_kl.to_json(),
            "denoising_drift": self.denoising_drift.to_json(),
            "base_error": self.base_error,
        }


def make_embedder(comparison: Comparison, wanted: str | None, device: str) -> PictureEmbedder:
    """The CLIP that diversity is measured in: as asked for, of the reward `clip`, or the one that suits the model.

    Raises:
        RewardError: there is no such model, or its weights cannot be had.
    """
    from diffalign_eval.measures.embedding import PictureEmbedder

    options: dict[str, Any] = {}
    if wanted is not None:
        architecture, slash, pretrained = wanted.partition("/")
        is_name = bool(slash) and architecture and not wanted.startswith((".", "/", "~"))
        options = (
            {"architecture": architecture, "pretrained": pretrained} if is_name else {"checkpoint": wanted}
        )
    else:
        clips = [reward.options for reward in comparison.rewards if reward.name == "clip"]
        if clips:
            known = ("architecture", "pretrained", "checkpoint")
            options = {name: value for name, value in clips[0].items() if name in known}
        elif any(source.path.startswith("bundled:") for source in comparison.sources):
            options = {"checkpoint": BUNDLED_CLIP}
    return PictureEmbedder(**options, device=device)


def measure_pictures(comparison: Comparison, embedder: PictureEmbedder) -> dict[str, SetMeasures]:
    """Every measure of every checkpoint's pictures, by prompt set. Raises DataError."""
    measured = {}
    for name, compared in comparison.sets.items():
        columns = {}
        for source in comparison.sources:
            whole = SetDiversity()
            rows = measure_prompts(_by_prompt(comparison, compared, source), embedder, whole)
            columns[source.name] = collect(rows, whole)
        measured[name] = SetMeasures(columns, measure_results(columns))
    return measured


def measure_fidelity(
    comparison: Comparison, embedder: PictureEmbedder | Any
) -> dict[str, dict[str, dict[str, Any]]]:
    """FID and KID of every checkpoint's pictures against the baseline's, by prompt set."""
    baseline = comparison.sources[0]
    return {
        name: {
            source.name: fidelity(
                _pictures(comparison, compared, baseline), _pictures(comparison, compared, source), embedder
            ).to_json()
            for source in comparison.sources[1:]
        }
        for name, compared in comparison.sets.items()
    }


def measure_distances(
    comparison: Comparison, prompts: int, device: str
) -> tuple[dict[str, Distance], list[Hole]]:
    """Distance of every checkpoint from the baseline, on the first prompts of the first set; kept in the store."""
    (first, *_) = comparison.sets.values()
    specs = list({spec.prompt: spec for spec in reversed(first.pictures)}.values())[::-1][:prompts]
    folder = comparison.store.path / "distance"
    folder.mkdir(exist_ok=True)
    baseline, *others = comparison.sources
    base: Denoiser | None = None
    distances: dict[str, Distance] = {}
    holes = []
    pictures = [open_image(comparison.store.path / comparison.file(baseline, s), s.prompt) for s in specs]
    for source in others:
        if source.alignment is not None:
            reason = "aligned at test time: its pictures are not those that its weights give"
            holes.append(Hole(f"distance of {source.name} from {baseline.name}", reason))
            continue
        asked = [baseline.key, source.key, NOISE_LEVELS, [(spec.prompt, spec.seed) for spec in specs]]
        file = folder / f"{digest(asked)[:16]}.json"
        if file.exists():
            distances[source.name] = _read(json.loads(file.read_text()))
            continue
        try:
            base = base or comparison.drawing.load(baseline.path, device)
            policy = comparison.drawing.load(source.path, device)
            texts = [spec.prompt for spec in specs]
            size = comparison.drawing.batch_size
            sampler = stochastic(comparison.drawing.sampler)
            kl = trajectory_kl(policy, base, texts, [spec.seed for spec in specs], sampler, size)
            batches = ((pictures[i : i + size], texts[i : i + size]) for i in range(0, len(texts), size))
            drift = denoising_drift(policy, base, batches)
        except DiffalignError as error:
            holes.append(Hole(f"distance of {source.name} from {baseline.name}", error.what))
            continue
        distance = Distance(kl.interval(), drift.interval(), sum(drift.base) / len(drift.base))
        write_whole(file, json.dumps(asdict(distance)).encode())
        distances[source.name] = distance
    return distances, holes


def _read(stored: Mapping[str, Any]) -> Distance:
    return Distance(
        Interval(**stored["trajectory_kl"]), Interval(**stored["denoising_drift"]), stored["base_error"]
    )


def _pictures(comparison: Comparison, compared: SetComparison, source: Source) -> Iterator[Image.Image]:
    for spec in compared.pictures:
        file = comparison.store.path / comparison.file(source, spec)
        yield open_image(file, str(file))


def _by_prompt(comparison: Comparison, compared: SetComparison, source: Source) -> Iterator[PromptPictures]:
    """The plan lists the pictures of a prompt one after the other."""
    opened = _pictures(comparison, compared, source)
    held: list[Image.Image] = []
    for spec, following in zip(compared.pictures, [*compared.pictures[1:], None], strict=True):
        held.append(next(opened))
        if following is None or following.prompt_index != spec.prompt_index:
            yield PromptPictures(spec.prompt, compared.category(spec), held)
            held = []
