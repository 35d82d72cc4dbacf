"""Text encoders and VAE that wait in the CPU's memory: the same numbers, and nothing left on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import DenoiserFactory
from families import PROMPTS, SIDE, load, one_step, tiny_flux, write_data
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffalign.config import RUNS, ModelConfig, RewardConfig, TrainingConfig
from diffalign.models.offload import on_device

CUDA = torch.device("cuda")
OFFLOADED = {"offload_text_encoders": True, "offload_vae": True}


def places(network: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in [*network.parameters(), *network.buffers()]}


@pytest.fixture
def second_device() -> Iterator[FakeTensorMode]:
    """Tensors with a device and no data: PyTorch refuses to compute across devices, without having any but the CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def test_a_network_computes_where_it_is_lent_to_and_nowhere_else(second_device: FakeTensorMode):
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False).eval()
    x = torch.ones(2, 4, device=CUDA)
    with on_device([network], CUDA, lent=True):
        assert places(network) == {"cuda"}
        assert network(x).device.type == "cuda"
    assert places(network) == {"cpu"}
    with pytest.raises(RuntimeError, match="device"):
        network(x)


def test_a_lent_network_has_its_own_tensors_back_also_after_an_error():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    network[0].bias = network[1].bias  # tied
    before = [id(tensor) for tensor in [*network.parameters(), *network.buffers()]]
    lent = on_device([network], torch.device("cpu"), lent=True)
    lent.__enter__()
    assert network[0].bias is network[1].bias
    assert not {id(p) for p in network.parameters()} & set(before)
    error = KeyError("amid the loan")
    assert not lent.__exit__(KeyError, error, None)
    assert [id(tensor) for tensor in [*network.parameters(), *network.buffers()]] == before


def test_prompts_and_pictures_are_worked_on_where_the_denoiser_is(make_denoiser: DenoiserFactory):
    denoiser = make_denoiser(**OFFLOADED)
    encoder = denoiser.encoders["text_encoder"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser.device = CUDA
        conditioning = denoiser.encode_prompts(PROMPTS)
        latents = denoiser.encode_images(torch.rand(2, 3, SIDE, SIDE))
        pictures = denoiser.decode(latents)
    assert {conditioning.embeddings.device.type, latents.device.type, pictures.device.type} == {"cuda"}
    assert places(encoder) == places(denoiser.vae) == {"cpu"}


def computed(denoiser: object, prompts: Sequence[str]) -> list[Tensor]:
    conditioning = denoiser.encode_prompts(prompts)
    latents = denoiser.encode_images(torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))
    latents.requires_grad_()
    pictures = denoiser.decode(latents)
    pictures.square().sum().backward()
    return [conditioning.embeddings, *conditioning.extra.values(), pictures, latents.grad]


def test_offloading_changes_no_number_and_no_fingerprint(tmp_path: Path):
    tiny_flux().save_pretrained(tmp_path)
    plain, offloaded = load(tmp_path), load(tmp_path, **OFFLOADED)
    assert plain.fingerprint() == offloaded.fingerprint()
    for ours, theirs in zip(computed(offloaded, PROMPTS), computed(plain, PROMPTS), strict=True):
        assert torch.equal(ours, theirs)


def test_encoders_are_lent_for_new_prompts_only(make_denoiser: DenoiserFactory):
    denoiser = make_denoiser(**OFFLOADED)
    encoder = denoiser.encoders["text_encoder"]
    own = {id(p) for p in encoder.parameters()}
    lent: list[bool] = []
    encoder.register_forward_pre_hook(
        lambda module, _: lent.append(not own & {id(p) for p in module.parameters()})
    )
    for prompts in (PROMPTS, PROMPTS[:1], ["something new"]):
        denoiser.encode_prompts(prompts)
    assert lent == [True, True]


@pytest.mark.parametrize("name", ["sft", "draft"])
def test_a_run_is_the_same_with_and_without_offloading(
    name: str, make_denoiser: DenoiserFactory, tmp_path: Path
):
    write_data(tmp_path)
    sections: dict[str, object] = {
        "algorithm": {"name": "sft", "batch_size": 2},
        "data": {"path": str(tmp_path / "pictures")},
    }
    if name == "draft":
        sections = {
            "algorithm": {"name": "draft", "prompts_per_iteration": 2, "train_batch_size": 2},
            "data": {"path": str(tmp_path / "prompts.txt")},
            "sampler": {"steps": 2},
            "rewards": [RewardConfig(name=f"{tmp_path / 'mine.py'}:red", label="red")],
        }
    config = RUNS[name].model_validate({**sections, "training": TrainingConfig(iterations=1, device="cpu")})
    plain, offloaded = make_denoiser(), make_denoiser(**OFFLOADED)
    assert one_step(config, offloaded)[1] == one_step(config, plain)[1]
    theirs = plain.trainable_parameters()
    for key, parameter in offloaded.trainable_parameters().items():
        assert torch.equal(parameter, theirs[key])


def test_a_trained_text_encoder_is_not_put_away():
    with pytest.raises(ValueError, match="offload_text_encoders: trained text encoders are needed"):
        ModelConfig(train_text_encoder=True, offload_text_encoders=True)
