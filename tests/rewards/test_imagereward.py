"""ImageReward on a tiny BLIP, against transformers' own BLIP; the published file's names at full size."""

from __future__ import annotations

import hashlib
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffalign_rewards import imagereward
from diffalign_rewards.blip import Sizes
from diffalign_rewards.imagereward import UNUSED, ImageReward, Network
from diffalign_rewards.weights import HubFile, hub_id
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from diffalign.errors import RewardError
from diffalign.images import to_pil

BYTES = 1_786_880_927  # of ImageReward.pt, from the commit that added it
BLOCK = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2"
TEXT_LAYER = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense attention.output.LayerNorm "
    "crossattention.self.query crossattention.self.key crossattention.self.value crossattention.output.dense "
    "crossattention.output.LayerNorm intermediate.dense output.dense output.LayerNorm"
)
MLP = "mlp.layers.0 mlp.layers.2 mlp.layers.4 mlp.layers.6 mlp.layers.7"


def published_keys() -> set[str]:
    """From the authors' classes (BLIP_Pretrain with ViT-L, MLP), whose state dict ImageReward.pt is."""
    modules = ["blip.visual_encoder.patch_embed.proj", "blip.visual_encoder.norm"]
    modules += [f"blip.visual_encoder.blocks.{i}.{name}" for i in range(24) for name in BLOCK.split()]
    modules += [
        f"blip.text_encoder.encoder.layer.{i}.{name}" for i in range(12) for name in TEXT_LAYER.split()
    ]
    modules += ["blip.text_encoder.embeddings.LayerNorm", "blip.vision_proj", "blip.text_proj", *MLP.split()]
    keys = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
    keys |= {"blip.visual_encoder.cls_token", "blip.visual_encoder.pos_embed"}
    embeddings = ("word_embeddings.weight", "position_embeddings.weight", "position_ids")
    return keys | {f"blip.text_encoder.embeddings.{name}" for name in embeddings}


def test_published_names_are_exactly_those_of_the_full_size_network_and_the_unused():
    with torch.device("meta"):
        weights = Network(Sizes()).state_dict()
    assert set(weights) | set(UNUSED) == published_keys()
    assert not set(weights) & set(UNUSED)
    projections = (1024 + 1) * 256 + (768 + 1) * 256
    size = 4 * (sum(weight.numel() for weight in weights.values()) + projections) + 8 * 512
    assert 0 < BYTES - size < 500 * len(published_keys())  # the rest is the zip file's own


def test_sizes_are_read_from_the_weights():
    with torch.device("meta"):
        weights = Network(Sizes()).blip.state_dict()
    assert Sizes.of(weights) == Sizes()


@pytest.fixture(scope="module")
def reward(blip_file: Path, bert_folder: Path) -> ImageReward:
    return ImageReward(checkpoint=str(blip_file), tokenizer=str(bert_folder))


def their_name(key: str) -> str:
    """A weight of the published vision tower, as transformers calls it."""
    for ours, theirs in {
        "patch_embed.proj": "embeddings.patch_embedding",
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "blocks.": "encoder.layers.",
        ".norm1": ".layer_norm1",
        ".norm2": ".layer_norm2",
        "attn.proj": "self_attn.projection",
        "attn.qkv": "self_attn.qkv",
    }.items():
        key = key.replace(ours, theirs)
    return f"post_layernorm{key.removeprefix('norm')}" if key.startswith("norm.") else key


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def test_score_is_what_transformers_blip_and_linear_layers_compute(
    blip_file: Path, bert_folder: Path, reward: ImageReward, photographs: list[Image.Image]
):
    prompts = ["a cat", "two dogs and a bird", "", "x y z " * 30] * 4
    tensors = load_file(blip_file)
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = BlipVisionModel(BlipVisionConfig(**tower, image_size=64, patch_size=16, layer_norm_eps=1e-6))
    vision.load_state_dict({their_name(key): w for key, w in part(tensors, "blip.visual_encoder.").items()})
    settings = {
        "vocab_size": 100,
        "max_position_embeddings": 40,
        "encoder_hidden_size": 128,
        "is_decoder": True,
    }
    text = BlipTextModel(BlipTextConfig(**tower, **settings, layer_norm_eps=1e-12), add_pooling_layer=False)
    text.load_state_dict(part(tensors, "blip.text_encoder."))
    widths = (128, 1024, 128, 64, 16, 1)
    layers = [nn.Linear(*pair) for pair in pairwise(widths)]
    for place, layer in zip("02467", layers, strict=True):
        layer.load_state_dict(part(tensors, f"mlp.layers.{place}."))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    preprocess = Compose(
        [Resize(64, InterpolationMode.BICUBIC), CenterCrop(64), ToTensor(), Normalize(mean, std)]
    )
    tokens = BertTokenizer.from_pretrained(bert_folder)(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    with torch.no_grad():
        pixels = torch.stack([preprocess(picture) for picture in photographs])
        picture = vision.eval()(pixels).last_hidden_state
        state = text.eval()(
            tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=picture
        ).last_hidden_state[:, 0]
        expected = (nn.Sequential(*layers)(state)[:, 0] - 0.16717362830052426) / 1.0333394966054072
    assert expected.std() > 0.001
    with pytest.warns(UserWarning, match="ImageReward reads the first 33 tokens of a prompt"):
        scores = reward(photographs, prompts)
    assert_close(scores, expected, rtol=0, atol=1e-5)


def test_long_prompts_keep_their_end_token(reward: ImageReward):
    reward._shortener._said = True
    ids = reward._tokenize(["a " * 5000, "b " * 5000])["input_ids"]
    assert ids.shape == (2, 35)
    assert (ids[:, -1] == reward.tokenizer.sep_token_id).all()


# --- weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def release(blip_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny weights as ImageReward.pt is released, with the tensors that have no influence; pinned."""
    tensors = load_file(blip_file) | {key: torch.zeros(1) for key in UNUSED}
    path = tmp_path / "ImageReward.pt"
    torch.save(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(imagereward, "WEIGHTS", HubFile("THUDM/ImageReward", path.name, "0123", digest))
    return path


def test_release_and_tokenizer_work_offline_once_fetched(
    release: Path, bert_folder: Path, publish, reward: ImageReward, images: Tensor, prompts: list[str]
):
    publish("THUDM/ImageReward", "0123", release)
    with pytest.raises(RewardError, match=r"google-bert/bert-base-uncased, vocab.txt is not cached"):
        ImageReward()
    repository, revision = hub_id(imagereward.TOKENIZER)
    publish(repository, revision, *bert_folder.iterdir())
    fetched = ImageReward()
    assert fetched.parameters == reward.parameters
    assert_close(fetched(to_pil(images), prompts), reward(to_pil(images), prompts))
    local = ImageReward(checkpoint=str(release), tokenizer=str(bert_folder))
    assert_close(local(images, prompts), reward(images, prompts))


def refused(match: str, **options: object) -> RewardError:
    with pytest.raises(RewardError, match=match) as error:
        ImageReward(**options)
    return error.value


def test_bad_weights_are_named(
    blip_file: Path, bert_folder: Path, release: Path, tmp_path: Path, hub_cache: Path
):
    options = {"tokenizer": str(bert_folder)}
    assert "ImageReward.pt" in str(refused("THUDM/ImageReward.* is not cached", **options))
    refused("checkpoint does not exist", checkpoint=str(tmp_path / "nothing.pt"), **options)

    release.write_bytes(release.read_bytes() + b"x")
    refused("not the file that its publisher released", checkpoint=str(release), **options)
    refused(
        "must be ImageReward.pt or safetensors",
        checkpoint=str(shutil.copy(release, tmp_path / "x.bin")),
        **options,
    )

    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(blip_file.read_bytes()[:1000])
    refused("cannot be read", checkpoint=str(truncated), **options)

    tensors = load_file(blip_file)
    del tensors["blip.visual_encoder.norm.bias"]
    save_file(tensors, tmp_path / "missing.safetensors")
    error = refused("not ImageReward's", checkpoint=str(tmp_path / "missing.safetensors"), **options)
    assert "blip.visual_encoder.norm.bias" in str(error)

    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    error = refused("not ImageReward's", checkpoint=str(tmp_path / "other.safetensors"), **options)
    assert "visual_encoder.patch_embed.proj.weight" in str(error)


def test_bad_tokenizers_are_named(blip_file: Path, tmp_path: Path):
    options = {"checkpoint": str(blip_file)}
    refused("the tokenizer of ImageReward does not exist", tokenizer=str(tmp_path / "nothing"), **options)
    (tmp_path / "large").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(100))]
    (tmp_path / "large" / "vocab.txt").write_text("\n".join(words) + "\n")
    error = refused("does not fit ImageReward", tokenizer=str(tmp_path / "large"), **options)
    assert error.why == "it has 105 tokens, the model knows 100"
