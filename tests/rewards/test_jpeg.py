"""JPEG size as a reward."""

from __future__ import annotations

import io

import torch
from diffalign_rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from torch import Tensor
from torch.testing import assert_close

from diffalign.images import to_pil


def test_score_is_the_kilobytes_of_the_file(images: Tensor, prompts: list[str]):
    sizes = []
    for picture in to_pil(images):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    assert_close(JPEGIncompressibility()(images, prompts), torch.tensor(sizes))
    assert_close(JPEGCompressibility()(images, prompts), -torch.tensor(sizes))
    assert_close(JPEGIncompressibility()(to_pil(images), prompts), torch.tensor(sizes))


def test_noise_is_incompressible():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    flat = torch.full((1, 3, 64, 64), 0.5)
    scores = JPEGIncompressibility()(torch.cat([noise, flat]), ["", ""])
    assert scores[0] > 5 * scores[1]


def test_scores_are_detached_where_pictures_require_gradients(images: Tensor, prompts: list[str]):
    assert not JPEGCompressibility()(images.requires_grad_(), prompts).requires_grad
