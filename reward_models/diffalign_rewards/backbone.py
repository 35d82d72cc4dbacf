"""The open_clip model behind CLIP-based rewards: loaded once, shared, with its text embeddings remembered."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.errors import RewardError
from diffalign.rewards import Images, once_per_batch
from diffalign_rewards.preprocessing import Preprocessing
from diffalign_rewards.weights import fetch_hub, local_path

DEFAULT_ARCHITECTURE = "ViT-L-14-quickgelu"
DEFAULT_PRETRAINED = "openai"
_FOLDER_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_REMEMBERED_PROMPTS = 10_000


@dataclass(frozen=True)
class BackboneSpec:
    """Which CLIP model: a folder, a file of an architecture, or an architecture and its published weights."""

    architecture: str | None
    pretrained: str | None
    checkpoint: Path | None

    @classmethod
    def of(cls, architecture: str | None, pretrained: str | None, checkpoint: str | None) -> BackboneSpec:
        """The options as a user gives them, checked and with defaults."""
        if checkpoint is None:
            return cls(architecture or DEFAULT_ARCHITECTURE, pretrained or DEFAULT_PRETRAINED, None)
        path = local_path(checkpoint, "the CLIP checkpoint")
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
            _require_open_clip_folder(path)
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

    def __str__(self) -> str:
        return str(self.checkpoint or f"{self.architecture} / {self.pretrained}")


class Backbone:
    """A frozen open_clip model in float32, its tokenizer and its preprocessing.

    Embeddings are L2-normalised. Text embeddings are remembered (the last 10,000 prompts).
    """

    def __init__(self, spec: BackboneSpec, device: str | torch.device) -> None:
        self.model, self.tokenizer = _load_open_clip(spec)
        self.model.requires_grad_(False).eval().to(device)
        self.device = torch.device(device)
        self.preprocessing = Preprocessing.from_open_clip(self.model.visual.preprocess_cfg)
        self.parameters = sum(weight.numel() for weight in self.model.parameters())
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self._said_truncated = False
        _require_fitting_tokenizer(self.model, self.tokenizer, spec)
        self.width = self.embed_texts([""]).shape[-1]

    def embed_images(self, images: Images) -> Tensor:
        """[B, width]; gradients reach a tensor of pictures."""
        return once_per_batch(self, images, lambda: self._embed_images(images))

    def _embed_images(self, images: Images) -> Tensor:
        if isinstance(images, Tensor):
            pixels = self.preprocessing.tensor(images)
        else:
            pixels = self.preprocessing.pictures(images)
        return F.normalize(self.model.encode_image(pixels.to(self.device)), dim=-1)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """[B, width], without gradients."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if missing:
            with torch.no_grad():
                tokens = self._tokenize(missing).to(self.device)
                embedded = F.normalize(self.model.encode_text(tokens), dim=-1)
            self._texts.update((prompt, row.clone()) for prompt, row in zip(missing, embedded, strict=True))
        for prompt in prompts:
            self._texts.move_to_end(prompt)
        embeddings = torch.stack([self._texts[prompt] for prompt in prompts])
        while len(self._texts) > _REMEMBERED_PROMPTS:
            self._texts.popitem(last=False)
        return embeddings

    def _tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids [B, context]; a prompt that is too long loses its last words, never its end token."""
        tokens = self.tokenizer(prompts)
        room = self.tokenizer(prompts, context_length=tokens.shape[1] + 1)
        cut = (tokens != room[:, :-1]).any(1)
        if cut.any() and not self._said_truncated:
            self._said_truncated = True
            first = prompts[int(cut.nonzero()[0])]
            warnings.warn(
                f"CLIP reads the first {tokens.shape[1] - 2} tokens of a prompt; the rest of "
                f"{first[:60]!r}... is ignored (said once)",
                stacklevel=2,
            )
        return tokens


_backbones: WeakValueDictionary[tuple[BackboneSpec, torch.device], Backbone] = WeakValueDictionary()


def shared_backbone(spec: BackboneSpec, device: str | torch.device) -> Backbone:
    """The model, loaded once for all rewards that use it on this device, and freed with the last of them."""
    key = (spec, torch.device(device))
    backbone = _backbones.get(key)
    if backbone is None:
        backbone = _backbones[key] = Backbone(spec, device)
    return backbone


def _load_open_clip(spec: BackboneSpec) -> tuple[Any, Any]:
    import open_clip

    weights, preprocessing = spec.checkpoint, None
    if spec.architecture is None:
        model_name, weights = f"local-dir:{spec.checkpoint}", None
    else:
        model_name, config = spec.architecture, _known_architecture(spec.architecture)
        if spec.pretrained is not None:
            preprocessing = published = _published_weights(spec.architecture, spec.pretrained, config)
            repository, _, name = published["hf_hub"].rpartition("/")
            names = [str(Path(name).with_suffix(".safetensors")), name] if name else [*_HUB_WEIGHTS]
            weights = fetch_hub(repository, names)
    try:
        model = open_clip.create_model(
            model_name,
            pretrained=None if weights is None else str(weights),
            precision="fp32",
            force_preprocess_cfg=preprocessing,
            require_pretrained=True,
        )
        tokenizer = open_clip.get_tokenizer(model_name)
    except Exception as error:
        raise RewardError(
            f"the CLIP model {spec} cannot be loaded",
            why=" ".join(str(error).split())[:400],
            hint="check that weights, config and tokenizer belong together and are complete",
        ) from error
    return model, tokenizer


def _require_open_clip_folder(folder: Path) -> None:
    if not (folder / "open_clip_config.json").is_file():
        raise RewardError("the CLIP folder has no open_clip_config.json", where=str(folder))
    if not any((folder / name).is_file() for name in _FOLDER_WEIGHTS):
        raise RewardError(
            f"the CLIP folder has no {_FOLDER_WEIGHTS[0]}",
            where=str(folder),
            why=f"it holds {', '.join(sorted(path.name for path in folder.iterdir())[:8])}",
            hint="local CLIP weights must be safetensors; a pickle can run code when it is loaded",
        )


def _known_architecture(architecture: str) -> dict[str, Any]:
    """open_clip's configuration of the architecture."""
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        close = [name for name in open_clip.list_models() if architecture.lower()[:6] in name.lower()]
        raise RewardError(
            f"open_clip has no architecture named {architecture}",
            hint=f"similar: {', '.join(close[:12])}" if close else "open_clip.list_models() names all",
        )
    return config


def _published_weights(architecture: str, tag: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What open_clip knows of a tag: its repository (`hf_hub`) and its preprocessing."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    published = get_pretrained_cfg(architecture, tag)
    if not published:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise RewardError(
            f"there are no weights {tag} of {architecture}", hint=f"its tags: {', '.join(tags) or 'none'}"
        )
    if published.get("quick_gelu", False) != config.get("quick_gelu", False):
        needs = "needs" if published.get("quick_gelu") else "must not have"
        raise RewardError(
            f"the weights {tag} do not belong to {architecture}",
            why=f"they load, but {needs} QuickGELU, so every embedding would be silently wrong",
            hint="names that end in -quickgelu have it, e.g. architecture: ViT-L-14-quickgelu",
        )
    return published


def _require_fitting_tokenizer(model: Any, tokenizer: Any, spec: BackboneSpec) -> None:
    """CLIP reads the text embedding at the token with the highest id, which must be the end token."""
    text = getattr(model, "text", model)
    vocabulary = getattr(text, "vocab_size", None)
    hugging_face = getattr(tokenizer, "tokenizer", None)
    end = getattr(tokenizer, "eot_token_id", None) if hugging_face is None else hugging_face.eos_token_id
    tokens = tokenizer(["a"])[0]
    problem = None
    if vocabulary is not None and max(int(tokens.max()), end or 0) >= vocabulary:
        problem = f"it has ids up to {max(int(tokens.max()), end or 0)}, the model knows {vocabulary} tokens"
    elif (
        getattr(text, "text_pool_type", getattr(text, "pool_type", "")) == "argmax"
        and int(tokens.max()) != end
    ):
        problem = (
            f"the model reads at the highest id, here {int(tokens.max())}, which is not the end token {end}"
        )
    if problem:
        raise RewardError(
            "the tokenizer does not fit the CLIP model",
            where=str(spec),
            why=problem,
            hint="text_cfg.hf_tokenizer_name in open_clip_config.json selects the folder's own tokenizer",
        )
