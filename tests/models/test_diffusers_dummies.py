"""Pipelines with the sizes of diffusers' own fast tests (`get_dummy_components`, 0.42) load and train.

Only the tokenizers are others, since theirs are downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from families import load, one_step, tiny_t5, write_data
from newer_families import gemma_tokenizer, qwen_tokenizer, tiny_dc_autoencoder
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from diffalign.config import RUNS, TrainingConfig

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TWO_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
ONE_LEVEL_VAE = {
    "sample_size": 32,
    "block_out_channels": (4,),
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.0609,
    "scaling_factor": 1.5035,
}


def clip_config(**options: object) -> CLIPTextConfig:
    common = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 1000}
    wide = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 5}
    return CLIPTextConfig(**{**common, **wide, "hidden_act": "gelu", "projection_dim": 32, **options})


def random_t5() -> T5EncoderModel:
    """The sizes of hf-internal-testing/tiny-random-t5."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4, "vocab_size": 1103}
    return T5EncoderModel(T5Config(**sizes))


def t5_tokenizer() -> Any:
    return tiny_t5(2)[1]


def stable_diffusion() -> StableDiffusionPipeline:
    narrow = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            block_out_channels=(4, 8),
            layers_per_block=1,
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            norm_num_groups=2,
        ),
        scheduler=DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False),
        vae=AutoencoderKL(**TWO_LEVELS, block_out_channels=(4, 8), norm_num_groups=2),
        text_encoder=CLIPTextModel(clip_config(hidden_act="quick_gelu", projection_dim=512, **narrow)),
        tokenizer=tiny_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            block_out_channels=(2, 4),
            layers_per_block=2,
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
            norm_num_groups=1,
        ),
        scheduler=EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
        vae=AutoencoderKL(**TWO_LEVELS, block_out_channels=(32, 64), sample_size=128),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=tiny_tokenizer(),
        add_watermarker=False,
    )


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=64,
            out_channels=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(latent_channels=4, **ONE_LEVEL_VAE),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=random_t5(),
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> FluxPipeline:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(latent_channels=1, **ONE_LEVEL_VAE),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=random_t5(),
        tokenizer_2=t5_tokenizer(),
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
        ),
        scheduler=DDIMScheduler(),
        vae=AutoencoderKL(),
        text_encoder=random_t5(),
        tokenizer=t5_tokenizer(),
    )


def sana() -> SanaPipeline:
    config = Gemma2Config(
        head_dim=16,
        hidden_size=8,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=2,
        vocab_size=8,
        attn_implementation="eager",
    )
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=tiny_dc_autoencoder(4),
        text_encoder=Gemma2Model(config),
        tokenizer=gemma_tokenizer("ab"),
    )


def z_image() -> ZImagePipeline:
    config = Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=512,
    )
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            **TWO_LEVELS,
            block_out_channels=(32, 64),
            latent_channels=16,
            sample_size=32,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        text_encoder=Qwen3Model(config),
        tokenizer=qwen_tokenizer(),
    )


BUILDERS: dict[Callable[[], Any], int] = {
    stable_diffusion: 16,
    stable_diffusion_xl: 16,
    stable_diffusion_3: 8,
    flux: 8,
    pixart_sigma: 8,
    sana: 16,
    z_image: 16,
}
"""Pipeline -> side of the pictures that it is trained on here."""


@pytest.mark.parametrize(("build", "side"), BUILDERS.items(), ids=[build.__name__ for build in BUILDERS])
def test_it_loads_and_takes_a_step(build: Callable[[], Any], side: int, tmp_path: Path):
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "pipeline")
    denoiser = load(tmp_path / "pipeline", resolution=side)
    write_data(tmp_path)
    run = RUNS["sft"](
        algorithm={"name": "sft", "batch_size": 2},
        data={"path": str(tmp_path / "pictures")},
        training=TrainingConfig(iterations=1, device="cpu", learning_rate=1e-4),
    )
    one_step(run, denoiser)
