from __future__ import annotations

import pytest
import torch
from toys import ToyDenoiser

from diffalign.algorithms.base import Context
from diffalign.algorithms.latents import Latents, draw_noise
from diffalign.errors import DataError


def load(index, size):
    """Item i has i + 1 pictures of its own shade; the last one cannot be read."""
    if index == 2999:
        raise DataError("unreadable picture", where="row 2999")
    return torch.full((index % 3 + 1, 3, 2, 2), 0.5 + index / 10_000)


@pytest.mark.parametrize("cached", [True, False])
def test_items_of_several_pictures_keep_together(cached):
    latents = Latents(load, 40, ToyDenoiser(), Context(), cached=cached)
    taken = latents.take([5, 0, 39])
    assert [len(item) for item in taken] == [3, 1, 1]
    for index, item in zip([5, 0, 39], taken, strict=True):
        assert torch.allclose(item, torch.tensor(20 * index / 10_000), atol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_another_item_stands_in_for_an_unreadable_one(cached):
    said = []
    latents = Latents(load, 3000, ToyDenoiser(), Context(say=said.append), cached=cached)
    other = latents.index(2999)  # known before its latents are asked for
    assert other != 2999
    (item,) = latents.take([2999])
    assert torch.allclose(item, torch.tensor(20 * other / 10_000), atol=1e-5)
    assert len(said) == 1


def test_noise_depends_on_seed_purpose_and_position_only():
    toy = ToyDenoiser()
    noise, t = draw_noise(toy, 3, "a", [4, 5, 6])
    again, t_again = draw_noise(toy, 3, "a", [6])
    assert torch.equal(noise[2:], again)
    assert torch.equal(t[2:], t_again)
    assert noise.shape == (3, 1, 2, 2)
    assert not torch.equal(noise, draw_noise(toy, 3, "b", [4, 5, 6])[0])
    _, many = draw_noise(toy, 0, "a", range(2000))
    assert (int(many.min()), int(many.max())) == (0, toy.schedule.num_timesteps - 1)
