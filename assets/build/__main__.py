"""Everything under assets/, from nothing: `python assets/build`.

Stages: autoencoder, text encoder, UNet (by the project's own SFT), a small CLIP with an aesthetic head,
preference pairs, captioned pictures, prompt lists. Training that was interrupted continues, and is not repeated.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from clip import train_aesthetic, train_clip
from denoiser import train_denoiser, write_half_precision
from pairs import write_pairs, write_rendered_pairs
from vae import train_vae
from world import write_pictures, write_prompts

ASSETS = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, default=Path("build/bundled"), help="intermediate results")
    parser.add_argument("--assets-dir", type=Path, default=ASSETS, help="where the finished files go")
    arguments = parser.parse_args()
    work, assets = arguments.work_dir, arguments.assets_dir
    torch.set_num_threads(1)  # at these sizes a second thread costs more than it brings
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "vae" / "config.json").exists():
        train_vae(work / "vae")
    if not (work / "pretrain" / "final").exists():
        train_denoiser(work)
    write_half_precision(work / "pretrain" / "final", assets / "tiny-sd")
    if not (work / "clip" / "aesthetic.safetensors").exists():
        train_clip(work / "clip")
        train_aesthetic(work / "clip")
    shutil.copytree(
        work / "clip", assets / "clip", dirs_exist_ok=True, ignore=shutil.ignore_patterns("state*")
    )
    write_pairs(assets / "tiny-sd", assets / "clip", assets / "pairs.parquet")
    write_pictures(assets / "images.parquet", 1500, seed=3, splits=("train",))
    write_rendered_pairs(assets / "tiny-sd", assets / "images.parquet", assets / "pairs_rendered.parquet")
    write_prompts(assets / "prompts")


if __name__ == "__main__":
    main()
