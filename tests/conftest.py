"""Real classes at tiny sizes, with random weights: what every model test runs on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each worker has a core to itself

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffalign.config import LoRAConfig, ModelConfig
from diffalign.models.loading import load_denoiser
from diffalign.models.stable_diffusion import StableDiffusion

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core, up to 8, when all tests of the default run are asked for; otherwise none."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    ordinary = config.option.markexpr == "not slow and not gpu"  # slow ones need the memory of a machine
    return min(os.cpu_count() or 1, 8) if whole and ordinary else 0


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of single characters: 514 tokens, 16 positions."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def tiny_pipeline(prediction_type: str = "epsilon", **scheduler: object) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of the real classes: 16x16 pictures, 4x8x8 latents, 0.1 M parameters."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    settings: dict[str, object] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**{**settings, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny epsilon-prediction checkpoint in diffusers' layout."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_v_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny v-prediction checkpoint with zero terminal SNR, as SD 2.x derivatives have it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-v"
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    tiny_pipeline("v_prediction", **settings).save_pretrained(folder)
    return folder


DenoiserFactory = Callable[..., StableDiffusion]


@pytest.fixture
def make_denoiser(tiny_pipeline_dir: Path) -> DenoiserFactory:
    """A trainable tiny denoiser: `make_denoiser(full=False, mixed_precision="no", **model options)`."""

    def make(*, full: bool = False, mixed_precision: str = "no", path: Path | None = None, **options: object):
        lora = None if full else LoRAConfig(rank=2)
        config = ModelConfig(path=str(path or tiny_pipeline_dir), lora=lora, **options)
        denoiser = load_denoiser(config, mixed_precision=mixed_precision, trainable=True)
        denoiser.keep_reference()
        return denoiser

    return make
