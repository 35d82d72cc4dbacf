"""A LoRA over a network in 8 or 4 bits: what is stored, that it trains as any other, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import StableDiffusionPipeline
from families import (
    SIDE,
    check_training,
    load,
    perturb,
    relative_error,
    sampled,
    tiny_flux,
    tiny_sd3,
    tiny_sdxl,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from diffalign.config import AdapterConfig, LoRAConfig, ModelConfig, SamplerConfig
from diffalign.errors import DeviceError
from diffalign.models.loading import load_denoiser, load_for_inference
from diffalign.models.quantization import QuantizedLinear, quantize

CPU = torch.device("cpu")
NF4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.5626170, 0.72295684, 1.0]
"""QLoRA, appendix E."""
DIFFUSION = SamplerConfig(steps=3, eta=0.0, guidance_scale=3.0)
SMALLEST = "nf4" if find_spec("bitsandbytes") else "int8"


@pytest.fixture(params=["int8", "nf4"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
    return request.param


def random_layer(rows: int = 6, columns: int = 128) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows).requires_grad_(False)


def test_int8_is_off_by_half_a_step_of_its_row_at_most():
    layer = random_layer()
    layer.weight[2] = 0.0
    layer.weight[3] *= 1000.0
    quantized = QuantizedLinear(layer, "int8", CPU)
    step = layer.weight.abs().amax(dim=1, keepdim=True) / 127
    error = (quantized.dequantized(torch.float32) - layer.weight).abs()
    assert (error <= 0.5001 * step).all()
    assert quantized.weight.nbytes == layer.weight.nbytes / 4


def test_nf4_gives_back_what_lies_on_its_levels_with_a_scale_for_64_weights():
    pytest.importorskip("bitsandbytes")
    layer = random_layer(rows=4, columns=64)
    levels = torch.tensor(NF4).repeat(4, 4)
    layer.weight.copy_(levels * torch.tensor([[1.0], [0.01], [3.0], [100.0]]))
    quantized = QuantizedLinear(layer, "nf4", CPU)
    assert_close(quantized.dequantized(torch.float32), layer.weight)
    assert quantized.weight.nbytes + quantized.scale.nbytes == 4 * 64 * 4.5 / 8


def test_product_and_gradient_are_those_of_the_rounded_weight_which_autograd_does_not_keep(kind: str):
    quantized = QuantizedLinear(random_layer(), kind, CPU)
    x = torch.randn(2, 3, 128, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        ours = quantized(x)
    assert kept == []
    weight = quantized.dequantized(torch.float32)
    theirs = F.linear(x, weight, quantized.bias)
    assert_close(ours, theirs)
    towards = torch.randn_like(ours)
    (gradient,) = torch.autograd.grad(ours, x, towards)
    assert_close(gradient, torch.autograd.grad(theirs, x, towards)[0])


def test_under_autocast_it_computes_and_answers_in_its_type_as_any_linear_layer(kind: str):
    layer = random_layer()
    quantized, x = QuantizedLinear(layer, kind, CPU), torch.randn(2, 128, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantized(x)
        assert out.dtype == layer(x).dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    exact = F.linear(x, quantized.dequantized(torch.float32), layer.bias)
    assert relative_error(out.detach(), exact.detach()) < 0.01


@pytest.mark.parametrize(
    ("build", "whole"),
    [
        (
            tiny_pipeline,
            ["conv_in", "time_embedding.linear_1", "conv_out", "down_blocks.0.attentions.0.proj_in"],
        ),
        (tiny_sdxl, ["conv_in", "time_embedding.linear_1", "add_embedding.linear_1", "conv_out"]),
        (
            tiny_sd3,
            ["time_text_embed.timestep_embedder.linear_1", "context_embedder", "norm_out.linear", "proj_out"],
        ),
        (tiny_flux, ["x_embedder", "context_embedder", "norm_out.linear", "proj_out"]),
    ],
    ids=["sd", "sdxl", "sd3", "flux"],
)
def test_the_linear_layers_of_all_blocks_are_stored_in_8_bits_and_nothing_else(
    build: Callable[[], Any], whole: list[str]
):
    pipeline = build()
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    types = {name: type(module) for name, module in network.named_modules()}
    quantize(network, "int8", CPU)
    changed = {name for name, module in network.named_modules() if type(module) is not types[name]}
    assert changed == {
        name
        for name, was in types.items()
        if was is nn.Linear and any(part.isdigit() for part in name.split(".")[:-1])
    }
    assert not changed & set(whole)
    assert {type(network.get_submodule(name)) for name in whole} <= {nn.Linear, nn.Conv2d}
    assert {type(network.get_submodule(name)) for name in changed} == {QuantizedLinear}


def test_every_kind_of_method_trains_a_lora_over_a_unet(tiny_pipeline_dir: Path, tmp_path: Path):
    online = SamplerConfig(steps=2, guidance_scale=3.0)
    check_training(load(tiny_pipeline_dir, quantization=SMALLEST), tmp_path, online, DIFFUSION)


def test_every_kind_of_method_trains_a_lora_over_a_transformer(tmp_path: Path):
    tiny_flux().save_pretrained(tmp_path / "base")
    online = SamplerConfig(kind="flow_sde", steps=2, guidance_scale=3.0)
    exact = SamplerConfig(kind="euler", steps=2, guidance_scale=3.0)
    check_training(load(tmp_path / "base", quantization="int8"), tmp_path, online, exact)


def test_the_reference_is_the_rounded_network_without_adapter(kind: str, tiny_pipeline_dir: Path):
    denoiser, plain = load(tiny_pipeline_dir, quantization=kind), load(tiny_pipeline_dir)
    assert denoiser.fingerprint() != plain.fingerprint()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500])
    conditioning = denoiser.encode_prompts(["a", "b"])
    with torch.no_grad():
        base = denoiser.predict(x, t, conditioning)
        perturb(denoiser)
        with denoiser.reference():
            assert torch.equal(denoiser.predict(x, t, conditioning), base)
        assert relative_error(denoiser.predict(x, t, conditioning), base) > 1e-3
        error = relative_error(base, plain.predict(x, t, conditioning))
    assert 1e-5 < error < {"int8": 0.02, "nf4": 0.2}[kind]


def test_a_run_over_a_rounded_network_is_sampled_as_it_was_trained_and_exported_for_the_plain_one(
    tiny_pipeline_dir: Path, tmp_path: Path
):
    denoiser = load(tiny_pipeline_dir, quantization=SMALLEST)
    perturb(denoiser)
    (tmp_path / "run").mkdir()
    denoiser.export(tmp_path / "run" / "final")
    (tmp_path / "run" / "config.yaml").write_text(
        f"model: {{path: {tiny_pipeline_dir}, resolution: {SIDE}, quantization: {SMALLEST}}}\n"
        "algorithm: {name: sft}\ndata: {path: unused}\n"
    )
    loaded = load_for_inference(str(tmp_path / "run"), device="cpu")
    ours = sampled(denoiser, DIFFUSION)
    assert_close(sampled(loaded, DIFFUSION), ours, rtol=1e-4, atol=1e-5)
    assert loaded.trainable_parameters() == {}

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipeline.load_lora_weights(str(tmp_path / "run" / "final"))
    plain = load(tiny_pipeline_dir)
    perturb(plain)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    conditioning = plain.encode_prompts(["a"])
    with torch.no_grad():
        theirs = pipeline.unet(x, t, encoder_hidden_states=conditioning.embeddings).sample
        assert_close(theirs, plain.predict(x, t, conditioning), rtol=1e-4, atol=1e-5)


def test_in_bf16_the_rest_of_the_network_is_bf16_and_scales_stay_float32(tiny_pipeline_dir: Path):
    config = ModelConfig(path=str(tiny_pipeline_dir), lora=LoRAConfig(), quantization=SMALLEST)
    denoiser = load_denoiser(config, mixed_precision="bf16", trainable=True)
    layers = [module for module in denoiser.network.modules() if isinstance(module, QuantizedLinear)]
    assert denoiser.network.conv_in.weight.dtype == torch.bfloat16
    assert {layer.scale.dtype for layer in layers} == {torch.float32}
    conditioning, x, t = denoiser.encode_prompts(["a"]), torch.randn(1, 4, 8, 8), torch.tensor([500])
    assert denoiser.predict(x, t, conditioning).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": None}, "lora: null trains all weights"),
        ({"lora": LoRAConfig(kind="dora")}, "dora needs the lengths"),
        ({"adapters": [AdapterConfig(path="x")]}, "mode freeze instead of merge"),
    ],
)
def test_what_needs_the_weights_themselves_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ModelConfig(quantization="int8", **options)


def test_without_bitsandbytes_nf4_says_what_to_install(
    tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DeviceError, match="nf4 needs bitsandbytes") as caught:
        load(tiny_pipeline_dir, quantization="nf4")
    assert "pip install 'diffalign[quantization]'" in caught.value.render()
