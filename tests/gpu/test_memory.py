"""On the GPU: what waits on the CPU takes no memory there, rounded weights take what they should and train."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from diffalign.config import LoRAConfig, ModelConfig
from diffalign.losses.preference import diffusion_dpo
from diffalign.models.loading import load_denoiser
from diffalign.models.offload import on_device
from diffalign.models.quantization import QuantizedLinear
from diffalign.models.stable_diffusion import StableDiffusion

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]
CUDA = torch.device("cuda")
KINDS = ["int8", "nf4"]
X, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 700])


def make(folder: Path, precision: str = "no", **options: object) -> StableDiffusion:
    config = ModelConfig(**{"path": str(folder), "lora": LoRAConfig(rank=2), **options})
    return load_denoiser(config, device="cuda", mixed_precision=precision, trainable=True)


def places(network: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in [*network.parameters(), *network.buffers()]}


def test_what_is_lent_is_gone_after_its_work_and_the_numbers_are_the_same(tiny_pipeline_dir: Path):
    plain = make(tiny_pipeline_dir)
    offloaded = make(tiny_pipeline_dir, offload_text_encoders=True, offload_vae=True)
    encoder = offloaded.encoders["text_encoder"]
    assert places(encoder) == places(offloaded.vae) == {"cpu"}
    results = []
    for denoiser in (plain, offloaded):
        conditioning = denoiser.encode_prompts(["a red star"])
        latents = denoiser.encode_images(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
        latents.requires_grad_()
        pictures = denoiser.decode(latents)
        pictures.square().sum().backward()  # the VAE's weights lie on the CPU again
        results.append([conditioning.embeddings, latents.detach(), pictures.detach(), latents.grad])
    assert places(encoder) == places(offloaded.vae) == {"cpu"}
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_loan_takes_memory_while_it_lasts_or_while_a_graph_needs_it():
    network = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)]).requires_grad_(False)
    size = sum(parameter.nbytes for parameter in network.parameters())
    x = torch.ones(1, 1024, device=CUDA)
    network.to(CUDA)(x)  # cuBLAS takes its workspace
    network.to("cpu")
    before = torch.cuda.memory_allocated()
    with on_device([network], CUDA, lent=True):
        assert torch.cuda.memory_allocated() - before >= size
        network(x)
    assert torch.cuda.memory_allocated() - before < size / 8
    x.requires_grad_()
    with on_device([network], CUDA, lent=True):
        out = network(x).sum()
    assert torch.cuda.memory_allocated() - before >= size * 7 / 8
    out.backward()
    del out
    assert torch.cuda.memory_allocated() - before < size / 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_layer_takes_an_eighth_or_a_quarter_of_float32_also_in_training(kind: str):
    pytest.importorskip("bitsandbytes")
    layers = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(4)]).requires_grad_(False)
    size = sum(parameter.nbytes for parameter in layers.parameters())
    x = torch.ones(1, 2048, device=CUDA, requires_grad=True)
    torch.nn.functional.linear(x, torch.ones(8, 2048, device=CUDA))  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    rounded = nn.Sequential(*[QuantizedLinear(layer, kind, CUDA) for layer in layers])
    share = {"int8": 0.25, "nf4": 4.5 / 32}[kind]
    assert (torch.cuda.memory_allocated() - before) / size == pytest.approx(share, rel=0.02)
    out = rounded(x)
    assert (torch.cuda.memory_allocated() - before) / size == pytest.approx(share, rel=0.05)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_dpo_loss_over_a_rounded_network_is_ln_2(
    kind: str, precision: str, tiny_pipeline_dir: Path
):
    pytest.importorskip("bitsandbytes")
    denoiser = make(tiny_pipeline_dir, precision, quantization=kind)
    conditioning, x = denoiser.encode_prompts(["a", "b"]), X.to(CUDA)
    errors = denoiser.predict(x, T, conditioning).square().mean((1, 2, 3))
    with torch.no_grad(), denoiser.reference():
        reference = denoiser.predict(x, T, conditioning).square().mean((1, 2, 3))
    loss = diffusion_dpo(errors[:1], errors[1:], reference[:1], reference[1:], beta=2000.0).loss
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    gradients = [parameter.grad for parameter in denoiser.trainable_parameters().values()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_without_gradient_is_that_with_it(kind: str, tiny_pipeline_dir: Path):
    pytest.importorskip("bitsandbytes")
    denoiser = make(tiny_pipeline_dir, "bf16", quantization=kind)
    conditioning, x = denoiser.encode_prompts(["a", "b"]), X.to(CUDA)
    with torch.no_grad():
        sampled = denoiser.predict(x, T, conditioning)
    assert torch.equal(denoiser.predict(x, T, conditioning).detach(), sampled)
