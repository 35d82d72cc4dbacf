"""A CLIP of open_clip's own classes at a tiny size, with random weights, as a folder in its hub layout."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

CONTEXT = 24
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": 514,
        "width": 32,
        "heads": 2,
        "layers": 2,
        "hf_tokenizer_name": "in this folder",
    },
}
PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.3, 0.35], "interpolation": "bicubic"}


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 px, 32-dimensional embeddings, 24 tokens of one character each. Do not write into it."""
    folder = tmp_path_factory.mktemp("clip")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=CONTEXT
    )
    tokenizer.save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESSING})
    )
    sizes = {key: dict(value) if isinstance(value, dict) else value for key, value in MODEL.items()}
    torch.manual_seed(0)
    model = open_clip.CLIP(**sizes)
    with torch.no_grad():
        for weight in model.parameters():  # open_clip starts at 0.02: every picture would embed nearly alike
            weight.add_(0.15 * torch.randn_like(weight))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear aesthetic head for the tiny CLIP."""
    path = tmp_path_factory.mktemp("head") / "aesthetic.safetensors"
    draw = torch.Generator().manual_seed(1)
    save_file({"weight": torch.randn(1, 32, generator=draw), "bias": torch.tensor([5.0])}, path)
    return path


@pytest.fixture
def images() -> torch.Tensor:
    """Eight smooth random pictures [8, 3, 80, 96]."""
    draw = torch.Generator().manual_seed(2)
    coarse = torch.rand(8, 3, 6, 6, generator=draw)
    return torch.nn.functional.interpolate(coarse, (80, 96), mode="bicubic").clamp(0, 1)


@pytest.fixture
def prompts() -> list[str]:
    return ["a red star", "two blue rings", "", "a cat", "a dog", "a red star", "Ünïcode!", "x"]
