"""Tiny pipelines of PixArt-Sigma, Sana and Z-Image, of the real classes with random weights; see families.py."""

from __future__ import annotations

import string

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from families import tiny_t5, tiny_vae
from tokenizers import pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
)

CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if enable_thinking %}<think>{% endif %}"
)
"""A chat template that shows each of its arguments."""


def tiny_pixart(
    *, sample_size: int = 8, sizes: bool = False, in_channels: int = 4, **scheduler: object
) -> PixArtSigmaPipeline:
    """PixArt-Sigma with its DPM-Solver; `sizes`: its network is told the size of a picture."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=2 * in_channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        cross_attention_dim=24,
        caption_channels=32,
        use_additional_conditions=sizes,
    )
    encoder, tokenizer = tiny_t5(32)
    pipeline = PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, **scheduler),
        vae=tiny_vae(4, scaling_factor=0.13025),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def gemma_tokenizer(letters: str = string.printable) -> GemmaTokenizer:
    """A Gemma tokenizer of single characters."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *letters.replace(" ", "")]
    return GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def tiny_dc_autoencoder(channels: int) -> AutoencoderDC:
    """Latents [channels, 8, 8] of 16x16 pictures."""
    return AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def tiny_sana(
    *, timestep_scale: float = 1.0, guidance_embeds: bool = False, **scheduler: object
) -> SanaPipeline:
    """Sana with the DPM-Solver and the shift of its checkpoints, 3; `guidance_embeds`: with Sprint's network."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        timestep_scale=timestep_scale,
        guidance_embeds=guidance_embeds,
    )
    tokenizer = gemma_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        head_dim=4,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
    )
    settings = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    pipeline = SanaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**{**settings, **scheduler}),
        vae=tiny_dc_autoencoder(4),
        text_encoder=Gemma2Model(config),
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A Qwen tokenizer of single bytes, with a chat template."""
    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_z_image(**scheduler: object) -> ZImagePipeline:
    """Z-Image with the shift of its scheduler, 3."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[600, 32, 32],
    )
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        head_dim=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    pipeline = ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=tiny_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(config),
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
