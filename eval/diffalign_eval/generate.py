"""The pictures of a comparison: those that the store does not hold yet, each by the process it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.cli.alignment_args import split_negative
from diffalign.config import SamplerConfig
from diffalign.config.sizes import Resolution, Size, as_resolution, in_words
from diffalign.config.test_time import Alignment
from diffalign.errors import CheckpointError
from diffalign.images import to_pil
from diffalign.models.base import Denoiser
from diffalign.picture_folder import PictureSpec
from diffalign.sampling import generate, guide_away_from
from diffalign.test_time.aligner import Aligner
from diffalign.training.policies import load_policy
from diffalign_eval.shards import Shards
from diffalign_eval.store import Store, picture_key

Progress = Callable[[str, int, int], None]
"""Called with what is done (a checkpoint, or "scoring"), how much of it and of how much, of this process."""


@dataclass(frozen=True)
class Source:
    """A checkpoint as pictures come from it."""

    name: str
    path: str
    fingerprint: str
    size: Size
    key: str
    """Of its pictures in the store."""
    alignment: Alignment | None = None
    """At test time: how its pictures are made."""


@dataclass(frozen=True)
class Drawing:
    """How every picture of a comparison is made."""

    sampler: SamplerConfig
    batch_size: int = 8
    mixed_precision: str = "no"
    resolution: Resolution | None = None

    def load(self, path: str, device: str, mixed_precision: str | None = None) -> Denoiser:
        """A checkpoint, or CHECKPOINT+negative:PATH."""
        precision = self.mixed_precision if mixed_precision is None else mixed_precision

        def load(one: str) -> Denoiser:
            return load_policy(one, device=device, mixed_precision=precision, resolution=self.resolution)

        own, negative = split_negative(path)
        denoiser = load(own)
        if negative is not None:
            guide_away_from(denoiser, load(negative), self.sampler)
        return denoiser


def inspect(name: str, path: str, drawing: Drawing, alignment: Alignment | None = None) -> Source:
    """Load a checkpoint once on the CPU, before hours go into pictures of others. Raises CheckpointError."""
    denoiser = drawing.load(path, "cpu", "no")
    mark = denoiser.fingerprint()
    options = drawing.sampler.model_dump()
    denoiser.make_sampler(drawing.sampler)
    key = picture_key(mark, options, as_resolution(denoiser.size), drawing.mixed_precision, alignment)
    return Source(name, path, mark, denoiser.size, key, alignment)


def require_one_resolution(sources: Sequence[Source]) -> None:
    """Raises CheckpointError when pictures would differ in size."""
    if len({source.size for source in sources}) > 1:
        raise CheckpointError(
            "the checkpoints make pictures of different sizes, which rewards do not score alike",
            why=", ".join(f"{source.name}: {in_words(source.size)} pixels" for source in sources),
            hint="give all of them one --resolution, or compare checkpoints of one base model",
        )


def draw_missing(
    source: Source,
    specs: Sequence[PictureSpec],
    drawing: Drawing,
    store: Store,
    shards: Shards,
    on_progress: Progress | None = None,
) -> int:
    """Draw this process's missing pictures of one checkpoint; returns how many they were.

    The checkpoint is loaded only if there are any. Raises CheckpointError, StorageError.
    """
    share = shards.mine(specs)
    missing = [spec for spec in share if not store.has_picture(source.key, spec)]
    done = len(share) - len(missing)
    if on_progress is not None and done:
        on_progress(source.name, done, len(share))
    if not missing:
        return 0
    aligner = None if source.alignment is None else Aligner(source.alignment, shards.device)
    draw = generate if aligner is None else aligner.draw
    denoiser = drawing.load(source.path, str(shards.device))
    for start in range(0, len(missing), drawing.batch_size):
        batch = missing[start : start + drawing.batch_size]
        prompts, seeds = [spec.prompt for spec in batch], [spec.seed for spec in batch]
        pictures = to_pil(draw(denoiser, prompts, seeds, drawing.sampler, drawing.batch_size))
        for spec, picture in zip(batch, pictures, strict=True):
            store.save_picture(source.key, spec, picture)
        if aligner is not None:
            store.add_cost(source.key, shards.rank, aligner.take_cost().to_json())
        done += len(batch)
        if on_progress is not None:
            on_progress(source.name, done, len(share))
    return len(missing)


def describe(source: Source, drawing: Drawing) -> dict[str, Any]:
    """What a folder of pictures was made with."""
    alignment = {} if source.alignment is None else {"alignment": source.alignment.to_json()}
    return {
        "path": source.path,
        "fingerprint": source.fingerprint,
        "sampler": drawing.sampler.model_dump(),
        "resolution": as_resolution(source.size),
        "mixed_precision": drawing.mixed_precision,
        **alignment,
    }
