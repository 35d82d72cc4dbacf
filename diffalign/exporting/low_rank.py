"""LoRA updates for formats that know one alpha a network, or fuse layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.models.lora_updates import Update, Updates


def require_plain(updates: Updates) -> None:
    """Raise ConfigError for an adapter that is more than a low-rank update (DoRA)."""
    for name, update in updates.items():
        if update.magnitude is not None:
            raise ConfigError(
                "--format kohya: a DoRA cannot be written as a plain low-rank update",
                where=name,
                why="it also scales the rows of the weight that it is added to",
                hint="use --format merged or single-file, or diffusers or peft, which keep its magnitudes",
            )


def alpha_of(update: Update) -> float:
    """The alpha with which alpha / rank is the scale of the update."""
    return update.scale * update.rank


def with_one_alpha(updates: Updates) -> dict[str, Update]:
    """The same updates with the alpha that most of them have; the difference goes into `up`.

    diffusers reads the alphas of a kohya file right where those of a network are equal.
    """
    usual = Counter(alpha_of(update) for update in updates.values()).most_common(1)[0][0]
    return {
        name: update if alpha_of(update) == usual else with_scale(update, usual / update.rank)
        for name, update in updates.items()
    }


def with_scale(update: Update, scale: float) -> Update:
    """The same update with another scale."""
    return replace(update, up=update.up * (update.scale / scale), scale=scale)


def stacked(parts: Sequence[tuple[int, Update | None]]) -> Update:
    """The update of a linear layer whose outputs are those of several, one after another.

    Args:
        parts: (rows of the layer, its update or None) in the order of the rows; at least one has an update.

    Returns:
        All `down` in one, and a block-diagonal `up`: [rows together, ranks together].
    """
    given = [update for _, update in parts if update is not None]
    scale = given[0].scale
    down = torch.cat([update.down for update in given])
    up = down.new_zeros(sum(rows for rows, _ in parts), len(down))
    row = column = 0
    for rows, update in parts:
        if update is not None:
            up[row : row + rows, column : column + update.rank] = with_scale(update, scale).up
            column += update.rank
        row += rows
    return Update(down, up, scale)


def flip(rows: Tensor) -> Tensor:
    """The two halves of the rows in the other order."""
    first, second = rows.chunk(2)
    return torch.cat([second, first])
