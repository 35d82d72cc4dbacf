"""BLIP (Li et al. 2022, arXiv:2201.12086) as ImageReward uses it: a vision transformer, and a BERT that reads it.

Modules carry the names of the published checkpoints, so that weights load as they are. Shapes: B pictures with one
text each, P patches and one class token, N tokens of text, D the width of a tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HEAD_WIDTH = 64


@dataclass(frozen=True)
class Sizes:
    """Sizes of both towers, as BLIP's ViT-L/16 and BERT-base have them."""

    vision_width: int = 1024
    vision_layers: int = 24
    patch: int = 16
    image: int = 224
    text_width: int = 768
    text_layers: int = 12
    vocabulary: int = 30524
    positions: int = 512

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Sizes:
        """Read from the weights of a `BLIP`. Raises KeyError where they are not BLIP's."""
        patches = tensors["visual_encoder.patch_embed.proj.weight"]
        words = tensors["text_encoder.embeddings.word_embeddings.weight"]
        side = round((tensors["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
        return cls(
            vision_width=patches.shape[0],
            vision_layers=_layers(tensors, "visual_encoder.blocks."),
            patch=patches.shape[-1],
            image=side * patches.shape[-1],
            text_width=words.shape[1],
            text_layers=_layers(tensors, "text_encoder.encoder.layer."),
            vocabulary=words.shape[0],
            positions=tensors["text_encoder.embeddings.position_embeddings.weight"].shape[0],
        )


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})


class BLIP(nn.Module):
    """Pictures and texts to the text's state after it has looked at the picture."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.visual_encoder = VisionTransformer(sizes)
        self.text_encoder = TextEncoder(sizes)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, D] of [B, 3, image, image], token ids [B, N] and their mask [B, N] (0: padding)."""
        return self.text_encoder(ids, mask, self.visual_encoder(pixels))[:, 0]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention [B, N, D] over heads of 64."""
    query, key, value = (x.unflatten(-1, (-1, _HEAD_WIDTH)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


# --- the vision transformer: pre-norm -----------------------------------------------------------------------


class VisionTransformer(nn.Module):
    """[B, 3, image, image] to [B, 1 + P, D]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, patches = sizes.vision_width, (sizes.image // sizes.patch) ** 2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, sizes.patch, sizes.patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(sizes.vision_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["proj"](_attend(*self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


# --- BERT with cross-attention: post-norm -------------------------------------------------------------------


class TextEncoder(nn.Module):
    """Token ids [B, N], their mask [B, N] and the picture [B, 1 + P, D] to [B, N, D]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.text_width
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(sizes.vocabulary, width),
                "position_embeddings": nn.Embedding(sizes.positions, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        layers = nn.ModuleList(TextLayer(width, sizes.vision_width) for _ in range(sizes.text_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, ids: Tensor, mask: Tensor, picture: Tensor) -> Tensor:
        positions = self.embeddings["position_embeddings"](torch.arange(ids.shape[1], device=ids.device))
        x = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](ids) + positions)
        visible = mask.bool()[:, None, None, :]
        for layer in self.encoder["layer"].children():
            x = layer(x, visible, picture)
        return x


class TextLayer(nn.Module):
    def __init__(self, width: int, picture_width: int) -> None:
        super().__init__()
        self.attention = TextAttention(width, width)
        self.crossattention = TextAttention(width, picture_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = Added(4 * width, width)

    def forward(self, x: Tensor, visible: Tensor, picture: Tensor) -> Tensor:
        x = self.attention(x, x, visible)
        x = self.crossattention(x, picture, None)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class TextAttention(nn.Module):
    def __init__(self, width: int, seen_width: int) -> None:
        super().__init__()
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(seen_width, width),
                "value": nn.Linear(seen_width, width),
            }
        )
        self.output = Added(width, width)

    def forward(self, x: Tensor, seen: Tensor, visible: Tensor | None) -> Tensor:
        query, key, value = self.self["query"](x), self.self["key"](seen), self.self["value"](seen)
        return self.output(_attend(query, key, value, visible), x)


class Added(nn.Module):
    """LayerNorm(dense(change) + x)."""

    def __init__(self, change_width: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(change_width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, change: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(change) + x)
