"""HPS v2 on a tiny open_clip model, and its published file's names at full size."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffalign_rewards import hpsv2
from diffalign_rewards.hpsv2 import WEIGHTS, HPSv2Reward
from diffalign_rewards.weights import HubFile
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from diffalign.errors import RewardError
from diffalign.rewards import load_reward

BYTES = 1_972_490_005  # of HPS_v2.1_compressed.pt, from the commit that added it
BLOCK = (
    "attn.in_proj_bias attn.in_proj_weight attn.out_proj.bias attn.out_proj.weight ln_1.bias ln_1.weight "
    "ln_2.bias ln_2.weight mlp.c_fc.bias mlp.c_fc.weight mlp.c_proj.bias mlp.c_proj.weight"
)
OTHERS = (
    "logit_scale positional_embedding text_projection token_embedding.weight ln_final.bias ln_final.weight "
    "visual.class_embedding visual.conv1.weight visual.positional_embedding visual.proj "
    "visual.ln_pre.bias visual.ln_pre.weight visual.ln_post.bias visual.ln_post.weight"
)


def published_keys(vision_layers: int, text_layers: int) -> set[str]:
    """As open_clip 2.16 names the weights of a ViT, which HPS v2 was trained with."""
    blocks = [f"visual.transformer.resblocks.{i}." for i in range(vision_layers)]
    blocks += [f"transformer.resblocks.{i}." for i in range(text_layers)]
    return {block + weight for block in blocks for weight in BLOCK.split()} | set(OTHERS.split())


@pytest.mark.parametrize(
    ("architecture", "layers"), [(hpsv2.ARCHITECTURE, (32, 24)), ("ViT-L-14-quickgelu", (24, 12))]
)
def test_published_names_are_exactly_those_of_the_full_size_model(architecture: str, layers: tuple[int, int]):
    config = open_clip.get_model_config(architecture)
    with torch.device("meta"):
        weights = open_clip.CLIP(**config).state_dict()
    assert set(weights) == published_keys(*layers)
    if architecture == hpsv2.ARCHITECTURE:  # stored in half precision, and zipped without compression
        size = sum(2 * weight.numel() for weight in weights.values())
        assert 0 < BYTES - size < 500 * len(weights)


@pytest.fixture(scope="module")
def reward(clip_folder: Path) -> HPSv2Reward:
    return HPSv2Reward(checkpoint=str(clip_folder))


def test_score_is_the_cosine_that_plain_open_clip_computes_of_padded_pictures(
    clip_folder: Path, reward: HPSv2Reward, photographs: list[Image.Image]
):
    prompts = ["a cat", "two dogs", "", "x" * 22] * 4
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    cfg = PreprocessCfg(**model.visual.preprocess_cfg | {"resize_mode": "longest"})
    preprocess = image_transform_v2(cfg, is_train=False)
    model.eval()
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(picture) for picture in photographs]))
        text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{clip_folder}")(prompts))
    expected = F.cosine_similarity(image, text)
    assert expected.std() > 0.01
    assert_close(reward(photographs, prompts), expected, rtol=0, atol=1e-5)


def test_borders_count(reward: HPSv2Reward, clip_folder: Path):
    picture = torch.full((1, 3, 64, 128), 0.5)
    other = picture.clone()
    other[..., :16] = 1.0  # CLIP crops this away
    clip = load_reward("clip", checkpoint=str(clip_folder))
    assert_close(clip(other, ["a"]), clip(picture, ["a"]))
    assert (reward(other, ["a"]) - reward(picture, ["a"])).abs() > 1e-3


# --- weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def named(clip_folder: Path, tmp_path: Path) -> HPSv2Reward:
    """The tiny CLIP as a folder with the preprocessing of OpenAI, which a model by name has."""
    folder = Path(shutil.copytree(clip_folder, tmp_path / "named"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return HPSv2Reward(checkpoint=str(folder))


@pytest.fixture
def tiny_release(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny CLIP as HPS is released: a .pt with more than weights in it, in half precision; pinned as 2.1."""
    config = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = str(clip_folder)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {hpsv2.ARCHITECTURE: config})
    weights = load_file(clip_folder / "open_clip_model.safetensors")
    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "name": "x", "state_dict": {key: w.half() for key, w in weights.items()}}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(WEIGHTS, "2.1", HubFile("xswu/HPSv2", path.name, "0123", digest))
    return path


def test_release_is_loaded_from_the_hubs_cache_or_a_local_copy(
    tiny_release: Path, named: HPSv2Reward, publish, images: Tensor, prompts: list[str]
):
    publish("xswu/HPSv2", "0123", tiny_release)
    expected = named(images, prompts)
    for copy in (HPSv2Reward(), HPSv2Reward(version=2.1, checkpoint=str(tiny_release))):
        assert {weight.dtype for weight in copy.backbone.model.parameters()} == {torch.float32}
        assert_close(copy(images, prompts), expected, rtol=0, atol=0.01)  # the weights were rounded


def test_file_with_another_hash_is_refused_before_it_is_opened(tiny_release: Path):
    content = tiny_release.read_bytes()
    tiny_release.write_bytes(content[:-1])
    with pytest.raises(RewardError, match="not the file that its publisher released") as error:
        HPSv2Reward(checkpoint=str(tiny_release))
    assert WEIGHTS["2.1"].sha256 in str(error.value)
    with pytest.raises(RewardError, match="not the file that its publisher released"):
        HPSv2Reward(version="2.0", checkpoint=str(tiny_release))


def test_safetensors_of_the_tensors_are_taken(tiny_release: Path, clip_folder: Path, named, images, prompts):
    local = HPSv2Reward(checkpoint=str(clip_folder / "open_clip_model.safetensors"))
    assert_close(local(images, prompts), named(images, prompts))


def test_weights_of_another_architecture_are_named(tiny_release: Path, tmp_path: Path):
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RewardError, match="cannot be loaded") as error:
        HPSv2Reward(checkpoint=str(tmp_path / "other.safetensors"))
    assert "visual.proj" in str(error.value) or "Missing key" in str(error.value)


def test_what_is_not_there_is_named(hub_cache: Path, tmp_path: Path, transformers_clip_folder: Path):
    with pytest.raises(RewardError, match=r"xswu/HPSv2, HPS_v2_compressed.pt is not cached") as error:
        HPSv2Reward(version="2.0")
    command = f"hf download xswu/HPSv2 HPS_v2_compressed.pt --revision {WEIGHTS['2.0'].revision}"
    assert command in str(error.value)
    with pytest.raises(RewardError, match="the HPS checkpoint does not exist"):
        HPSv2Reward(checkpoint=str(tmp_path / "nothing.pt"))
    with pytest.raises(RewardError, match=r"there is no HPS v3") as error:
        HPSv2Reward(version="3")
    assert "2.0, 2.1" in str(error.value)
    with pytest.raises(RewardError, match="is a model of open_clip"):
        HPSv2Reward(checkpoint=str(transformers_clip_folder))
