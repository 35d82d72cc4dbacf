"""What every model reward owes: no dependence on the batch, gradients, long prompts, precision, offloading."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffalign_rewards.aesthetic import AestheticReward
from diffalign_rewards.preprocessing import Preprocessing
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from diffalign.errors import RewardError
from diffalign.images import to_pil, to_tensor
from diffalign.rewards import RewardModel, load_reward
from diffalign.rewards.model import NetworkReward

MODELS = ["clip", "clip, transformers", "clip, siglip", "clip_iqa", "hpsv2", "imagereward", "pickscore"]
Make = Callable[..., NetworkReward]


@pytest.fixture(params=MODELS)
def make(request: pytest.FixtureRequest, tiny: dict[str, tuple[str, dict[str, str]]]) -> Make:
    """Builds one of the tiny model rewards, with more options if given."""
    name, options = tiny[request.param]

    def build(**more: object) -> NetworkReward:
        reward = load_reward(name, **options, **more)
        assert isinstance(reward, NetworkReward)
        return reward

    return build


@pytest.mark.parametrize("as_pil", [False, True])
def test_scores_of_one_or_64_shuffled_or_not_are_the_same(
    make: Make, images: Tensor, prompts: list[str], as_pil: bool
):
    pictures = torch.cat([images.roll(8 * shift, dims=3) for shift in range(8)])
    batch, texts = to_pil(pictures) if as_pil else pictures, prompts * 8
    reward = make(batch_size=64)
    together = reward(batch, texts)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [batch[i] for i in order] if as_pil else batch[order]
    some = range(0, 64, 5)
    alone = torch.cat([reward(batch[i : i + 1], [texts[i]]) for i in some])
    assert together.std() > 0.001  # or the comparison would say nothing
    assert_close(alone, together[some], rtol=0, atol=1e-5)
    assert_close(reward(mixed, [texts[i] for i in order]), together[order], rtol=0, atol=1e-5)


def test_batch_size_is_the_number_of_pictures_a_pass(
    make: Make, images: Tensor, prompts: list[str], monkeypatch: pytest.MonkeyPatch
):
    passes: list[int] = []
    counted = Preprocessing.tensor

    def count(self: Preprocessing, pictures: Tensor) -> Tensor:
        passes.append(len(pictures))
        return counted(self, pictures)

    monkeypatch.setattr(Preprocessing, "tensor", count)
    make(batch_size=3)(images, prompts)
    assert passes == [3, 3, 2]


def test_tensor_scores_of_photographs_are_within_half_a_percent_of_the_pil_scores(
    make: Make, photographs: list[Image.Image]
):
    reward, prompts = make(), ["a photograph"] * len(photographs)
    from_pil = reward(photographs, prompts)
    from_tensor = torch.cat([reward(to_tensor([picture]), ["a photograph"]) for picture in photographs])
    assert (from_tensor - from_pil).abs().mean() < 0.005 * from_pil.std()


def test_gradients_reach_the_pixels_and_agree_with_finite_differences(make: Make, images: Tensor):
    reward, prompt = make(), ["a red star"]
    assert reward.differentiable
    image = (0.2 + 0.6 * images[:1]).requires_grad_()
    reward(image, prompt).sum().backward()
    assert image.grad is not None
    slope, step = image.grad.norm().item(), 0.05
    direction = image.grad / slope
    with torch.no_grad():
        up, down = (reward(image + sign * step * direction, prompt) for sign in (1, -1))
    assert slope > 0
    assert_close((up - down).item() / (2 * step), slope, rtol=2e-2, atol=0)


def test_weights_are_frozen_and_scores_carry_no_graph_without_need(
    make: Make, images: Tensor, prompts: list[str]
):
    reward = make()
    assert reward.parameters > 1000
    assert not reward(images, prompts).requires_grad
    reward(images.requires_grad_(), prompts).sum().backward()
    network = reward.network if hasattr(reward, "network") else reward.backbone.model
    assert all(weight.grad is None for weight in network.parameters())


def test_prompts_of_10_000_characters_are_cut_before_the_end_and_said_once(make: Make, images: Tensor):
    reward = make()
    if not reward.needs_prompt:
        return
    heads = ["cat dog", "dog cat"]
    long = [head + " bird" * 2000 for head in heads]
    with pytest.warns(UserWarning, match=r"tokens of a prompt.*said once") as said:
        scores = reward(images[[0, 0]], long)
    assert len(said) == 1
    assert (scores[0] - scores[1]).abs() > 1e-6  # their first words count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(reward(images[[0, 0]], [text + " bird" for text in long]), scores, rtol=0, atol=1e-6)


def test_empty_prompts_have_a_score(make: Make, images: Tensor):
    reward = make()
    assert reward(images, [""] * 4 + [" \n"] * 4).isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_computes_in_it_and_scores_nearly_the_same(
    make: Make, images: Tensor, prompts: list[str], dtype: str
):
    exact, reward = make()(images, prompts), make(dtype=dtype)
    network = reward.network.blip if hasattr(reward, "network") else reward.backbone.model
    assert {weight.dtype for weight in network.parameters()} == {getattr(torch, dtype)}
    scores = reward(images, prompts)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact)
    assert (scores - exact).abs().max() < 0.1 * (exact.max() - exact.min())


def test_unknown_dtype_and_empty_batches_are_refused(make: Make):
    with pytest.raises(RewardError, match="cannot compute in dtype float8") as error:
        make(dtype="float8")
    assert "bfloat16" in str(error.value)
    for size in (0, -1, True, "4"):
        with pytest.raises(RewardError, match=r"batch_size of reward .* must be 1 or more"):
            make(batch_size=size)


def test_offloaded_weights_are_back_at_the_next_call(make: Make, images: Tensor, prompts: list[str]):
    reward = make()
    before = reward(images, prompts)
    reward.offload()
    reward.offload()
    assert reward.device == torch.device("cpu")
    assert_close(reward(images, prompts), before)
    assert_close(reward.to("cpu")(images, prompts), before)


# --- offloading in general ----------------------------------------------------------------------------------


class Travelling(RewardModel):
    """Notes where its weights go."""

    name = "travelling"

    def __init__(self) -> None:
        self.stations: list[str] = []

    def to(self, device: str | torch.device) -> Travelling:
        self.stations.append(str(device))
        return super().to(device)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


def test_offload_goes_to_the_cpu_once_and_comes_back_once(images: Tensor, prompts: list[str]):
    reward = Travelling().to("cpu:0")  # stands for a GPU: a device with another name
    reward.offload()
    assert reward.stations == ["cpu:0", "cpu"]
    assert reward.device == torch.device("cpu:0")
    for _ in range(2):
        assert reward(images, prompts).device.type == "cpu"
    assert reward.stations == ["cpu:0", "cpu", "cpu:0"]


def test_to_after_offload_is_where_the_next_call_runs(images: Tensor, prompts: list[str]):
    reward = Travelling().to("cpu:0")
    reward.offload()
    reward.to("cpu")
    reward(images, prompts)
    assert reward.stations == ["cpu:0", "cpu", "cpu"]


def test_reward_that_shares_an_offloaded_backbone_brings_it_back(
    clip_folder: Path, head_file: Path, images: Tensor, prompts: list[str]
):
    clip = load_reward("clip", checkpoint=str(clip_folder))
    aesthetic = AestheticReward(checkpoint=str(clip_folder), head=str(head_file))
    before = aesthetic(images, prompts)
    clip.offload()
    assert clip.backbone._offloaded
    assert_close(aesthetic(images, prompts), before)
    assert not clip.backbone._offloaded
