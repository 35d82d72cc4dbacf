"""Two tiny checkpoints that draw differently, and a reward that tells them apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def brighter_pipeline_dir(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_pipeline_dir` with a VAE whose pictures are brighter: the decoder's last bias raised by 0.2."""
    folder = tmp_path_factory.mktemp("checkpoint") / "brighter"
    shutil.copytree(tiny_pipeline_dir, folder)
    (weights,) = (folder / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"] + torch.full((3,), 0.2)
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def brightness(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward as a user writes one: the mean pixel."""
    file = tmp_path_factory.mktemp("reward") / "reward.py"
    file.write_text("def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    return f"{file}:brightness"
