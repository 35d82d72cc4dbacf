"""Stage 3: the UNet, trained by the project's own SFT from random weights.

A tenth of the captions has one attribute wrong, as captions from the web do: the checkpoint learns to draw well,
and to trust its prompt too little. That is what alignment can then repair.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from text import WIDTH, train_text_encoder
from world import train_tokenizer, write_pictures

from diffalign.cli.processes import run_in_processes

PICTURES = 30_000
WRONG_CAPTIONS = 0.1
PROCESSES = 2


def new_pipeline(vae_folder: Path) -> StableDiffusionPipeline:
    """A random UNet between the trained text encoder and autoencoder."""
    tokenizer = train_tokenizer()
    text_encoder = train_text_encoder(tokenizer)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(48, 80),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",  # errors at high noise, where the scene is decided, are not scaled away
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_denoiser(work: Path) -> None:
    """Train in `work/pretrain` (continued when interrupted); `work/pretrain/final` is the finished pipeline."""
    data, start, run = work / "pictures.parquet", work / "untrained", work / "pretrain"
    splits = ("train", "train", "train", "train", "eval")
    if not data.exists():
        write_pictures(data, PICTURES, seed=2, splits=splits, wrong=WRONG_CAPTIONS)
    if not (start / "model_index.json").exists():
        new_pipeline(work / "vae").save_pretrained(start)
    words = ["train", str(Path(__file__).with_name("pretrain.yaml")), "--output-dir", str(run)]
    words += ["--model.path", str(start), "--data.path", str(data)]
    resume = ["--resume"] if (run / "config.yaml").exists() else []
    if code := run_in_processes(PROCESSES, [*words, *resume], threads=1):
        raise SystemExit(code)


def write_half_precision(pipeline_folder: Path, target: Path) -> None:
    """The checkpoint as it ships: float16 safetensors."""
    shutil.rmtree(target, ignore_errors=True)
    pipeline = StableDiffusionPipeline.from_pretrained(
        pipeline_folder, dtype=torch.float16, safety_checker=None
    )
    pipeline.save_pretrained(target, safe_serialization=True)
