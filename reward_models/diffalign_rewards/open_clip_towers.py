"""CLIP models of open_clip: an architecture and its published weights, a folder, or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffalign.errors import RewardError
from diffalign_rewards.preprocessing import Preprocessing
from diffalign_rewards.towers import Towers
from diffalign_rewards.weights import fetch_hub

if TYPE_CHECKING:
    from diffalign_rewards.backbone import BackboneSpec

_HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def load_open_clip(spec: BackboneSpec) -> Towers:
    """The model of the spec, its tokenizer and its preprocessing.

    Raises:
        RewardError: no such architecture or weights, or they do not belong together.
    """
    model, tokenizer = _load(spec)
    _require_fitting_tokenizer(model, tokenizer, spec)
    preprocessing = Preprocessing.from_open_clip(model.visual.preprocess_cfg)

    def tokenize(prompts: list[str], length: int) -> Tensor:
        return tokenizer(prompts, context_length=length)

    return Towers(
        model=model,
        preprocessing=replace(preprocessing, resize_mode="longest") if spec.pad else preprocessing,
        encode_image=model.encode_image,
        encode_text=model.encode_text,
        tokenize=tokenize,
        context=tokenizer(["a"]).shape[1],
    )


def _load(spec: BackboneSpec) -> tuple[Any, Any]:
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
