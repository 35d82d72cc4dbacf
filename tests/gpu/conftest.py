"""What the GPU tests share: the tiny pipeline on CUDA, TF32 off, deterministic kernels.

pip install -e '.[dev]' && pytest -m gpu tests/gpu
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from diffalign.config import LoRAConfig, ModelConfig, TrainingConfig
from diffalign.models.loading import load_denoiser
from diffalign.models.stable_diffusion import StableDiffusion
from diffalign.training.precision import set_backend_flags

# Deterministic cuBLAS needs it, and reads it once, when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _exact_arithmetic() -> Iterator[None]:
    """Float32 is float32, and the same kernels run every time; compiled code of other tests is forgotten."""
    set_backend_flags(TrainingConfig(tf32=False))
    torch.use_deterministic_algorithms(True)
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)  # a CPU test before may have settled on the CPU
    # Beyond the limit blocks would run uncompiled without a word, some in sampling, others in training.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)


CudaDenoiserFactory = Callable[..., StableDiffusion]


@pytest.fixture
def make_cuda_denoiser(tiny_pipeline_dir: Path) -> CudaDenoiserFactory:
    """A trainable tiny denoiser on the GPU: `make(precision, full=False, mode="eager")`.

    Modes: eager, checkpointing, compile, compile+checkpointing.
    """

    def make(precision: str, *, full: bool = False, mode: str = "eager") -> StableDiffusion:
        config = ModelConfig(path=str(tiny_pipeline_dir), lora=None if full else LoRAConfig(rank=2))
        denoiser = load_denoiser(config, device="cuda", mixed_precision=precision, trainable=True)
        denoiser.keep_reference()
        denoiser.prepare_training(
            gradient_checkpointing="checkpointing" in mode, compile=mode.startswith("compile")
        )
        return denoiser

    return make
