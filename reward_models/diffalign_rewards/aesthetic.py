"""LAION's aesthetic predictors: an affine map of the normalised CLIP image embedding."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, Self

import torch
from torch import Tensor

from diffalign.errors import RewardError
from diffalign.rewards import Images
from diffalign_rewards.backbone import DEFAULT_ARCHITECTURE, DEFAULT_PRETRAINED, BackboneReward, BackboneSpec
from diffalign_rewards.weights import Published, fetch, local_path, read_tensors

HEADS = {
    "v2": Published(
        "sac+logos+ava1-l14-linearMSE.pth",
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    ),
    "v1": Published(
        "sa_0_4_vit_l_14_linear.pth",
        "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
        "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
    ),
}
_LICENSES = {"v2": "Apache-2.0", "v1": "MIT"}


class AestheticReward(BackboneReward):
    """LAION aesthetic score of the picture (v2: about 3 to 7.5; v1: 1 to 10).

    Args:
        version: "v2" (the default) or "v1"; LAION's heads, made for OpenAI's ViT-L/14.
        head: a file instead: .safetensors or .pth with `weight` [1, D] and `bias` [1], or with the layers of
            the v2 MLP (`layers.N.weight`, `layers.N.bias`).
        architecture, pretrained, checkpoint: the CLIP model, as in the reward `clip`.
        dtype, batch_size: as in `NetworkReward`.
    """

    name = "aesthetic"
    needs_prompt = False

    def __init__(
        self,
        *,
        version: Literal["v1", "v2"] | None = None,
        head: str | None = None,
        architecture: str | None = None,
        pretrained: str | None = None,
        checkpoint: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(dtype=dtype, batch_size=batch_size)
        self.spec = replace(BackboneSpec.of(architecture, pretrained, checkpoint), dtype=self.dtype)
        if head is None:
            self.weight, self.bias = self._published_head(version or "v2")
            self.license = _LICENSES[version or "v2"]
        elif version is not None:
            raise RewardError("aesthetic takes a version or a head, not both", where=f"{version}, {head}")
        else:
            path = local_path(head, "the aesthetic head")
            self.weight, self.bias = affine_head(read_tensors(path), str(path))
            self.license = "of the given head"
        self.to(device)
        if self.backbone.width != len(self.weight):
            raise RewardError(
                "the aesthetic head does not fit the CLIP model",
                why=f"it takes embeddings of {len(self.weight)}, the model's have {self.backbone.width}",
                hint="LAION's heads belong to OpenAI's ViT-L/14; give the head made for this model",
            )
        norm, bias = self.weight.norm().item(), self.bias.item()
        self.range = (bias - norm, bias + norm)

    def _published_head(self, version: str) -> tuple[Tensor, Tensor]:
        if version not in HEADS:
            raise RewardError(
                f"there is no aesthetic version {version}", hint=f"choose from {', '.join(HEADS)}"
            )
        named = self.spec.checkpoint is None
        if named and (self.spec.architecture, self.spec.pretrained) != (
            DEFAULT_ARCHITECTURE,
            DEFAULT_PRETRAINED,
        ):
            raise RewardError(
                f"LAION's aesthetic head {version} belongs to another CLIP model",
                why=f"it was trained on {DEFAULT_ARCHITECTURE} / {DEFAULT_PRETRAINED}, not on {self.spec}",
                hint="leave architecture and pretrained out, or give a head of your own",
            )
        return affine_head(read_tensors(fetch(HEADS[version])), HEADS[version].name)

    @property
    def parameters(self) -> int:
        return super().parameters + len(self.weight) + 1

    def to(self, device: str | torch.device) -> Self:
        self.weight, self.bias = self.weight.to(device), self.bias.to(device)
        return super().to(device)

    def judge(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return self.backbone.embed_images(images) @ self.weight + self.bias


def affine_head(tensors: Mapping[str, Tensor], where: str) -> tuple[Tensor, Tensor]:
    """Weight [D] and bias [] of the head, float32.

    The v2 MLP has no activations between its layers, so their product (in float64) is the whole of it.
    """
    names = sorted({key.rpartition(".")[0] for key in tensors}, key=_layer_number)
    keys = {f"{name}.{part}".lstrip(".") for name in names for part in ("weight", "bias")}
    if set(tensors) != keys or not (names == [""] or all(_layer_number(name) >= 0 for name in names)):
        raise RewardError(
            "the file holds no aesthetic head",
            where=where,
            why=f"found {', '.join(sorted(tensors)[:6])}",
            hint="expected weight and bias, or layers.N.weight and layers.N.bias",
        )
    weight, bias = torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for name in reversed(names):
        layer_weight = tensors[f"{name}.weight".lstrip(".")].double()
        layer_bias = tensors[f"{name}.bias".lstrip(".")].double()
        if (
            layer_weight.ndim != 2
            or layer_bias.shape != layer_weight.shape[:1]
            or len(layer_bias) != weight.shape[1]
        ):
            raise RewardError(
                "the layers of the aesthetic head do not fit each other", where=f"{where}: {name}"
            )
        bias = bias + weight @ layer_bias
        weight = weight @ layer_weight
    return weight[0].float(), bias[0].float()


def _layer_number(name: str) -> int:
    match = re.fullmatch(r"layers\.(\d+)", name)
    return int(match[1]) if match else -1
