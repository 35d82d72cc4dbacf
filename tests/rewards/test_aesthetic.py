"""The aesthetic reward: LAION's real heads where at hand, and a linear head on the tiny CLIP."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from diffalign_rewards.aesthetic import HEADS, AestheticReward, affine_head
from diffalign_rewards.weights import Published, fetch, read_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from diffalign.errors import RewardError
from diffalign.images import to_pil

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
needs_heads = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="LAION's heads are not at hand")


@needs_heads
@pytest.mark.parametrize(("version", "norm", "bias"), [("v2", 17.99562, 5.236646), ("v1", 28.4444, 3.529371)])
def test_published_heads_are_the_known_affine_maps(version: str, norm: float, bias: float):
    path = SHARED_DATA / HEADS[version].name
    assert hashlib.sha256(path.read_bytes()).hexdigest() == HEADS[version].sha256
    weight, offset = affine_head(read_tensors(path), "")
    assert_close(weight.norm().item(), norm, rtol=0, atol=1e-4)
    assert_close(offset.item(), bias, rtol=0, atol=1e-5)


@needs_heads
def test_collapsed_v2_head_equals_the_layers_one_by_one():
    layers = [nn.Linear(*size) for size in [(768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]]
    tensors = read_tensors(SHARED_DATA / HEADS["v2"].name)
    x = nn.functional.normalize(torch.randn(16, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    weight, bias = affine_head(tensors, "")
    expected = x
    for number, layer in zip((0, 2, 4, 6, 7), layers, strict=True):
        layer.load_state_dict({part: tensors[f"layers.{number}.{part}"] for part in ("weight", "bias")})
        expected = layer(expected)
    assert_close(x @ weight + bias, expected[:, 0].detach(), rtol=0, atol=1e-4)


def test_score_is_the_head_on_the_normalised_embedding(clip_folder, head_file, images, prompts):
    reward = AestheticReward(checkpoint=str(clip_folder), head=str(head_file))
    pictures = to_pil(images)
    with torch.no_grad():
        embedding = reward.backbone.model.encode_image(reward.backbone.preprocessing.pictures(pictures))
    head = load_file(head_file)
    expected = nn.functional.linear(
        embedding / embedding.norm(dim=-1, keepdim=True), head["weight"], head["bias"]
    )
    assert expected.std() > 0.01
    assert_close(reward(pictures, prompts), expected[:, 0], rtol=0, atol=1e-5)
    assert_close(reward(pictures, [""] * 8), expected[:, 0], rtol=0, atol=1e-5)  # prompts do not matter


def test_range_is_what_a_unit_vector_can_reach(clip_folder: Path, head_file: Path):
    low, high = AestheticReward(checkpoint=str(clip_folder), head=str(head_file)).range
    norm = load_file(head_file)["weight"].norm().item()
    assert (low, high) == pytest.approx((5 - norm, 5 + norm))


def test_score_does_not_depend_on_the_batch(clip_folder, head_file, images, prompts):
    reward = AestheticReward(checkpoint=str(clip_folder), head=str(head_file))
    together = reward(images, prompts)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(8)])
    assert_close(alone, together, rtol=0, atol=1e-5)
    assert_close(reward(images.flip(0), prompts), together.flip(0), rtol=0, atol=1e-5)


def test_gradient_agrees_with_finite_differences(clip_folder: Path, head_file: Path, images: Tensor):
    reward = AestheticReward(checkpoint=str(clip_folder), head=str(head_file))
    image = (0.2 + 0.6 * images[:1]).requires_grad_()
    reward(image, [""]).sum().backward()
    assert image.grad is not None
    direction, step = image.grad / image.grad.norm(), 0.05
    with torch.no_grad():
        up, down = (reward(image + sign * step * direction, [""]) for sign in (1, -1))
    assert_close((up - down).item() / (2 * step), image.grad.norm().item(), rtol=1e-2, atol=0)


def test_mlp_head_in_safetensors_is_collapsed(clip_folder: Path, tmp_path: Path):
    draw = torch.Generator().manual_seed(3)
    first, second = torch.randn(4, 32, generator=draw), torch.randn(1, 4, generator=draw)
    layers = {"layers.0.weight": first, "layers.0.bias": torch.ones(4)}
    save_file(
        layers | {"layers.2.weight": second, "layers.2.bias": torch.ones(1)}, tmp_path / "h.safetensors"
    )
    reward = AestheticReward(checkpoint=str(clip_folder), head=str(tmp_path / "h.safetensors"))
    assert_close(reward.weight, (second @ first)[0])  # W2 (W1 x + 1) + 1
    assert_close(reward.bias, second.sum() + 1)


@pytest.mark.parametrize(
    "tensors",
    [
        {"something": torch.zeros(1)},
        {"weight": torch.zeros(1, 32)},
        {"layers.0.weight": torch.zeros(2, 32), "layers.0.bias": torch.zeros(2)},
        {"weight": torch.zeros(32), "bias": torch.zeros(1)},
    ],
    ids=["other keys", "no bias", "two outputs", "flat weight"],
)
def test_file_that_is_no_head_is_named(clip_folder: Path, tmp_path: Path, tensors: dict[str, Tensor]):
    save_file(tensors, tmp_path / "h.safetensors")
    with pytest.raises(RewardError, match="aesthetic head") as error:
        AestheticReward(checkpoint=str(clip_folder), head=str(tmp_path / "h.safetensors"))
    assert "h.safetensors" in str(error.value)


def test_head_of_another_clip_is_refused(clip_folder: Path, tmp_path: Path):
    save_file({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "h.safetensors")
    with pytest.raises(RewardError, match="embeddings of 768, the model's have 32"):
        AestheticReward(checkpoint=str(clip_folder), head=str(tmp_path / "h.safetensors"))


def test_published_head_on_another_named_clip_is_refused():
    with pytest.raises(RewardError, match="belongs to another CLIP model"):
        AestheticReward(architecture="ViT-L-14", pretrained="laion2b_s32b_b82k")


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_pickle_with_code_is_never_run(tmp_path: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(RewardError, match="cannot be read"):
        AestheticReward(checkpoint=str(clip_folder), head=str(tmp_path / "evil.pth"))
    assert "code ran" not in capsys.readouterr().out


def test_truncated_head_is_named(tmp_path: Path, clip_folder: Path):
    (tmp_path / "h.pth").write_bytes(b"")
    (tmp_path / "h.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name in ("h.pth", "h.safetensors"):
        with pytest.raises(RewardError, match="cannot be read") as error:
            AestheticReward(checkpoint=str(clip_folder), head=str(tmp_path / name))
        assert error.value.where == str(tmp_path / name)


# --- fetching -----------------------------------------------------------------------------------------------


def published(content: bytes, source: Path) -> Published:
    source.write_bytes(content)
    return Published("head.pth", source.as_uri(), hashlib.sha256(content).hexdigest())


def test_fetch_downloads_once_and_then_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    file = published(b"the head", tmp_path / "source")
    path = fetch(file)
    assert path == tmp_path / "cache" / "rewards" / "head.pth"
    (tmp_path / "source").unlink()
    assert fetch(file).read_bytes() == b"the head"


def test_download_with_another_hash_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    file = published(b"the head", tmp_path / "source")
    (tmp_path / "source").write_bytes(b"another")
    with pytest.raises(RewardError, match="cannot be downloaded"):
        fetch(file)
    assert not (tmp_path / "cache" / "rewards" / "head.pth").exists()


def test_changed_file_in_the_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    file = published(b"the head", tmp_path / "source")
    fetch(file).write_bytes(b"changed")
    with pytest.raises(RewardError, match="not the file that its publisher released") as error:
        fetch(file)
    assert file.sha256 in str(error.value)


def test_offline_the_missing_head_and_its_place_are_named(
    tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    for name in ("https_proxy", "HTTPS_PROXY"):  # nothing listens on port 9: no network, at once
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(RewardError, match="missing and cannot be downloaded") as error:
        AestheticReward(version="v1", checkpoint=str(clip_folder))
    assert "sa_0_4_vit_l_14_linear.pth" in str(error.value)
    assert str(tmp_path / "cache" / "rewards" / HEADS["v1"].name) in str(error.value)
