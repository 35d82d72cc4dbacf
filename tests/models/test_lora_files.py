"""LoRA files of diffusers, kohya and PEFT read as plain diffusers and peft read them; everything else is refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_pipeline
from families import tiny_flux, tiny_sd3, tiny_sdxl
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from diffalign.config import AdapterConfig
from diffalign.errors import CheckpointError
from diffalign.models.lora_files import read_lora
from diffalign.models.lora_updates import merge

ENCODERS = ("text_encoder", "text_encoder_2")


def networks_of(pipeline: Any) -> dict[str, Any]:
    """What may have an adapter: T5 may not."""
    parts = {name: getattr(pipeline, name, None) for name in ("unet", "transformer", *ENCODERS)}
    return {
        name: part for name, part in parts.items() if part is not None and "T5" not in type(part).__name__
    }


def read(path: Path, pipeline: Any, **options: object) -> dict[str, Any]:
    return read_lora(AdapterConfig(path=str(path), **options), pipeline, networks_of(pipeline))


def merged_weights(path: Path, pipeline: Any) -> dict[str, Tensor]:
    """All weights after our merge."""
    networks = networks_of(pipeline)
    for name, updates in read(path, pipeline).items():
        merge(networks[name], updates, 1.0)
    return weights_of(pipeline)


def weights_of(pipeline: Any) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor
        for part, network in networks_of(pipeline).items()
        for name, tensor in network.state_dict().items()
    }


def fused_weights(path: Path, pipeline: Any) -> dict[str, Tensor]:
    """All weights after diffusers' own."""
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    parts = {
        name for name in networks_of(pipeline) if getattr(networks_of(pipeline)[name], "peft_config", None)
    }
    pipeline.fuse_lora(components=sorted(parts))
    pipeline.unload_lora_weights()
    return weights_of(pipeline)


def linear(network: nn.Module, *endings: str) -> dict[str, nn.Linear]:
    return {
        name: m for name, m in network.named_modules() if name.endswith(endings) and isinstance(m, nn.Linear)
    }


def pair(
    module: nn.Linear, rank: int, draw: torch.Generator, outputs: int | None = None
) -> tuple[Tensor, Tensor]:
    down = torch.randn(rank, module.in_features, generator=draw)
    return down, torch.randn(outputs or module.out_features, rank, generator=draw)


def kohya_unet(pipeline: Any, file: Path) -> None:
    """kohya's names for SD 1.x's UNet and CLIP, and SDXL's in diffusers' blocks: ranks 2 and 3, alpha 5."""
    draw, tensors = torch.Generator().manual_seed(0), {}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    if hasattr(pipeline, "text_encoder_2"):
        prefixes |= {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    for part, prefix in prefixes.items():
        layers = linear(getattr(pipeline, part), "to_q", "to_out.0", "q_proj", "out_proj", "mlp.fc1")
        for i, (name, module) in enumerate(layers.items()):
            name = name if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            key = prefix + name.replace(".", "_")
            down, up = pair(module, 2 + i % 2, draw)
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(5.0)
    save_file(tensors, file)


def kohya_flux(pipeline: Any, file: Path) -> None:
    """kohya's names for FLUX.1: query, key and value are one layer there."""
    draw, tensors = torch.Generator().manual_seed(0), {}
    attention = pipeline.transformer.transformer_blocks[0].attn
    keys = {"img_attn_qkv": (attention.to_q, 3), "txt_attn_qkv": (attention.add_q_proj, 3)}
    keys["img_attn_proj"] = (attention.to_out[0], 1)
    for name, (module, count) in keys.items():
        down, up = pair(module, 2, draw, count * module.out_features)
        key = f"lora_unet_double_blocks_0_{name}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(5.0)
    save_file(tensors, file)


def diffusers_file(pipeline: Any, file: Path) -> None:
    """What diffusers' training scripts write: alpha in the metadata."""
    name = "transformer" if hasattr(pipeline, "transformer") else "unet"
    network = getattr(pipeline, name)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_out.0"])
    draw = torch.Generator().manual_seed(0)
    layers = {}
    for module_name, module in linear(network, "to_q", "to_out.0").items():
        down, up = pair(module, 2, draw)
        layers |= {f"{module_name}.lora_A.weight": down, f"{module_name}.lora_B.weight": up}
    arguments = {f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": config.to_dict()}
    pipeline.save_lora_weights(str(file.parent), weight_name=file.name, **arguments)


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any, Path], None]]] = {
    "sd-kohya": (tiny_pipeline, kohya_unet),
    "sd-diffusers": (tiny_pipeline, diffusers_file),
    "sdxl-kohya": (tiny_sdxl, kohya_unet),
    "sd3-diffusers": (tiny_sd3, diffusers_file),
    "flux-kohya": (tiny_flux, kohya_flux),
    "flux-diffusers": (tiny_flux, diffusers_file),
}


@pytest.mark.parametrize(("build", "write"), CASES.values(), ids=CASES)
def test_a_file_changes_every_weight_as_plain_diffusers_does(build, write, tmp_path):
    pipeline, file = build(), tmp_path / "lora.safetensors"
    before = {name: tensor.clone() for name, tensor in weights_of(pipeline).items()}
    write(pipeline, file)
    expected = fused_weights(file, pipeline)
    found = merged_weights(file, build())
    assert found.keys() == expected.keys()
    changed = [name for name in before if not torch.equal(before[name], expected[name])]
    assert changed
    for name, tensor in expected.items():
        assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_each_module_has_its_own_alpha_over_its_rank(tmp_path):
    pipeline, file = tiny_pipeline(), tmp_path / "lora.safetensors"
    kohya_unet(pipeline, file)
    raw = load_file(file)
    for i, name in enumerate(name for name in raw if name.endswith(".alpha")):
        raw[name] = torch.tensor(1.0 + i)  # diffusers 0.42 itself reads attention's as one and the same
    save_file(raw, file)
    updates = read(file, pipeline)
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_text_model_")):
        for name, update in updates[part].items():
            key = prefix + name.replace(".", "_")
            assert_close(update.scale, float(raw[f"{key}.alpha"]) / len(raw[f"{key}.lora_down.weight"]))
            assert torch.equal(update.up, raw[f"{key}.lora_up.weight"])
    assert {update.rank for update in updates["unet"].values()} == {2, 3}
    assert all(name.endswith(("q_proj", "out_proj", "fc1")) for name in updates["text_encoder"])


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize(
    "options", [{"lora_alpha": 5}, {"lora_alpha": 5, "use_rslora": True}, {"use_dora": True}]
)
def test_what_peft_saves_is_read_as_peft_merges_it(part, options, tmp_path):
    pipeline = tiny_pipeline()
    targets = {"target_modules": ["to_q", "proj_in", "q_proj"], "rank_pattern": {"attn2.to_q": 3}}
    if part == "text_encoder":
        targets.pop("rank_pattern")
    model = get_peft_model(getattr(pipeline, part), LoraConfig(r=2, **targets, **options))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(tmp_path)
    expected = model.merge_and_unload().state_dict()
    found = merged_weights(tmp_path, tiny_pipeline())
    for name, tensor in expected.items():
        assert_close(found[f"{part}.{name}"], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_reading_leaves_the_model_and_the_random_numbers_as_they_were(tmp_path):
    pipeline, file = tiny_pipeline(), tmp_path / "lora.safetensors"
    kohya_unet(pipeline, file)
    before = {name: tensor.clone() for name, tensor in weights_of(pipeline).items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    read(file, pipeline)
    assert torch.equal(torch.rand(1), expected)
    after = weights_of(pipeline)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# What is refused


def refusal(path: Path, pipeline: Any, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path, pipeline, **options)
    return caught.value.render()


@pytest.mark.parametrize(
    ("theirs", "write", "ours", "looks"),
    [
        (tiny_flux, kohya_flux, tiny_pipeline, "FLUX.1, of kohya"),
        (tiny_flux, diffusers_file, tiny_sd3, "FLUX.1"),
        (tiny_sd3, diffusers_file, tiny_sdxl, "a transformer"),
        (tiny_sdxl, kohya_unet, tiny_pipeline, "Stable Diffusion XL, of kohya"),
        (tiny_pipeline, diffusers_file, tiny_flux, "a UNet"),
    ],
)
def test_a_lora_of_another_family(theirs, write, ours, looks, tmp_path):
    write(theirs(), tmp_path / "lora.safetensors")
    pipeline = ours()
    text = refusal(tmp_path / "lora.safetensors", pipeline)
    assert f"is a LoRA of another model than {type(pipeline).__name__}" in text
    assert f"look like those of {looks}" in text


def test_a_lora_of_another_base_is_told_by_its_shapes(tmp_path):
    file = tmp_path / "lora.safetensors"
    diffusers_file(tiny_pipeline(), file)
    tensors = {
        name: torch.cat([t, t], dim=1) if "lora_A" in name else t for name, t in load_file(file).items()
    }
    save_file(tensors, file)
    assert "to_q takes 8, this LoRA 16" in refusal(file, tiny_pipeline())


def test_a_weight_that_no_module_takes_is_named(tmp_path):
    file = tmp_path / "lora.safetensors"
    diffusers_file(tiny_pipeline(), file)
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("to_q.lora_A.weight"))
    save_file({**tensors, name.replace("to_q", "to_x"): tensors[name].clone()}, file)
    text = refusal(file, tiny_pipeline())
    assert f"no module takes 1 of its {len(tensors) + 1} weights" in text
    assert "to_x" in text


@pytest.mark.parametrize(
    "name",
    [
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight",
        "lora_unet_double_blocks_0_img_attn_proj.diff_b",
        "text_encoders.t5xxl.transformer.encoder.block.0.lora_down.weight",
        "transformer.x_embedder.lora_A.weight",
    ],
)
def test_what_diffusers_leaves_out_of_a_file_of_flux_is_named(name, tmp_path):
    file = tmp_path / "lora.safetensors"
    kohya_flux(tiny_flux(), file)
    save_file({**load_file(file), name: torch.ones(2, 8)}, file)
    text = refusal(file, tiny_flux())
    assert "changes more than diffusers reads of it" in text
    assert ("lora_unet_double_blocks_0" if name.startswith("transformer.") else name) in text


def test_what_is_left_out_and_zero_is_nothing(tmp_path):
    pipeline, file = tiny_flux(), tmp_path / "lora.safetensors"
    kohya_flux(pipeline, file)
    nothing = {"lora_unet_double_blocks_0_img_attn_proj.diff_b": torch.zeros(8)}
    save_file({**load_file(file), **nothing}, file)
    assert read(file, pipeline).keys() == {"transformer"}


@pytest.mark.parametrize(
    ("ending", "tensor", "why"),
    [
        (".alpha", torch.tensor(math.nan), "not finite"),
        ("lora_up.weight", torch.ones(8), "no module takes 1 of its"),
        ("lora_down.weight", torch.ones(()), "LoRA weights cannot be read"),
    ],
)
def test_a_damaged_weight_or_alpha_is_refused(ending, tensor, why, tmp_path):
    pipeline, file = tiny_pipeline(), tmp_path / "lora.safetensors"
    kohya_unet(pipeline, file)
    tensors = load_file(file)
    save_file({**tensors, next(name for name in tensors if name.endswith(ending)): tensor}, file)
    assert why in refusal(file, pipeline)


def test_lengths_of_a_dora_that_do_not_fit_are_named(tmp_path):
    pipeline = tiny_pipeline()
    get_peft_model(pipeline.unet, LoraConfig(r=2, target_modules=["to_q"], use_dora=True)).save_pretrained(
        tmp_path
    )
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "magnitude" in name)
    save_file({**tensors, name: torch.ones(len(tensors[name]) + 1)}, file)
    assert "this DoRA has lengths of" in refusal(tmp_path, tiny_pipeline())
    save_file({**tensors, name: torch.full_like(tensors[name], math.inf)}, file)
    assert "not finite" in refusal(tmp_path, tiny_pipeline())


def test_half_of_a_pair_is_refused(tmp_path):
    file = tmp_path / "lora.safetensors"
    diffusers_file(tiny_pipeline(), file)
    tensors = load_file(file)
    del tensors[next(name for name in tensors if name.endswith("lora_B.weight"))]
    save_file(tensors, file)
    assert "LoRA weights cannot be read" in refusal(file, tiny_pipeline())


@pytest.mark.parametrize("name", ["lora.ckpt", "lora.bin", "lora.pt"])
def test_a_pickle_is_refused_unopened_with_the_way_to_convert_it(name, tmp_path):
    (tmp_path / name).write_bytes(b"not even a pickle")
    for path in (tmp_path / name, tmp_path):
        text = refusal(path, tiny_pipeline())
        assert "pickle file" in text
        assert "save_file" in text


def test_what_is_no_lora(tmp_path, tiny_pipeline_dir):
    pipeline, file = tiny_pipeline(), tmp_path / "lora.safetensors"
    assert "does not exist" in refusal(tmp_path / "nowhere", pipeline)
    assert "is a whole model, not an adapter" in refusal(tiny_pipeline_dir, pipeline)
    assert "holds no LoRA" in refusal(tmp_path, pipeline)
    save_file({"model.diffusion_model.out.0.weight": torch.ones(1)}, file)
    assert "holds no LoRA" in refusal(file, pipeline)
    for name, kind in (("dora_scale", "DoRA in kohya's format"), ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr")):
        save_file({f"lora_unet_x.{name}": torch.ones(1)}, file)
        assert f"is a {kind}, which diffusers does not read" in refusal(file, pipeline)
    diffusers_file(pipeline, file)
    file.write_bytes(file.read_bytes()[:-100])
    assert "LoRA weights cannot be read" in refusal(file, pipeline)
    (tmp_path / "notes.txt").write_text("hello")
    assert "is not a .safetensors file" in refusal(tmp_path / "notes.txt", pipeline)


def test_one_of_several_files_is_chosen_by_name(tmp_path):
    pipeline = tiny_pipeline()
    diffusers_file(pipeline, tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert "holds several files" in refusal(tmp_path, pipeline)
    assert read(tmp_path, pipeline, weight_name="b.safetensors").keys() == {"unet"}
    assert "has no c.safetensors" in refusal(tmp_path, pipeline, weight_name="c.safetensors")


def test_a_hub_id_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = refusal(Path("nobody/nothing-of-this-name"), tiny_pipeline(), revision="v9")
    assert "neither a local path nor a hub repository" in text
    assert "revision v9" in text
