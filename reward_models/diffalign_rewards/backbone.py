"""The CLIP model behind CLIP-based rewards: loaded once, shared, with its text embeddings remembered."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffalign.errors import RewardError
from diffalign.rewards import Images, NetworkReward, once_per_batch
from diffalign_rewards.open_clip_towers import load_open_clip
from diffalign_rewards.towers import Shortener
from diffalign_rewards.transformers_towers import CONFIG, FILES, load_transformers
from diffalign_rewards.weights import fetch_hub_folder, hub_id, local_path

DEFAULT_ARCHITECTURE = "ViT-L-14-quickgelu"
DEFAULT_PRETRAINED = "openai"
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_REMEMBERED_PROMPTS = 10_000


@dataclass(frozen=True)
class BackboneSpec:
    """Which CLIP model: a folder, a file of an architecture, or an architecture and its published weights.

    `processor` is the folder of tokenizer and preprocessing where they do not lie with the weights of a model of
    transformers. `pad` keeps the whole picture: its longest side is scaled, and black is added.
    """

    architecture: str | None
    pretrained: str | None
    checkpoint: Path | None
    processor: Path | None = None
    pad: bool = False
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, architecture: str | None, pretrained: str | None, checkpoint: str | None) -> BackboneSpec:
        """The options as a user gives them, checked and with defaults."""
        if checkpoint is None:
            return cls(architecture or DEFAULT_ARCHITECTURE, pretrained or DEFAULT_PRETRAINED, None)
        path = find_checkpoint(checkpoint)
        if pretrained is not None:
            raise RewardError(
                "CLIP takes a checkpoint or pretrained, not both", where=f"{path}, {pretrained}"
            )
        if path.is_dir():
            if architecture is not None:
                raise RewardError(
                    "a CLIP folder carries its own architecture",
                    where=str(path),
                    hint="leave architecture out",
                )
            _require_model_folder(path)
        elif path.suffix != ".safetensors":
            raise RewardError(
                "local CLIP weights must be safetensors",
                where=str(path),
                why="a pickle can run code when it is loaded",
                hint="convert it once: safetensors.torch.save_file(state_dict, 'model.safetensors')",
            )
        elif architecture is None:
            raise RewardError(
                "a CLIP weight file needs its architecture",
                where=str(path),
                hint="e.g. architecture: ViT-B-32",
            )
        return cls(architecture, None, path)

    @property
    def of_transformers(self) -> bool:
        """Whether the model is a folder of transformers, not of open_clip."""
        return self.architecture is None and not _holds_open_clip(self.checkpoint)

    def __str__(self) -> str:
        return str(self.checkpoint or f"{self.architecture} / {self.pretrained}")


def find_checkpoint(name: str) -> Path:
    """A local file or folder, or the folder in the hub's cache of `owner/name` or `owner/name@revision`."""
    hub = hub_id(name)
    if hub is None:
        return local_path(name, "the CLIP checkpoint")
    repository, revision = hub
    folder = fetch_hub_folder(repository, revision, ["*.json", "*.txt", "*.model"], "*config.json")
    if (folder / CONFIG).is_file():
        return fetch_hub_folder(repository, revision, FILES, "model*.safetensors")
    return fetch_hub_folder(repository, revision, _OPEN_CLIP_WEIGHTS, "open_clip*.safetensors")


def _holds_open_clip(folder: Path | None) -> bool:
    return folder is None or ((folder / _OPEN_CLIP_CONFIG).is_file() and _has_weights(folder))


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _OPEN_CLIP_WEIGHTS)


def _require_model_folder(folder: Path) -> None:
    if _holds_open_clip(folder) or ((folder / CONFIG).is_file() and any(folder.glob("model*.safetensors"))):
        return
    if not (folder / _OPEN_CLIP_CONFIG).is_file() and not (folder / CONFIG).is_file():
        raise RewardError(f"the CLIP folder has no {_OPEN_CLIP_CONFIG} and no {CONFIG}", where=str(folder))
    raise RewardError(
        f"the CLIP folder has no {_OPEN_CLIP_WEIGHTS[0]} or model.safetensors",
        where=str(folder),
        why=f"it holds {', '.join(sorted(path.name for path in folder.iterdir())[:8])}",
        hint="local CLIP weights must be safetensors; a pickle can run code when it is loaded",
    )


class Backbone:
    """A frozen CLIP model, its tokenizer and its preprocessing.

    Embeddings are float32 and L2-normalised. Text embeddings are remembered (the last 10,000 prompts).
    """

    def __init__(self, spec: BackboneSpec, device: str | torch.device) -> None:
        self.towers = load_transformers(spec) if spec.of_transformers else load_open_clip(spec)
        self.model, self.preprocessing = self.towers.model, self.towers.preprocessing
        self.device, self.dtype = torch.device(device), spec.dtype
        self.logit_scale = self.model.logit_scale.detach().double().exp().item()
        self.model.requires_grad_(False).eval().to(self.device, self.dtype)
        self.parameters = sum(weight.numel() for weight in self.model.parameters())
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self._shortener = Shortener("CLIP", self.towers.context)
        self._offloaded = False
        self.width = self.embed_texts([""]).shape[-1]

    def embed_images(self, images: Images) -> Tensor:
        """[B, width]; gradients reach a tensor of pictures."""
        return once_per_batch(self, images, lambda: self._embed_images(images))

    def _embed_images(self, images: Images) -> Tensor:
        self._bring_back()
        if isinstance(images, Tensor):
            pixels = self.preprocessing.tensor(images)
        else:
            pixels = self.preprocessing.pictures(images)
        return F.normalize(self.towers.encode_image(pixels.to(self.device, self.dtype)).float(), dim=-1)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """[B, width], without gradients."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if missing:
            self._bring_back()
            with torch.no_grad():
                tokens = self._tokenize(missing).to(self.device)
                embedded = F.normalize(self.towers.encode_text(tokens).float(), dim=-1)
            self._texts.update((prompt, row.clone()) for prompt, row in zip(missing, embedded, strict=True))
        for prompt in prompts:
            self._texts.move_to_end(prompt)
        embeddings = torch.stack([self._texts[prompt] for prompt in prompts])
        while len(self._texts) > _REMEMBERED_PROMPTS:
            self._texts.popitem(last=False)
        return embeddings

    def cosine(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """[B], of each picture and its own prompt."""
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(-1)

    def _tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids [B, context]; a prompt that is too long loses its last words, never its end token."""
        context = self.towers.context
        tokens = self.towers.tokenize(prompts, context)
        self._shortener.compare(prompts, tokens, self.towers.tokenize(prompts, context + 1))
        return tokens

    def offload(self) -> None:
        """Move the weights to the CPU until the next embedding that is not remembered."""
        self.model.to("cpu")
        self._offloaded = True

    def _bring_back(self) -> None:
        if self._offloaded:
            self.model.to(self.device)
            self._offloaded = False


_backbones: WeakValueDictionary[tuple[BackboneSpec, torch.device], Backbone] = WeakValueDictionary()


def shared_backbone(spec: BackboneSpec, device: str | torch.device) -> Backbone:
    """The model, loaded once for all rewards that use it on this device, and freed with the last of them."""
    key = (spec, torch.device(device))
    backbone = _backbones.get(key)
    if backbone is None:
        backbone = _backbones[key] = Backbone(spec, device)
    return backbone


class BackboneReward(NetworkReward):
    """Base of rewards that are a function of CLIP's embeddings. Those of one spec share weights and passes."""

    differentiable = True
    spec: BackboneSpec
    backbone: Backbone

    @property
    def parameters(self) -> int:
        return self.backbone.parameters

    def to(self, device: str | torch.device) -> Self:
        self.backbone = shared_backbone(self.spec, device)
        return super().to(device)

    def offload(self) -> None:
        self.backbone.offload()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.judge(images, prompts)

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.judge(pictures, prompts)

    @abstractmethod
    def judge(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of pictures in either form."""
