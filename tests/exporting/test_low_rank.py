"""Updates with another alpha, and of fused layers, add the same to the weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffalign.errors import ConfigError
from diffalign.exporting.kohya import kohya_weights
from diffalign.exporting.low_rank import alpha_of, stacked, with_one_alpha
from diffalign.models.lora_updates import Update


def update(rank: int, scale: float, rows: int = 4, seed: int = 0) -> Update:
    draw = torch.Generator().manual_seed(seed)
    return Update(torch.randn(rank, 3, generator=draw), torch.randn(rows, rank, generator=draw), scale)


def delta(found: Update) -> Tensor:
    return found.scale * found.up @ found.down


def test_one_alpha_for_all_changes_no_update():
    updates = {"a": update(2, 2.5), "b": update(2, 2.5, seed=1), "c": update(4, 0.5, seed=2)}
    found = with_one_alpha(updates)
    assert {name: alpha_of(value) for name, value in found.items()} == dict.fromkeys("abc", 5.0)  # 2 x 2.5
    assert {name: value.rank for name, value in found.items()} == {"a": 2, "b": 2, "c": 4}
    for name in updates:
        assert_close(delta(found[name]), delta(updates[name]))


def test_stacked_layers_add_to_each_its_own():
    query, value = update(2, 2.5, rows=4), update(3, 0.5, rows=5, seed=1)
    found = stacked([(4, query), (6, None), (5, value)])
    assert found.rank == 5
    assert alpha_of(found) == 12.5  # 5 x 2.5
    assert_close(delta(found), torch.cat([delta(query), torch.zeros(6, 3), delta(value)]))


def test_a_dora_is_no_kohya_file():
    dora = replace(update(2, 2.5), magnitude=torch.ones(4))
    with pytest.raises(ConfigError, match="DoRA"):
        kohya_weights("StableDiffusion", {"unet": {"conv_in": dora}}, {})
