"""PickScore on a tiny CLIP of transformers, and its published file's names at full size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffalign_rewards import pickscore
from diffalign_rewards.pickscore import PickScoreReward
from diffalign_rewards.weights import hub_id
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffalign.errors import RewardError

# The sizes in the config.json of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, from which PickScore was fine-tuned.
TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32}
LAYER = (
    "layer_norm1 layer_norm2 mlp.fc1 mlp.fc2 "
    "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj"
)
OTHERS = (
    "logit_scale text_projection.weight visual_projection.weight "
    "text_model.embeddings.token_embedding.weight text_model.embeddings.position_embedding.weight "
    "text_model.final_layer_norm.weight text_model.final_layer_norm.bias "
    "vision_model.embeddings.class_embedding vision_model.embeddings.patch_embedding.weight "
    "vision_model.embeddings.position_embedding.weight vision_model.pre_layrnorm.weight "
    "vision_model.pre_layrnorm.bias vision_model.post_layernorm.weight vision_model.post_layernorm.bias"
)


def test_published_names_are_exactly_those_of_the_full_size_model():
    layers = [f"vision_model.encoder.layers.{i}." for i in range(32)]
    layers += [f"text_model.encoder.layers.{i}." for i in range(24)]
    modules = [layer + name for layer in layers for name in LAYER.split()]
    published = {f"{module}.{part}" for module in modules for part in ("weight", "bias")} | set(
        OTHERS.split()
    )
    config = CLIPConfig(text_config=TEXT, vision_config=VISION | {"patch_size": 14}, projection_dim=1024)
    with torch.device("meta"):
        weights = CLIPModel(config).state_dict()
    assert set(weights) == published
    assert round(sum(4 * weight.numel() for weight in weights.values()) / 1e9, 2) == 3.94  # GB, as on the hub


@pytest.fixture(scope="module")
def reward(transformers_clip_folder: Path) -> PickScoreReward:
    return PickScoreReward(checkpoint=str(transformers_clip_folder))


def test_score_is_the_scaled_cosine_as_published(
    transformers_clip_folder: Path, reward: PickScoreReward, photographs: list[Image.Image]
):
    prompts = ["a cat", "Two Dogs!", "", "x" * 22] * 4
    processor = CLIPImageProcessorPil.from_pretrained(transformers_clip_folder)
    tokenizer = CLIPTokenizer.from_pretrained(transformers_clip_folder)
    model = CLIPModel.from_pretrained(transformers_clip_folder).eval()
    with torch.no_grad():
        out = model(
            pixel_values=processor(photographs, return_tensors="pt")["pixel_values"],
            **tokenizer(prompts, padding=True, truncation=True, max_length=24, return_tensors="pt"),
        )
    expected = out.logits_per_image.diagonal()  # exp(logit_scale) cos
    assert expected.std() > 0.1
    assert_close(reward(photographs, prompts), expected, rtol=0, atol=1e-5)


def test_range_is_what_a_cosine_can_reach(reward: PickScoreReward):
    scale = reward.backbone.model.logit_scale.exp().item()
    assert reward.range == pytest.approx((-scale, scale))


def test_published_weights_work_offline_once_fetched(
    transformers_clip_folder: Path, publish, reward: PickScoreReward, images: Tensor, prompts: list[str]
):
    """Weights from one repository, tokenizer and preprocessing from another."""
    files = {file.name: file for file in transformers_clip_folder.iterdir()}
    weights = ("config.json", "model.safetensors")
    repository, revision = hub_id(pickscore.CHECKPOINT)
    publish(repository, revision, *(files[name] for name in weights))
    with pytest.raises(RewardError, match=r"laion/CLIP-ViT-H-14-laion2B-s32B-b79K.* is not cached") as error:
        PickScoreReward()
    assert f"--include '*.json' --include '*.txt' --revision {pickscore.PROCESSOR.split('@')[1]}" in str(
        error.value
    )
    repository, revision = hub_id(pickscore.PROCESSOR)
    publish(repository, revision, *(file for name, file in files.items() if name not in weights))
    assert_close(PickScoreReward()(images, prompts), reward(images, prompts))


def test_local_weights_with_a_processor_of_their_own(
    transformers_clip_folder: Path, publish, tmp_path: Path, reward: PickScoreReward, images, prompts
):
    folder = publish(
        "some/weights",
        "0",
        *transformers_clip_folder.glob("*model*"),
        transformers_clip_folder / "config.json",
    )
    given = PickScoreReward(checkpoint=str(folder), processor=str(transformers_clip_folder))
    assert_close(given(images, prompts), reward(images, prompts))
    with pytest.raises(RewardError, match="the processor of PickScore does not exist"):
        PickScoreReward(checkpoint=str(folder), processor=str(tmp_path / "nothing"))


def test_model_of_open_clip_is_refused(clip_folder: Path):
    with pytest.raises(RewardError, match="PickScore is a model of transformers"):
        PickScoreReward(checkpoint=str(clip_folder))
