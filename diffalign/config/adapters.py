"""Low-rank adapters: the one that is trained, and those that there are already."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from diffalign.config.base import Options, raise_all


class LoRAConfig(Options):
    kind: Literal["lora", "rslora", "dora"] = "lora"
    """lora: update scaled by alpha / rank (Hu et al. 2021). rslora: by alpha / sqrt(rank), made for high ranks
    (Kalajdzievski 2023). dora: also trains the length of each row of the weights (Liu et al. 2024); slower."""
    rank: PositiveInt = 4
    """Rank of the low-rank update of each target module."""
    alpha: PositiveFloat | None = None
    """Scale numerator: the update is multiplied by alpha / rank. Default: alpha = rank."""
    rank_by_module: dict[str, PositiveInt] = {}
    """Other ranks, by pattern: {attn2.to_k: 16}. A pattern is a regular expression for the end of a module's name,
    beginning at a dot; the first that matches counts."""
    alpha_by_module: dict[str, PositiveFloat] = {}
    """Other alphas, by pattern. A module with a rank of its own has alpha = that rank unless an alpha is given."""
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    """Patterns for the denoising network's linear and convolution layers that get an adapter. Default: the projections
    of its attention (to_q, to_k, to_v, to_out.0; in the joint attention of SD 3 and FLUX also those of the prompt)."""
    exclude_modules: list[str] = []
    """Patterns for layers that get none although a target matches them."""

    @model_validator(mode="after")
    def _patterns_are_regular_expressions(self) -> LoRAConfig:
        given: dict[str, Iterable[str]] = {
            "rank_by_module": self.rank_by_module,
            "alpha_by_module": self.alpha_by_module,
            "target_modules": self.target_modules or [],
            "exclude_modules": self.exclude_modules,
        }
        broken = [(name, p) for name, patterns in given.items() for p in patterns if not _is_pattern(p)]
        return raise_all(
            self, [f"{name}: {pattern!r} is not a regular expression" for name, pattern in broken]
        )


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return bool(text)


class AdapterConfig(Options):
    path: Annotated[str, Field(min_length=1)]
    """A LoRA: a .safetensors file of diffusers or kohya, a folder with one, a PEFT folder, a finished run, a hub id."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of `path`."""
    weight_name: str | None = None
    """The file inside a folder or hub repository that holds several."""
    weight: float = 1.0
    """Factor on the adapter's update. Only for merge and freeze."""
    mode: Literal["merge", "freeze", "continue"] = "merge"
    """merge: added to the base weights. freeze: kept beside them as it is, under the adapter that is trained. Both are
    part of the reference. continue: this adapter is what is trained, with its own rank, alpha and modules; the
    reference is what it is at the start of the run."""


def adapter_problems(lora: LoRAConfig | None, adapters: Sequence[AdapterConfig]) -> Iterator[str]:
    """What contradicts itself in the `lora` and `adapters` of a model, one line each."""
    modes = [adapter.mode for adapter in adapters]
    if modes.count("continue") > 1:
        yield "adapters: at most one adapter is trained on (mode: continue)"
    for index, adapter in enumerate(adapters):
        name = f"adapters.{index}"
        if adapter.weight == 0:
            yield f"{name}.weight: 0 leaves the adapter out (remove the entry)"
        elif adapter.mode == "continue" and adapter.weight != 1:
            yield f"{name}.weight: an adapter that is trained on starts as it is (leave weight out)"
        if lora is None and adapter.mode != "merge":
            yield f"{name}.mode: lora: null trains all weights, and {adapter.mode} needs an adapter (use merge)"
    if lora is None:
        return
    default = LoRAConfig()
    changed = [
        option for option in LoRAConfig.model_fields if getattr(lora, option) != getattr(default, option)
    ]
    if "continue" in modes and changed:
        yield f"lora: {', '.join(changed)} come from the adapter that is trained on (leave lora out)"
    if lora.kind == "dora" and {"merge", "freeze"} & set(modes):
        yield (
            "lora.kind: a dora over other adapters cannot be written as one adapter of the base model; use lora or "
            "rslora, or make a base model of path and adapters first (diffusers: fuse_lora, save_pretrained)"
        )
