"""Stage 2: text encoder and UNet, trained by the project's own SFT from random weights.

A fifth of the captions has one attribute wrong, as captions from the web do: the checkpoint learns to draw well,
and to trust its prompt too little. That is what alignment can then repair.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel
from world import CONTEXT_LENGTH, train_tokenizer, write_pictures

from diffalign.config_file import load_config
from diffalign.training.run import align

PICTURES = 30_000
WRONG_CAPTIONS = 0.2
TEXT_WIDTH = 64


def new_pipeline(vae_folder: Path) -> StableDiffusionPipeline:
    """Random text encoder and UNet around the trained autoencoder."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(48, 80),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
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
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_denoiser(work: Path, *overrides: str) -> Path:
    """Train in `work/pretrain` (continued when interrupted); returns the finished pipeline's folder."""
    data, start, run = work / "pictures.parquet", work / "untrained", work / "pretrain"
    if not data.exists():
        write_pictures(
            data, PICTURES, seed=2, splits=("train", "train", "train", "train", "eval"), wrong=WRONG_CAPTIONS
        )
    if not start.exists():
        new_pipeline(work / "vae").save_pretrained(start)
    options = ["--model.path", str(start), "--data.path", str(data), *overrides]
    config = load_config(Path(__file__).with_name("pretrain.yaml"), options)
    align(config, run, resume=(run / "config.yaml").exists())
    return run / "final"


def write_half_precision(pipeline_folder: Path, target: Path) -> None:
    """The checkpoint as it ships: float16 safetensors."""
    shutil.rmtree(target, ignore_errors=True)
    pipeline = StableDiffusionPipeline.from_pretrained(
        pipeline_folder, dtype=torch.float16, safety_checker=None
    )
    pipeline.save_pretrained(target, safe_serialization=True)
