"""Stage 5: preference pairs from the bundled checkpoint's own samples, judged by the verifier.

Two pictures of one prompt, the better one preferred; equally good ones are ties, a few of which are kept, as in
preference sets from the wild.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffalign.config import SamplerConfig
from diffalign.data.shapes import draw_prompts
from diffalign.data.shapes_verifier import verify_batch
from diffalign.images import to_pil
from diffalign.models.loading import load_for_inference
from diffalign.sampling import generate

PROMPTS, PICTURES_PER_PROMPT, WANTED_PAIRS, WANTED_TIES = 400, 3, 400, 20
SAMPLER = SamplerConfig(steps=20, eta=0.0, guidance_scale=1.0)

Row = tuple[str, bytes, bytes, float]


def write_pairs(checkpoint: Path, file: Path) -> None:
    """Sample, judge, write Pick-a-Pic's columns (`caption, jpg_0, jpg_1, label_0`)."""
    prompts = [p for p in draw_prompts(PROMPTS, "train", seed=11) for _ in range(PICTURES_PER_PROMPT)]
    denoiser = load_for_inference(str(checkpoint), device="cpu")
    pictures = to_pil(generate(denoiser, prompts, range(len(prompts)), SAMPLER, batch_size=64))
    scores = [verdict.score for verdict in verify_batch(pictures, prompts)]
    pairs: list[Row] = []
    ties: list[Row] = []
    for start in range(0, len(prompts), PICTURES_PER_PROMPT):
        rows = range(start, start + PICTURES_PER_PROMPT)
        for row in _judged(prompts[start], [pictures[i] for i in rows], [scores[i] for i in rows]):
            (ties if row[3] == 0.5 else pairs).append(row)
    kept = pairs[:WANTED_PAIRS] + ties[:WANTED_TIES]
    columns = zip(*kept, strict=True)
    table = dict(zip(("caption", "jpg_0", "jpg_1", "label_0"), map(list, columns), strict=True))
    pq.write_table(pa.table(table), file, row_group_size=128)


def _judged(prompt: str, pictures: list[Image.Image], scores: list[float]) -> Iterator[Row]:
    """The best picture against the worst, in the order they were sampled; a tie where all are equal."""
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    first, second = (0, 1) if best == worst else sorted((best, worst))
    label = 0.5 if best == worst else float(first == best)
    yield prompt, _jpeg(pictures[first]), _jpeg(pictures[second]), label


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
