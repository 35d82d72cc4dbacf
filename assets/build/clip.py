"""Stage 4: a small CLIP of the Shapes world in open_clip's own classes, and an aesthetic head on it.

A learned reward, so an imperfect one: it sees in-domain pictures only, and is stopped while it still mixes up
shapes and relations. Each scene of a batch comes with a rival that differs in one attribute, because a batch of
unrelated captions can be told apart without counts and relations. The picture side is CLIP's ResNet; a vision
transformer of the same cost learns no relations in the time that this one takes.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import CLIPTokenizer
from world import CONTEXT_LENGTH, caption, train_tokenizer

from diffalign.data.shapes import (
    BACKGROUND,
    SIZE,
    Attribute,
    Scene,
    Split,
    corrupt,
    draw_scene,
    is_held_out,
    render,
)

EMBEDDING = 64
VISION: dict[str, Any] = {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
TEXT: dict[str, Any] = {
    "context_length": CONTEXT_LENGTH,
    "width": 64,
    "heads": 4,
    "layers": 2,
    "hf_tokenizer_name": "tokenizer",
}
MEAN, STD = 0.2, 0.25
PREPROCESSING = {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}

PAIRS = 32
"""Scenes a batch; each brings its rival, so a batch has twice as many pictures and captions."""
STEPS = 430
PEAK_LEARNING_RATE = 2e-3
MAX_LOGIT_SCALE = 100.0

TASTE_PICTURES = 6000
RIDGE = 1e-5
"""Per picture, relative to unit embeddings."""


# --- batches ------------------------------------------------------------------------------------------------


def draw_pair(rng: np.random.Generator) -> tuple[Scene, Scene]:
    """An in-domain scene, and an in-domain rival that differs in one attribute."""
    while True:
        scene = draw_scene(rng, "eval" if rng.random() < 0.2 else "train")
        rival = corrupt(scene, rng)
        if not is_held_out(rival):
            return scene, rival


def pair_batch(step: int, pairs: int = PAIRS) -> tuple[Tensor, list[str]]:
    """Pictures [2 * pairs, 3, 64, 64] in [0, 1] and their captions; no two of a batch mean the same."""
    rng = np.random.default_rng([3, step])
    scenes: list[Scene] = []
    seen: set[Scene] = set()
    while len(scenes) < 2 * pairs:
        pair = draw_pair(rng)
        meanings = {scene.canonical() for scene in pair}
        if meanings.isdisjoint(seen):
            scenes += pair
            seen |= meanings
    return distort(draw(scenes, rng), step), [caption(scene, rng) for scene in scenes]


def draw(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    """Pictures of the scenes, [N, 3, 64, 64] in [0, 1]."""
    pictures = np.stack([np.asarray(render(scene, rng)) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def distort(pictures: Tensor, seed: int) -> Tensor:
    """What a decoder does, to each picture to its own degree: soft edges, faint grain, small blotches."""
    generator = torch.Generator().manual_seed(seed)
    n = len(pictures)

    def degree(most: float) -> Tensor:
        return most * torch.rand(n, 1, 1, 1, generator=generator)

    taps = torch.exp(-0.5 * torch.arange(-2.0, 3.0).square())
    kernel = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, 5, 5)
    soft = F.conv2d(F.pad(pictures, (2,) * 4, mode="replicate"), kernel, groups=3)
    grain = torch.randn(pictures.shape, generator=generator)
    blotches = F.interpolate(torch.randn(n, 3, 12, 12, generator=generator), SIZE, mode="bilinear")
    mixed = torch.lerp(pictures, soft, degree(1.0)) + degree(0.03) * grain + degree(0.04) * blotches
    return mixed.clamp(0, 1)


# --- the model ----------------------------------------------------------------------------------------------


def model_config(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """open_clip's `model_cfg`."""
    text = {**TEXT, "vocab_size": len(tokenizer)}
    return {"embed_dim": EMBEDDING, "vision_cfg": VISION, "text_cfg": text}


def contrastive_loss(pictures: Tensor, captions: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross entropy (arXiv:2103.00020, figure 3) of matching embeddings [N, D]."""
    logits = scale * F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T
    target = torch.arange(len(logits))
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def learning_rate(step: int) -> float:
    """100 steps of warm-up, then a cosine to zero."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def new_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Weight decay on matrices only, as in CLIP."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": 0.05},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))


def train_clip(folder: Path) -> None:
    """Train into `folder` (open_clip's hub layout); continues from `folder/state.pt` when interrupted."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    model = open_clip.CLIP(**model_config(tokenizer))
    optimizer = new_optimizer(model)
    folder.mkdir(parents=True, exist_ok=True)
    state_file, first = folder / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started = time.time()
    for step in range(first, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        pictures, captions = pair_batch(step)
        seen = model.encode_image((pictures - MEAN) / STD)
        read = model.encode_text(tokens(tokenizer, captions))
        loss = contrastive_loss(seen, read, model.logit_scale.exp())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))
        if (step + 1) % 50 == 0:
            print(f"clip {step + 1}/{STEPS} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
        if (step + 1) % 100 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, state_file)
    write_clip(model, tokenizer, folder)
    state_file.unlink(missing_ok=True)


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [N, context], padded with the end token."""
    padded = tokenizer(captions, padding="max_length", max_length=CONTEXT_LENGTH, return_tensors="pt")
    return padded.input_ids


def write_clip(model: torch.nn.Module, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """The folder that is `bundled:clip`; weights in float16, which open_clip reads into float32."""
    config = {"model_cfg": model_config(tokenizer), "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    trained = dict(model.named_parameters())
    weights = {name: t.half() if name in trained else t for name, t in model.state_dict().items()}
    (folder / "open_clip_model.safetensors").write_bytes(save(weights))


# --- the aesthetic head -------------------------------------------------------------------------------------


def taste(pictures: Tensor) -> Tensor:
    """What people of this world find beautiful, [N] in 1 to 10, of pictures [N, 3, 64, 64] in [0, 1].

        1 + 9 * (0.40 warmth + 0.20 brightness + 0.25 balance + 0.15 fullness)

    Foreground: pixels with a channel more than 0.15 from the background colour. All four are in [0, 1]:
    warmth: mean of (1 + red - blue) / 2 over the foreground; brightness: mean of 0.3 red + 0.59 green +
    0.11 blue over it; balance: 1 - distance of its centroid from the picture's centre / 32 pixels, at
    least 0; fullness: its share of the picture / 0.15, at most 1. An empty picture has none of them: 1.
    """
    background = torch.tensor(BACKGROUND).view(3, 1, 1) / 255
    foreground = ((pictures - background).abs().amax(1) > 0.15).float()
    area = foreground.sum((1, 2))
    red, green, blue = pictures.unbind(1)

    def mean(values: Tensor) -> Tensor:
        return (values * foreground).sum((1, 2)) / area.clamp(min=1)

    offset = torch.arange(SIZE) - (SIZE - 1) / 2
    distance = torch.hypot(mean(offset.view(1, 1, SIZE)), mean(offset.view(1, SIZE, 1)))
    warmth = mean((1 + red - blue) / 2)
    brightness = mean(0.3 * red + 0.59 * green + 0.11 * blue)
    balance = (1 - distance / (SIZE / 2)).clamp(min=0) * (area > 0)
    fullness = (area / (0.15 * SIZE**2)).clamp(max=1)
    return 1 + 9 * (0.40 * warmth + 0.20 * brightness + 0.25 * balance + 0.15 * fullness)


@torch.no_grad()
def rated_pictures(folder: Path, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised embeddings [count, D] of fresh distorted in-domain pictures, and their taste [count]."""
    model = load_clip(folder)
    rng = np.random.default_rng([4, seed])
    embeddings, ratings = [], []
    for start in range(0, count, 100):
        pictures = draw([draw_scene(rng, "train") for _ in range(min(100, count - start))], rng)
        ratings.append(taste(pictures))
        embeddings.append(embed_pictures(model, distort(pictures, seed * 1_000_000 + start)))
    return torch.cat(embeddings), torch.cat(ratings)


def train_aesthetic(folder: Path) -> None:
    """Ridge regression from embedding to taste, in closed form, into `folder/aesthetic.safetensors`."""
    torch.set_num_threads(1)
    embeddings, ratings = (values.double() for values in rated_pictures(folder, TASTE_PICTURES, seed=0))
    centre = embeddings.mean(0)
    x, y = embeddings - centre, ratings - ratings.mean()
    weight = torch.linalg.solve(x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    bias = ratings.mean() - centre @ weight
    head = {"weight": weight[None].float(), "bias": bias[None].float()}
    (folder / "aesthetic.safetensors").write_bytes(save(head))


# --- how good it is -----------------------------------------------------------------------------------------


def load_clip(folder: Path) -> torch.nn.Module:
    """The finished model as users load it, float32."""
    return open_clip.create_model(f"local-dir:{folder}", precision="fp32", require_pretrained=True).eval()


def embed_pictures(model: torch.nn.Module, pictures: Tensor) -> Tensor:
    """L2-normalised embeddings of pictures in [0, 1]."""
    return model.encode_image((pictures - MEAN) / STD, normalize=True)


@torch.no_grad()
def caption_accuracy(folder: Path, split: Split, attribute: Attribute, count: int = 500) -> float:
    """Share of clean pictures for which the true caption scores above one with `attribute` wrong."""
    model, tokenizer = load_clip(folder), CLIPTokenizer.from_pretrained(folder)
    rng = np.random.default_rng([5, count])
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = draw_scene(rng, split)
        if attribute in ("colour", "shape") or (attribute == "relation") == (scene.relation is not None):
            scenes.append(scene)
    pictures = embed_pictures(model, draw(scenes, rng))
    true = [caption(scene, rng) for scene in scenes]
    wrong = [caption(corrupt(scene, rng, attribute), rng) for scene in scenes]
    right, mistaken = (
        (pictures * model.encode_text(tokens(tokenizer, captions), normalize=True)).sum(1)
        for captions in (true, wrong)
    )
    return (right > mistaken).float().mean().item()


def aesthetic_fit(folder: Path, count: int = 2000) -> float:
    """R squared of the head on fresh distorted pictures."""
    embeddings, ratings = rated_pictures(folder, count, seed=1)
    head = load_file(folder / "aesthetic.safetensors")
    error = embeddings @ head["weight"][0] + head["bias"] - ratings
    return 1 - (error.square().mean() / ratings.var(correction=0)).item()
