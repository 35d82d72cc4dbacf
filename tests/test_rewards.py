"""The contract of rewards, their registry, and mixtures."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from diffalign.config import RewardConfig
from diffalign.errors import DataError, DeviceError, NumericsError, RewardError
from diffalign.images import to_pil, to_tensor
from diffalign.rewards import (
    CallableReward,
    NonFiniteScore,
    RewardMixture,
    RewardModel,
    available_rewards,
    load_reward,
)

BUILT_IN = [
    "aesthetic",
    "brightness",
    "clip",
    "clip_iqa",
    "color",
    "hpsv2",
    "http",
    "imagereward",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "ocr",
    "pickscore",
    "shapes",
    "shapes_accuracy",
    "vlm",
]


class Brightness(RewardModel):
    """Mean of all pixels."""

    name, range, differentiable, needs_prompt = "brightness", (0.0, 1.0), True, False

    def __init__(self, memory: int = 1000) -> None:
        self.memory, self.batches = memory, []

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.batches.append(len(images))
        if len(images) > self.memory:
            raise torch.OutOfMemoryError
        return images.mean((1, 2, 3))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 8, 12, generator=torch.Generator().manual_seed(0))


PROMPTS = ["a", "b", "c", "d", "e"]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# --- the contract -------------------------------------------------------------------------------------------


def test_batches_are_joined_in_order(images: Tensor):
    reward = Brightness()
    reward.batch_size = 2
    assert_close(reward(images, PROMPTS), images.mean((1, 2, 3)))
    assert reward.batches == [2, 2, 1]


def test_pil_pictures_of_different_sizes_keep_their_order():
    values = [10, 200, 30, 120]
    sizes = [(8, 8), (4, 6), (8, 8), (4, 6)]
    pictures = [Image.new("RGB", size, (value,) * 3) for size, value in zip(sizes, values, strict=True)]
    assert_close(Brightness()(pictures, PROMPTS[:4]), torch.tensor(values) / 255)


def test_pil_pictures_of_other_modes_are_converted():
    pictures = [Image.new("L", (4, 4), 51), Image.new("RGBA", (4, 4), (0, 0, 0, 0))]
    assert_close(Brightness()(pictures, ["", ""]), torch.tensor([0.2, 1.0]))  # transparent lies over white


def test_no_pictures_give_no_scores():
    assert Brightness()(torch.empty(0, 3, 8, 8), []).shape == (0,)
    assert Brightness()([], []).shape == (0,)


def test_half_precision_pictures_give_float32_scores(images: Tensor):
    scores = Brightness()(images.bfloat16(), PROMPTS)
    assert scores.dtype == torch.float32
    assert_close(scores, images.bfloat16().float().mean((1, 2, 3)))


def test_gradient_flows_only_where_asked_and_possible(images: Tensor):
    assert not Brightness()(images, PROMPTS).requires_grad
    images.requires_grad_()
    Brightness()(images, PROMPTS).sum().backward()
    assert_close(images.grad, torch.full_like(images, 1 / (3 * 8 * 12)))
    with torch.no_grad():
        assert not Brightness()(images, PROMPTS).requires_grad


def test_lengths_that_differ_are_refused(images: Tensor):
    with pytest.raises(DataError, match="5 pictures but 4 prompts"):
        Brightness()(images, PROMPTS[:4])
    with pytest.raises(DataError, match="5 pictures but 1 prompts"):
        Brightness()(to_pil(images), ["a"])
    with pytest.raises(DataError, match="list of strings"):
        Brightness()(images, "abcde")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: (x * 255).to(torch.uint8), r"float \[B, 3, H, W\]"),
        (lambda x: x[:, :1], r"float \[B, 3, H, W\]"),
        (lambda x: x * 2 - 1, r"must lie in \[0, 1\]"),
        (lambda x: x * 255, r"must lie in \[0, 1\]"),
    ],
    ids=["uint8", "grey", "-1 to 1", "0 to 255"],
)
def test_tensors_in_another_format_are_refused(images: Tensor, change, match: str):
    with pytest.raises(DataError, match=match):
        Brightness()(change(images), PROMPTS)


def test_pixel_that_is_not_finite_names_its_picture(images: Tensor):
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match="pixels that are not finite") as error:
        Brightness()(images, PROMPTS)
    assert "picture 3 of the call, prompt 'd'" in str(error.value)


def test_score_that_is_not_finite_names_its_sample(images: Tensor):
    reward = CallableReward(
        lambda images, prompts: [1.0 if p != "d" else float("inf") for p in prompts], "mine"
    )
    reward.batch_size = 2
    with pytest.raises(NonFiniteScore, match="reward mine gave inf") as error:
        reward(images, PROMPTS)
    assert error.value.index == 3
    assert "picture 3 of the call, prompt 'd'" in str(error.value)
    assert error.value.exit_code == NumericsError.exit_code


def test_memory_that_runs_out_halves_the_batch_once(images: Tensor):
    reward = Brightness(memory=2)
    reward.batch_size = 5
    assert_close(reward(images, PROMPTS), images.mean((1, 2, 3)))
    assert reward.batches == [5, 2, 2, 1]
    hopeless = Brightness(memory=1)
    hopeless.batch_size = 5
    with pytest.raises(DeviceError, match="ran out of memory at 2 pictures"):
        hopeless(images, PROMPTS)
    assert hopeless.batches == [5, 2]


def test_hook_that_returns_the_wrong_shape_is_named(images: Tensor):
    class Wrong(Brightness):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return images.mean((2, 3))

    with pytest.raises(RewardError, match="brightness must return one score a picture"):
        Wrong()(images, PROMPTS)
    with pytest.raises(RewardError, match="brightness must return one score a picture"):
        Wrong()(to_pil(images), PROMPTS)


# --- the registry -------------------------------------------------------------------------------------------


def test_built_in_rewards_are_registered_with_one_line_each():
    rewards = available_rewards()
    assert set(BUILT_IN) <= set(rewards)
    assert all(rewards[name] and not rewards[name].startswith("(broken") for name in BUILT_IN)


def test_reward_is_loaded_by_name(images: Tensor):
    reward = load_reward("jpeg_compressibility")
    assert reward.name == "jpeg_compressibility"
    assert (reward(images, PROMPTS) < 0).all()


def test_unknown_name_lists_all_and_suggests_the_closest():
    with pytest.raises(RewardError, match="did you mean aesthetic") as error:
        load_reward("asthetic")
    assert all(name in str(error.value) for name in BUILT_IN)


def test_unknown_option_lists_all_and_suggests_the_closest():
    with pytest.raises(
        RewardError, match="chekpoint is not an option of reward clip; did you mean checkpoint"
    ):
        load_reward("clip", chekpoint="here")
    with pytest.raises(RewardError, match="quality is not an option of reward jpeg_compressibility") as error:
        load_reward("jpeg_compressibility", quality=3)
    assert "it has none" in str(error.value)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, entry_points: str, **modules: str) -> None:
    """A third party's package, as pip leaves it: modules, and metadata with entry points."""
    info = folder / "zoo-1.0.dist-info"
    info.mkdir()
    write(info / "METADATA", "Metadata-Version: 2.1\nName: zoo\nVersion: 1.0\n")
    write(info / "entry_points.txt", f"[diffalign.rewards]\n{entry_points}\n")
    for name, text in modules.items():
        write(folder / f"{name}.py", text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))


THIRD_PARTY = """
from diffalign.rewards import RewardModel
class Redness(RewardModel):
    '''Mean of the red channel, times a scale.

    More text.
    '''
    def __init__(self, *, scale: float = 1.0, power: float):
        self.scale, self.power = scale, power
    def score(self, images, prompts):
        return self.scale * images[:, 0].mean((1, 2)) ** self.power
def factory(): return 3
def fails(): raise OSError("the disk is gone")
"""


def test_installed_package_adds_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Tensor):
    install(tmp_path, monkeypatch, "redness = zoo_rewards:Redness", zoo_rewards=THIRD_PARTY)
    assert available_rewards()["redness"] == "Mean of the red channel, times a scale."
    reward = load_reward("redness", scale=2.0, power=1.0)
    assert_close(reward(images, PROMPTS), 2 * images[:, 0].mean((1, 2)))
    assert reward.name == "redness"
    with pytest.raises(RewardError, match="redness needs the option power"):
        load_reward("redness")


def test_broken_package_is_named_and_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry_points = "gone = zoo_missing:X\nthree = zoo_other:factory\ndisk = zoo_other:fails"
    install(tmp_path, monkeypatch, entry_points, zoo_other=THIRD_PARTY)
    assert "broken" in available_rewards()["gone"]
    assert set(BUILT_IN) <= set(available_rewards())
    with pytest.raises(RewardError, match="reward gone cannot be imported"):
        load_reward("gone")
    with pytest.raises(RewardError, match="reward three is no RewardModel"):
        load_reward("three")
    with pytest.raises(RewardError, match="reward disk cannot be built") as error:
        load_reward("disk")
    assert "the disk is gone" in str(error.value)


def test_two_packages_with_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path, monkeypatch, "clip = zoo_rewards:Redness", zoo_rewards=THIRD_PARTY)
    with pytest.raises(RewardError, match="two installed packages register a reward named clip"):
        load_reward("clip")


def test_without_installation_the_message_says_how_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: importlib.metadata.EntryPoints())
    with pytest.raises(RewardError, match="no reward named clip") as error:
        load_reward("clip")
    assert "pip install" in str(error.value)


# --- callables ----------------------------------------------------------------------------------------------

MINE = """
import torch
def sharpness(images, prompts, scale=1.0):
    assert images.shape[1:] == (3, 8, 12) and isinstance(prompts, list)
    return [scale * float(x.std()) for x in images]
def brightness(images, prompts):
    return images.mean((1, 2, 3))
brightness.needs_prompt = False
brightness.differentiable = True
def short(images, prompts): return [1.0]
def scalar(images, prompts): return torch.tensor(1.0)
def text(images, prompts): return ["high"] * len(prompts)
def fails(images, prompts): raise KeyError("gone")
number = 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    return write(tmp_path / "mine.py", MINE)


def test_function_in_a_file_is_a_reward(mine: str, images: Tensor):
    reward = load_reward(f"{mine}:sharpness")
    assert reward.needs_prompt
    assert_close(reward(images, PROMPTS), images.flatten(1).std(1))
    doubled = load_reward(f"{mine}:sharpness", scale=2.0)
    assert_close(doubled(images, PROMPTS), 2 * images.flatten(1).std(1))
    assert_close(reward(to_pil(images), PROMPTS), to_tensor(to_pil(images)).flatten(1).std(1))


def test_function_in_a_module_is_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Tensor):
    write(tmp_path / "mine_module.py", MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = load_reward("mine_module:brightness")
    assert_close(reward(images, PROMPTS), images.mean((1, 2, 3)))


def test_function_declares_the_contract_by_attributes(mine: str, images: Tensor):
    reward = load_reward(f"{mine}:brightness")
    assert not reward.needs_prompt
    reward(images.requires_grad_(), PROMPTS).sum().backward()
    assert images.grad is not None
    assert not load_reward(f"{mine}:sharpness")(images, PROMPTS).requires_grad


def test_class_in_a_file_is_a_reward(tmp_path: Path, images: Tensor):
    reward = load_reward(write(tmp_path / "zoo.py", THIRD_PARTY) + ":Redness", power=1.0)
    assert_close(reward(images, PROMPTS), images[:, 0].mean((1, 2)))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("{folder}/absent.py:score", "file of the reward function does not exist"),
        ("{mine}:sharpnes", "no function named sharpnes; did you mean sharpness"),
        ("{mine}:number", "no function named number"),
        ("{folder}/broken.py:score", "cannot be imported"),
        ("no.such.module:score", "module no.such.module of the reward function cannot be imported"),
    ],
)
def test_callable_that_cannot_be_had_is_named(tmp_path: Path, mine: str, name: str, match: str):
    write(tmp_path / "broken.py", "import no_such_module")
    with pytest.raises(RewardError, match=match):
        load_reward(name.format(folder=tmp_path, mine=mine))


@pytest.mark.parametrize(
    ("function", "match", "why"),
    [
        ("short", "returned the wrong number of scores", "[1] for 5 pictures"),
        ("scalar", "returned the wrong number of scores", "[] for 5 pictures"),
        ("text", "failed", "could not convert string to float"),
        ("fails", "failed", "KeyError: 'gone'"),
    ],
)
def test_callable_that_misbehaves_is_named(mine: str, images: Tensor, function: str, match: str, why: str):
    with pytest.raises(RewardError, match=f"mine.py:{function} {match}") as error:
        load_reward(f"{mine}:{function}")(images, PROMPTS)
    assert why in str(error.value)


def test_option_that_the_function_lacks_is_refused(mine: str):
    with pytest.raises(RewardError, match=r"scal is not an option .* did you mean scale"):
        load_reward(f"{mine}:sharpness", scal=2.0)
    with pytest.raises(RewardError, match="prompts is not an option"):
        load_reward(f"{mine}:sharpness", prompts=["x"])


# --- mixtures -----------------------------------------------------------------------------------------------


def test_total_is_the_weighted_sum_and_components_are_kept(mine: str, images: Tensor):
    specs = [
        RewardConfig(name=f"{mine}:brightness", label="bright", weight=2.0),
        RewardConfig(name=f"{mine}:sharpness", label="sharp", weight=-0.5, options={"scale": 3.0}),
        RewardConfig(name="jpeg_incompressibility", weight=0.0),
    ]
    mixture = RewardMixture(specs)
    assert mixture.labels == ["bright", "sharp", "jpeg_incompressibility"]
    assert [mixture.watch(label) for label in mixture.labels] == [False, False, True]
    scores = mixture(images, PROMPTS)
    bright, sharp = images.mean((1, 2, 3)), 3 * images.flatten(1).std(1)
    assert_close(scores.total, 2 * bright - 0.5 * sharp)
    assert_close(scores.components["bright"], bright)
    assert_close(scores.components["sharp"], sharp)
    assert (scores.components["jpeg_incompressibility"] > 0).all()
    assert mixture.needs_prompt


def test_gradient_of_the_total_is_the_weighted_gradient(mine: str, images: Tensor):
    specs = [RewardConfig(name=f"{mine}:brightness", weight=2.0), RewardConfig(name="jpeg_compressibility")]
    RewardMixture(specs)(images.requires_grad_(), PROMPTS).total.sum().backward()
    assert_close(images.grad, torch.full_like(images, 2 / (3 * 8 * 12)))


def test_label_listed_twice_and_empty_mixtures_are_refused():
    with pytest.raises(RewardError, match="jpeg_compressibility is listed twice"):
        RewardMixture([RewardConfig(name="jpeg_compressibility")] * 2)
    with pytest.raises(RewardError, match="at least one reward"):
        RewardMixture([])
