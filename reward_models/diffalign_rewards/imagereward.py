"""ImageReward (Xu et al. 2023, arXiv:2304.05977): BLIP, fine-tuned on rankings by experts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import RewardError
from diffalign.rewards import NetworkReward
from diffalign_rewards.blip import BLIP, Sizes
from diffalign_rewards.preprocessing import Preprocessing
from diffalign_rewards.towers import Shortener
from diffalign_rewards.weights import (
    HubFile,
    fetch_hub_folder,
    fetch_pinned,
    hub_id,
    local_path,
    read_tensors,
    verify,
)

WEIGHTS = HubFile(
    "THUDM/ImageReward",
    "ImageReward.pt",
    "5736be03b2652728fb87788c9797b0570450ab72",
    "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
)
TOKENIZER = "google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594"
CONTEXT = 35
"""Tokens of a prompt, [CLS] and [SEP] included."""
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw score on the authors' data."""
UNUSED = (
    "blip.text_encoder.embeddings.position_ids",
    "blip.text_proj.bias",
    "blip.text_proj.weight",
    "blip.vision_proj.bias",
    "blip.vision_proj.weight",
)
"""In the published file, but without influence on the score."""
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Network(nn.Module):
    """The raw score [B]: BLIP's state at [CLS], and linear layers without activations (in float32)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.blip = BLIP(sizes)
        pairs = pairwise((sizes.text_width, 1024, 128, 64, 16, 1))
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for place, (width, next_width) in zip("02467", pairs, strict=True):  # the places of dropout are empty
            layers[place] = nn.Linear(width, next_width)
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(layers)})

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return self.mlp["layers"](self.blip(pixels, ids, mask).float())[:, 0]


class ImageReward(NetworkReward):
    """ImageReward: human preference for a picture of the prompt, mostly -2 to 2.

        (raw score - 0.16717363) / 1.03333950

    Args:
        checkpoint: a local copy of ImageReward.pt, or a .safetensors file of its tensors.
        tokenizer: a folder with BERT's tokenizer (vocab.txt or tokenizer.json), or such a folder on the hub; default
            google-bert/bert-base-uncased.
        dtype, batch_size: as in `NetworkReward`.
    """

    name = "imagereward"
    differentiable = True
    license = "Apache-2.0"

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        tokenizer: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(dtype=dtype, batch_size=batch_size)
        path = _find_weights(checkpoint)
        self.network, sizes = build_network(read_tensors(path), str(path))
        self.network.requires_grad_(False).eval()
        self.network.blip.to(self.dtype)
        self.network.mlp.float()
        self.tokenizer = _load_tokenizer(tokenizer or TOKENIZER, sizes.vocabulary)
        self.preprocessing = Preprocessing((sizes.image, sizes.image), _CLIP_MEAN, _CLIP_STD)
        self._shortener = Shortener("ImageReward", CONTEXT)
        self.to(device)

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.network.parameters())

    def to(self, device: str | torch.device) -> Self:
        self.network.to(device)
        return super().to(device)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score(self.preprocessing.tensor(images), prompts)

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._score(self.preprocessing.pictures(pictures), prompts)

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokenize(list(prompts))
        ids, mask = (tokens[part].to(self.device) for part in ("input_ids", "attention_mask"))
        return (self.network(pixels.to(self.device, self.dtype), ids, mask) - MEAN) / STD

    def _tokenize(self, prompts: list[str]) -> Mapping[str, Tensor]:
        """Ids and mask [B, 35]; a prompt that is too long loses its last words, never its end token."""
        tokens, room = (
            self.tokenizer(
                prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            )
            for length in (CONTEXT, CONTEXT + 1)
        )
        self._shortener.compare(prompts, tokens["input_ids"], room["input_ids"])
        return tokens


def build_network(tensors: Mapping[str, Tensor], where: str) -> tuple[Network, Sizes]:
    """The network of these weights; every one of them must find its place.

    Raises:
        RewardError: they are incomplete, or of another model.
    """
    used = {key: value for key, value in tensors.items() if key not in UNUSED}
    blip = {key.removeprefix("blip."): value for key, value in used.items()}
    try:
        sizes = Sizes.of(blip)
        with torch.device("meta"):
            network = Network(sizes)
        network.load_state_dict(used, assign=True)
    except (KeyError, RuntimeError) as error:
        raise RewardError(
            "the weights are not ImageReward's",
            where=where,
            why=f"missing: {error.args[0]}"
            if isinstance(error, KeyError)
            else " ".join(str(error).split())[:400],
            hint=f"expected the tensors of {WEIGHTS.name} from {WEIGHTS.repository}",
        ) from error
    return network, sizes


def _find_weights(checkpoint: str | None) -> Path:
    if checkpoint is None:
        return fetch_pinned(WEIGHTS)
    path = local_path(checkpoint, "the ImageReward checkpoint")
    if path.suffix == ".pt":
        verify(path, WEIGHTS.sha256, hint=f"{WEIGHTS.name} of {WEIGHTS.repository}, or a .safetensors file")
    elif path.suffix != ".safetensors":
        raise RewardError(
            "local ImageReward weights must be ImageReward.pt or safetensors",
            where=str(path),
            why="another pickle can run code when it is loaded",
        )
    return path


def _load_tokenizer(name: str, vocabulary: int) -> Any:
    from transformers import BertTokenizer

    hub = hub_id(name)
    if hub is None:
        folder = local_path(name, "the tokenizer of ImageReward")
    else:
        folder = fetch_hub_folder(*hub, ["tokenizer*.json", "vocab.txt"], "vocab.txt", "tokenizer")
    try:
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise RewardError(
            "the tokenizer of ImageReward cannot be loaded",
            where=str(folder),
            why=" ".join(str(error).split())[:400],
            hint="the folder needs vocab.txt or tokenizer.json of bert-base-uncased",
        ) from error
    if len(tokenizer) > vocabulary:
        raise RewardError(
            "the tokenizer does not fit ImageReward",
            where=str(folder),
            why=f"it has {len(tokenizer)} tokens, the model knows {vocabulary}",
        )
    return tokenizer
