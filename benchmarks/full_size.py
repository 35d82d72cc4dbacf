"""Stable Diffusion 1.5's architecture with random weights, built from its configuration: nothing is downloaded.

For measuring and for memory tests. Its pictures are noise, but every layer has its published size.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VOCABULARY, POSITIONS = 49408, 77


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of the published size that knows single characters; the other entries are never used."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + "</w>" for letter in alphabet]
    words += [f"<|unused {i}|>" for i in range(VOCABULARY - len(words) - 2)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=POSITIONS
    )


def text_config() -> CLIPTextConfig:
    """The text encoder of CLIP ViT-L/14."""
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=POSITIONS,
        hidden_act="quick_gelu",
        projection_dim=768,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )


def stable_diffusion_15(*, device: str | torch.device = "cpu", seed: int = 0) -> StableDiffusionPipeline:
    """The pipeline in float32: 859.5 M parameters in the UNet, 83.7 M in the VAE, 123.1 M in the text encoder.

    Weights are drawn on `device`; about 4.3 GB there.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        text_encoder = CLIPTextModel(text_config())
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
            norm_num_groups=32,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=32,
            sample_size=512,
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
