"""Options against running out of memory do what they say in each family: checkpointing, attention, tiles, compiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_pipeline
from families import SIDE, perturb, tiny_flux, tiny_sd3, tiny_sdxl
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from diffalign.config import LoRAConfig, ModelConfig
from diffalign.models.diffusers_denoiser import DiffusersDenoiser
from diffalign.models.families import family_of

CPU = torch.device("cpu")
Builder = Callable[[], Any]


def make(build: Builder, **options: object) -> DiffusersDenoiser:
    """A trainable denoiser whose adapter is no longer the identity."""
    pipeline = build()
    config = ModelConfig(**{"lora": LoRAConfig(rank=2), "resolution": SIDE, **options})
    denoiser = family_of(type(pipeline).__name__)(pipeline, config, device=CPU, trainable=True)
    perturb(denoiser)
    return denoiser


@pytest.fixture(
    scope="module", params=[tiny_pipeline, tiny_sdxl, tiny_sd3, tiny_flux], ids=["sd", "sdxl", "sd3", "flux"]
)
def denoiser(request: pytest.FixtureRequest) -> DiffusersDenoiser:
    return make(request.param)


def predicted(denoiser: DiffusersDenoiser) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, *denoiser.latent_shape, generator=draw)
    return denoiser.predict(x, torch.tensor([300, 700]), denoiser.encode_prompts(["a", "b"]), 3.0)


def kept_and_gradients(denoiser: DiffusersDenoiser) -> tuple[int, Tensor, list[Tensor]]:
    """Bytes that autograd keeps for the backward pass, the loss, and the gradients."""
    kept: dict[int, Tensor] = {}
    conditioning = denoiser.encode_prompts(["a", "b"])  # frozen, and in the cache from now on
    assert not conditioning.embeddings.requires_grad
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):
        loss = predicted(denoiser).square().mean()
    size = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept.values()}.values())
    parameters = list(denoiser.trainable_parameters().values())
    return size, loss.detach(), list(torch.autograd.grad(loss, parameters))


def test_checkpointing_keeps_less_and_changes_no_gradient(denoiser: DiffusersDenoiser):
    size, loss, gradients = kept_and_gradients(denoiser)
    denoiser.prepare_training(gradient_checkpointing=True, compile=False)
    less, same_loss, same_gradients = kept_and_gradients(denoiser)
    denoiser.network.disable_gradient_checkpointing()
    assert less < size / 3
    assert_close(same_loss, loss, rtol=1e-5, atol=0.0)
    for ours, theirs in zip(same_gradients, gradients, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


class CountAttention(TorchFunctionMode):
    """Counts calls of PyTorch's fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def test_every_attention_goes_through_the_fused_kernel(denoiser: DiffusersDenoiser):
    denoiser.encode_prompts(["a", "b"])
    with torch.no_grad(), CountAttention() as counted:
        predicted(denoiser)
    attentions = [module for module in denoiser.network.modules() if hasattr(module, "processor")]
    assert counted.calls == len(attentions) > 0


def test_tiles_need_no_size_that_they_divide():
    whole, tiled = make(tiny_pipeline), make(tiny_pipeline, vae_tiling=True)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        fits = torch.randn(1, 4, 8, 8, generator=draw)  # one tile
        assert torch.equal(tiled.decode(fits), whole.decode(fits))
        latents = torch.randn(1, 4, 19, 11, generator=draw)
        pictures = tiled.decode(latents)
        assert pictures.shape == (1, 3, 38, 22)
        difference = (pictures - whole.decode(latents)).abs()
        assert 0 < difference.mean() < 0.05
        assert tiled.encode_images(pictures).shape == (1, 4, 19, 11)


def test_compiling_is_of_every_block_or_of_the_network(denoiser: DiffusersDenoiser):
    denoiser.prepare_training(gradient_checkpointing=False, compile=True)
    network = denoiser.network
    blocks = [module for module in network.modules() if type(module).__name__ in network._repeated_blocks]
    compiled = [module for module in network.modules() if module._compiled_call_impl is not None]
    for module in compiled:
        module._compiled_call_impl = None
    assert compiled == (blocks or [network])
