"""Stage 5: preference pairs, judged by the verifier.

Two of the bundled checkpoint's own samples of one prompt, the better one preferred; equally good ones are ties, a few
of which are kept, as in preference sets from the wild. The aesthetic head judges the same pairs in a column of its own:
a taste that has nothing to do with the prompt. And renderings, preferred over the checkpoint's faulty samples of their
captions: pairs whose winners are better than the checkpoint can draw.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffalign.config import RewardConfig, SamplerConfig
from diffalign.data.shapes import draw_prompts
from diffalign.data.shapes_verifier import verify_batch
from diffalign.images import open_image, to_pil, to_tensor
from diffalign.models.loading import load_for_inference
from diffalign.rewards import RewardMixture
from diffalign.sampling import generate

PROMPTS, PICTURES_PER_PROMPT, WANTED_PAIRS, WANTED_TIES = 400, 3, 400, 20
RENDERINGS = 550
SAMPLER = SamplerConfig(steps=20, eta=0.0, guidance_scale=1.0)

Row = tuple[str, bytes, bytes, float]


def write_pairs(checkpoint: Path, clip: Path, file: Path) -> None:
    """Sample, judge, write. `clip`: folder of the small CLIP with its aesthetic head."""
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
    rows = pairs[:WANTED_PAIRS] + ties[:WANTED_TIES]
    _write(rows, file, label_aesthetic=_aesthetic_labels(rows, clip))


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


def _write(rows: list[Row], file: Path, **labels: list[float]) -> None:
    """In Pick-a-Pic's columns (`caption, jpg_0, jpg_1, label_0`), and those of other judges."""
    columns = zip(*rows, strict=True)
    table = dict(zip(("caption", "jpg_0", "jpg_1", "label_0"), map(list, columns), strict=True))
    pq.write_table(pa.table({**table, **labels}), file, row_group_size=128)


def _aesthetic_labels(rows: list[Row], clip: Path) -> list[float]:
    """1 where the aesthetic head prefers picture 0 as it is stored, else 0."""
    options = {"checkpoint": str(clip), "head": str(clip / "aesthetic.safetensors")}
    aesthetic = RewardMixture([RewardConfig(name="aesthetic", options=options)])
    prompts = [row[0] for row in rows]
    first, second = (
        aesthetic(to_tensor([open_image(row[which], "a pair") for row in rows]), prompts).total
        for which in (1, 2)
    )
    return (first > second).float().tolist()


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
