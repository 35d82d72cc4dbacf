"""Stage 2: the text encoder, taught to read captions before it conditions anything.

Stable Diffusion's text encoder comes from CLIP, which has read millions of captions; ours reads the Shapes grammar.
It learns to name the scene (count, relation, shape and colour of each thing) from the states at and after the end
token, which see the whole caption; like Stable Diffusion's, it then stays frozen.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from world import CONTEXT_LENGTH, caption

from diffalign.data.shapes import COLOURS, COUNTS, RELATIONS, SHAPES, Scene, draw_scene

WIDTH, STEPS, BATCH = 64, 800, 64
NOTHING = 0
"""Class of the second thing's attributes, and of the relation, in a scene of one kind of thing."""


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A random CLIP text model, 3 layers of width 64."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def attributes(scene: Scene) -> list[int]:
    """count, relation, and shape and colour of the first and the second thing, as class numbers."""
    scene = scene.canonical()
    relation = RELATIONS.index(scene.relation) + 1 if scene.relation else NOTHING
    numbers = [scene.things[0].count - 1, relation]
    colours = list(COLOURS)
    for thing in scene.things:
        numbers += [SHAPES.index(thing.shape) + 1, colours.index(thing.colour) + 1]
    return numbers + [NOTHING] * (6 - len(numbers))


CLASSES = (len(COUNTS), len(RELATIONS) + 1, *(len(SHAPES) + 1, len(COLOURS) + 1) * 2)


def train_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Train from random weights; about a minute on one core."""
    torch.manual_seed(0)
    encoder, heads = new_text_encoder(tokenizer), nn.Linear(WIDTH, sum(CLASSES))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        tokens, labels = batch(tokenizer, np.random.default_rng([4, step]))
        after_end = (tokens == tokenizer.eos_token_id).cumsum(dim=1) > 0
        logits = heads(encoder(tokens)[0])[after_end].split(CLASSES, dim=1)
        wanted = labels[:, None].expand(-1, CONTEXT_LENGTH, -1)[after_end]
        loss = sum(F.cross_entropy(part, wanted[:, i]) for i, part in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            right = torch.stack([part.argmax(1) == wanted[:, i] for i, part in enumerate(logits)]).all(dim=0)
            print(f"text {step + 1}/{STEPS} captions read right {right.float().mean():.3f}", flush=True)
    return encoder.eval()


def batch(tokenizer: CLIPTokenizer, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Captions of in-domain scenes as tokens [B, L], and their attributes [B, 6]."""
    scenes = [draw_scene(rng, ("train", "eval")[i % 2]) for i in range(BATCH)]
    captions = [caption(scene, rng) for scene in scenes]
    tokens = tokenizer(
        captions, padding="max_length", max_length=CONTEXT_LENGTH, return_tensors="pt"
    ).input_ids
    return tokens, torch.tensor([attributes(scene) for scene in scenes])
