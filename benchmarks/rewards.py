"""What batches and a shared backbone save when pictures are scored: one table, medians of repeats.

    python benchmarks/rewards.py [--threads 2]

A thousand rendered scenes and the bundled CLIP. Prompt embeddings are remembered after the warm-up, in every row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from common import Row, hide_progress_bars, machine, median_seconds, print_table
from PIL import Image

from diffalign.config import RewardConfig
from diffalign.data.shapes import draw_scene, render
from diffalign.rewards import RewardMixture

CPU = torch.device("cpu")
CLIP = RewardConfig(name="clip", options={"checkpoint": "bundled:clip"})
AESTHETIC = RewardConfig(
    name="aesthetic", options={"checkpoint": "bundled:clip", "head": "bundled:clip/aesthetic.safetensors"}
)


def main() -> None:
    arguments = parse_arguments()
    hide_progress_bars()
    torch.set_num_threads(arguments.threads)
    print(f"bundled:clip: {machine(CPU)}\n")
    pictures, prompts = scenes(arguments.pictures)
    one, two = RewardMixture([CLIP]), RewardMixture([CLIP, AESTHETIC])
    rows: list[Row] = []

    def measure(phase: str, work: Callable[[], object]) -> None:
        """Its ratio is to the first row."""
        seconds = median_seconds(work, CPU, repeats=arguments.repeats)
        first = rows[0].seconds if rows else seconds
        rows.append(Row(phase, len(prompts), seconds, (f"{seconds / first:.2f}",)))

    measure("clip, batched", lambda: one(pictures, prompts))
    measure(
        "clip, a call a picture",
        lambda: [one([picture], [prompt]) for picture, prompt in zip(pictures, prompts, strict=True)],
    )
    measure("clip and aesthetic, one backbone, batched", lambda: two(pictures, prompts))
    print_table(rows, extra=("times the first row",))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--pictures", type=int, default=1000, help="pictures to score")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per median")
    return parser.parse_args()


def scenes(count: int) -> tuple[list[Image.Image], list[str]]:
    """Rendered scenes and their captions."""
    rng = np.random.default_rng(0)
    drawn = [draw_scene(rng, "train") for _ in range(count)]
    return [render(scene, rng) for scene in drawn], [scene.caption() for scene in drawn]


if __name__ == "__main__":
    main()
