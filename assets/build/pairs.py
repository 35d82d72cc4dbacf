"""Stage 5: preference pairs, judged by the verifier.

Two of the bundled checkpoint's own samples of one prompt, the better one preferred; equally good ones are ties, a few
of which are kept, as in preference sets from the wild. And renderings, preferred over the checkpoint's faulty
samples of their captions: pairs whose winners are better than the checkpoint can draw.
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
RENDERINGS = 550
SAMPLER = SamplerConfig(steps=20, eta=0.0, guidance_scale=1.0)

Row = tuple[str, bytes, bytes, float]


def write_pairs(checkpoint: Path, file: Path) -> None:
    """Sample, judge, write."""
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
    _write(pairs[:WANTED_PAIRS] + ties[:WANTED_TIES], file)


def write_rendered_pairs(checkpoint: Path, images: Path, file: Path) -> None:
    """Renderings of `images` against samples of their captions that the verifier finds fault with."""
    rendered = pq.read_table(images).slice(0, RENDERINGS).to_pylist()
    prompts = [row["text"] for row in rendered]
    denoiser = load_for_inference(str(checkpoint), device="cpu")
    samples = to_pil(generate(denoiser, prompts, range(len(prompts)), SAMPLER, batch_size=64))
    verdicts = verify_batch(samples, prompts)
    rows: list[Row] = []
    for row, sample, verdict in zip(rendered, samples, verdicts, strict=True):
        if verdict.score < 1:
            winner, loser = row["image"], _jpeg(sample)
            is_first = len(rows) % 2 == 0
            rows.append((row["text"], *((winner, loser) if is_first else (loser, winner)), float(is_first)))
    _write(rows[:WANTED_PAIRS], file)


def _write(rows: list[Row], file: Path) -> None:
    """In Pick-a-Pic's columns (`caption, jpg_0, jpg_1, label_0`)."""
    columns = zip(*rows, strict=True)
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
