"""What is trained (LoRA, rsLoRA, DoRA) and what lies under it: merged and frozen adapters, or one that is continued."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from families import one_step, perturb, relative_error, write_data
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from diffalign.config import RUNS, LoRAConfig, ModelConfig, SamplerConfig, TrainingConfig
from diffalign.errors import ConfigError
from diffalign.models.loading import load_denoiser, load_for_inference
from diffalign.models.lora import lora_layers
from diffalign.models.stable_diffusion import StableDiffusion
from diffalign.training.run import align

PROMPTS = ["a red star", "two blue rings"]
KINDS = ["lora", "rslora", "dora"]


def build(path: Path, *, precision: str = "no", **options: object) -> StableDiffusion:
    config = ModelConfig.model_validate({"path": str(path), **options})
    denoiser = load_denoiser(config, mixed_precision=precision, trainable=True)
    denoiser.keep_reference()
    return denoiser


@torch.no_grad()
def prediction(denoiser: StableDiffusion) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return denoiser.predict(x, torch.tensor([10, 900]), denoiser.encode_prompts(PROMPTS))


@torch.no_grad()
def plain_prediction(pipeline: StableDiffusionPipeline) -> Tensor:
    """What diffusers' own UNet and text encoder make of the same."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    states = pipeline.text_encoder(tokens.input_ids)[0]
    return pipeline.unet(x, torch.tensor([10, 900]), states).sample


def plain(path: Path, lora: Path | None = None) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline


@pytest.fixture(scope="module")
def first(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's final/: LoRA of rank 2 and alpha 5 on the attention of UNet and text encoder."""
    folder = tmp_path_factory.mktemp("first") / "final"
    denoiser = build(tiny_pipeline_dir, lora={"rank": 2, "alpha": 5.0}, train_text_encoder=True)
    perturb(denoiser)
    denoiser.export(folder)
    return folder


# What is trained


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_policy_is_its_reference_exactly(tiny_pipeline_dir, kind, precision):
    lora = {"kind": kind, "rank": 2, "target_modules": ["to_q", "to_out.0", "proj_in", "conv1"]}
    denoiser = build(tiny_pipeline_dir, precision=precision, lora=lora, train_text_encoder=True)
    start = prediction(denoiser)
    with denoiser.reference():
        assert torch.equal(prediction(denoiser), start)
    perturb(denoiser)
    assert relative_error(prediction(denoiser), start) > 1e-3
    with denoiser.reference():
        assert torch.equal(prediction(denoiser), start)
    assert {p.dtype for p in denoiser.trainable_parameters().values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_the_first_dpo_loss_is_ln_2_and_the_ratio_is_1(tiny_pipeline_dir, tmp_path, kind):
    write_data(tmp_path)
    common = {"training": TrainingConfig(iterations=1, device="cpu", learning_rate=1e-4)}
    dpo = {"name": "dpo", "batch_size": 1, "validation_every": 0}
    data = {"path": str(tmp_path / "pairs.jsonl"), "validation_fraction": 0.0}
    denoiser = build(tiny_pipeline_dir, lora={"kind": kind, "rank": 2})
    _, metrics = one_step(RUNS["dpo"](algorithm=dpo, data=data, **common), denoiser)
    assert_close(metrics["train/loss"], math.log(2), atol=1e-6, rtol=0)
    ddpo = {"name": "ddpo", "group_size": 2, "updates_per_epoch": 1, "prompts_per_iteration": 2}
    ddpo |= {"sample_batch_size": 4, "train_batch_size": 4}
    run = RUNS["ddpo"](
        algorithm=ddpo,
        data={"path": str(tmp_path / "prompts.txt")},
        sampler=SamplerConfig(steps=3, guidance_scale=1.0),
        rewards=[{"name": f"{tmp_path / 'mine.py'}:red", "label": "red"}],
        **common,
    )
    algorithm, _ = one_step(run, build(tiny_pipeline_dir, lora={"kind": kind, "rank": 2}))
    assert algorithm.ratio_error <= run.algorithm.clip_range / 10


def test_rank_alpha_and_scale_of_each_module(tiny_pipeline_dir):
    lora = {"rank": 4, "rank_by_module": {"attn2.to_k": 9, "to_v": 2}, "alpha_by_module": {"to_v": 6.0}}
    for kind, power in (("lora", 1.0), ("rslora", 0.5)):
        unet = build(tiny_pipeline_dir, lora={"kind": kind, **lora}).unet
        found = {}
        for name, layer in unet.named_modules():
            if layer in lora_layers(unet):
                found[name.split(".", 5)[-1]] = (layer.r["default"], layer.scaling["default"])
        assert found["attn1.to_k"] == (4, 4 / 4**power)
        assert found["attn2.to_k"] == (9, 9 / 9**power)  # alpha is its rank
        assert found["attn1.to_v"] == (2, 6 / 2**power)


def test_excluded_modules_have_no_adapter(tiny_pipeline_dir):
    targets = {"target_modules": [r"down_blocks.*attn\d.to_[qk]"], "exclude_modules": ["attn2.to_q"]}
    names = build(tiny_pipeline_dir, lora={"rank": 2, **targets}).trainable_parameters()
    modules = {
        name.removeprefix("unet.").split(".lora_")[0].split("transformer_blocks.0.")[1] for name in names
    }
    assert modules == {"attn1.to_q", "attn1.to_k", "attn2.to_k"}
    assert all(".down_blocks." in name for name in names)


@pytest.mark.parametrize("option", ["rank_by_module", "alpha_by_module", "exclude_modules"])
def test_a_pattern_that_matches_nothing_is_an_error_with_names(tiny_pipeline_dir, option):
    value = ["to_x"] if option == "exclude_modules" else {"to_x": 8}
    with pytest.raises(ConfigError, match=f"{option}: no module that gets an adapter matches to_x") as caught:
        build(tiny_pipeline_dir, lora={option: value})
    assert "attn1.to_q" in caught.value.why


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_exported_for_plain_diffusers(tiny_pipeline_dir, tmp_path, kind):
    lora = {"kind": kind, "rank": 2, "alpha": 5.0, "target_modules": ["to_q", "to_out.0", "proj_in"]}
    lora["rank_by_module"] = {"attn2.to_q": 3}
    denoiser = build(tiny_pipeline_dir, lora=lora, train_text_encoder=True)
    start = prediction(denoiser)
    perturb(denoiser)
    denoiser.export(tmp_path)
    assert relative_error(prediction(denoiser), start) > 1e-2
    assert_close(
        plain_prediction(plain(tiny_pipeline_dir, tmp_path)), prediction(denoiser), atol=1e-5, rtol=1e-4
    )
    added = {"path": str(tmp_path), "weight": 1.0}
    again = load_denoiser(ModelConfig(path=str(tiny_pipeline_dir), lora=None, adapters=[added]))
    assert_close(prediction(again), prediction(denoiser), atol=1e-5, rtol=1e-4)


# What lies under it


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("mode", ["merge", "freeze"])
def test_an_earlier_adapter_is_part_of_policy_and_reference(tiny_pipeline_dir, first, mode, precision):
    adapter = {"path": str(first), "mode": mode}
    denoiser = build(tiny_pipeline_dir, precision=precision, lora={"rank": 3}, adapters=[adapter])
    start = prediction(denoiser)
    if precision == "no":
        assert_close(start, plain_prediction(plain(tiny_pipeline_dir, first)), atol=1e-5, rtol=1e-4)
    with denoiser.reference():
        assert torch.equal(prediction(denoiser), start)
    trained = denoiser.trainable_parameters()
    assert all(p.shape[0 if "lora_A" in name else 1] == 3 for name, p in trained.items())
    assert all(name.startswith("unet.") for name in trained)
    perturb(denoiser)
    assert relative_error(prediction(denoiser), start) > 1e-3
    with denoiser.reference():
        assert torch.equal(prediction(denoiser), start)
    assert denoiser.trainable_parameters().keys() == trained.keys()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_adapter_that_is_continued_starts_as_it_is_and_is_its_own_reference(
    tiny_pipeline_dir, first, precision
):
    adapter = {"path": str(first), "mode": "continue"}
    denoiser = build(tiny_pipeline_dir, precision=precision, adapters=[adapter], train_text_encoder=True)
    trained = denoiser.trainable_parameters()
    saved = load_file(first / "pytorch_lora_weights.safetensors")
    assert sum(p.numel() for p in trained.values()) == sum(t.numel() for t in saved.values())
    assert {p.dtype for p in trained.values()} == {torch.float32}
    start = prediction(denoiser)
    if precision == "no":
        assert_close(start, plain_prediction(plain(tiny_pipeline_dir, first)), atol=1e-5, rtol=1e-4)
    perturb(denoiser)
    changed = prediction(denoiser)
    assert relative_error(changed, start) > 1e-3
    with denoiser.reference():
        assert torch.equal(prediction(denoiser), start)
    assert torch.equal(prediction(denoiser), changed)


def test_what_the_continued_adapter_changes_of_an_untrained_encoder_stays(tiny_pipeline_dir, first, tmp_path):
    denoiser = build(tiny_pipeline_dir, adapters=[{"path": str(first), "mode": "continue"}])
    assert all(name.startswith("unet.") for name in denoiser.trainable_parameters())
    expected = plain_prediction(plain(tiny_pipeline_dir, first))
    assert_close(prediction(denoiser), expected, atol=1e-5, rtol=1e-4)
    denoiser.export(tmp_path)
    found = plain_prediction(plain(tiny_pipeline_dir, tmp_path))
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_weight_of_an_adapter_scales_its_update(tiny_pipeline_dir, first):
    bare = plain(tiny_pipeline_dir).unet.state_dict()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    saved = load_file(first / "pytorch_lora_weights.safetensors")
    down, up = saved[f"unet.{name}.lora.down.weight"], saved[f"unet.{name}.lora.up.weight"]
    adapter = {"path": str(first), "weight": -0.5}
    denoiser = load_denoiser(ModelConfig(path=str(tiny_pipeline_dir), lora=None, adapters=[adapter]))
    expected = bare[f"{name}.weight"] - 0.5 * 5 / 2 * up @ down  # alpha / rank = 5 / 2
    assert_close(denoiser.unet.state_dict()[f"{name}.weight"], expected)
    frozen = build(tiny_pipeline_dir, adapters=[{**adapter, "mode": "freeze"}])
    assert_close(prediction(frozen), prediction(denoiser), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_the_result_of_a_run_is_one_lora_of_the_plain_base_model(tiny_pipeline_dir, first, tmp_path, kind):
    other = tmp_path / "other"
    denoiser = build(tiny_pipeline_dir, lora={"rank": 1, "target_modules": ["proj_in", "ff.net.2", "to_k"]})
    perturb(denoiser)
    denoiser.export(other)
    adapters = [
        {"path": str(first), "weight": 0.7},
        {"path": str(other), "mode": "freeze", "weight": -1.5},
        {"path": str(first), "mode": "freeze"},
    ]
    lora = {"kind": kind, "rank": 3, "alpha": 2.0}
    denoiser = build(tiny_pipeline_dir, lora=lora, adapters=adapters)
    start = prediction(denoiser)
    perturb(denoiser)
    run = tmp_path / "run"
    denoiser.export(run / "final")
    assert relative_error(prediction(denoiser), start) > 1e-3
    found = plain_prediction(plain(tiny_pipeline_dir, run / "final"))
    assert_close(found, prediction(denoiser), atol=2e-5, rtol=1e-4)
    model = json.dumps({"path": str(tiny_pipeline_dir), "lora": lora, "adapters": adapters})
    (run / "config.yaml").write_text(f"algorithm: {{name: sft}}\nmodel: {model}\ndata: {{path: unused}}\n")
    loaded = load_for_inference(str(run), device="cpu")
    assert_close(prediction(loaded), prediction(denoiser), atol=2e-5, rtol=1e-4)


def test_the_fingerprint_covers_merged_and_frozen_adapters(tiny_pipeline_dir, first):
    marks = set()
    for mode in ("merge", "freeze"):
        for weight in (1.0, 0.5):
            adapter = {"path": str(first), "mode": mode, "weight": weight}
            marks.add(build(tiny_pipeline_dir, lora={"rank": 1}, adapters=[adapter]).fingerprint())
    marks.add(build(tiny_pipeline_dir, lora={"rank": 1}).fingerprint())
    assert len(marks) == 5


@pytest.mark.parametrize("mode", ["freeze", "continue"])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_pipeline_dir, first, tmp_path, mode):
    write_data(tmp_path)
    run = RUNS["dpo"].model_validate(
        {
            "algorithm": {"name": "dpo", "batch_size": 1, "validation_every": 0},
            "model": {"path": str(tiny_pipeline_dir), "adapters": [{"path": str(first), "mode": mode}]},
            "data": {"path": str(tmp_path / "pairs.jsonl"), "validation_fraction": 0.0},
            "training": {"iterations": 2, "checkpoint_every": 1, "device": "cpu", "learning_rate": 1e-2},
        }
    )
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    align(run, straight)
    shutil.copytree(straight, cut)
    shutil.rmtree(cut / "checkpoints" / "step-2")
    shutil.rmtree(cut / "final")
    (cut / "summary.json").unlink()
    align(run, cut, resume="must")
    metrics = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert abs(metrics[0]["train/loss"] - math.log(2)) < 1e-6
    file = "final/pytorch_lora_weights.safetensors"
    ours, expected = load_file(cut / file), load_file(straight / file)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


# What cannot be


def refused(**options: object) -> str:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(options)
    return str(caught.value)


def test_contradictions_are_found_before_a_model_is_loaded():
    goes_on = {"path": "x", "mode": "continue"}
    assert "at most one adapter" in refused(adapters=[goes_on, goes_on])
    assert "rank come from the adapter" in refused(adapters=[goes_on], lora={"rank": 8})
    assert "needs an adapter (use merge)" in refused(adapters=[goes_on], lora=None)
    assert "needs an adapter (use merge)" in refused(adapters=[{"path": "x", "mode": "freeze"}], lora=None)
    assert "starts as it is" in refused(adapters=[{**goes_on, "weight": 2.0}])
    assert "leaves the adapter out" in refused(adapters=[{"path": "x", "weight": 0.0}])
    assert "a dora over other adapters" in refused(adapters=[{"path": "x"}], lora={"kind": "dora"})
    assert "'to_(' is not a regular expression" in refused(lora={"target_modules": ["to_("]})
    assert ModelConfig(adapters=[goes_on], lora=LoRAConfig()).adapters[0].mode == "continue"


def test_a_dora_is_continued_alone(tiny_pipeline_dir, tmp_path):
    denoiser = build(tiny_pipeline_dir, lora={"kind": "dora", "rank": 2})
    perturb(denoiser)
    denoiser.export(tmp_path)
    expected = prediction(denoiser)
    again = build(tiny_pipeline_dir, adapters=[{"path": str(tmp_path), "mode": "continue"}])
    assert torch.equal(prediction(again), expected)
    again.export(tmp_path / "again")
    assert_close(
        plain_prediction(plain(tiny_pipeline_dir, tmp_path / "again")), expected, atol=1e-5, rtol=1e-4
    )
    with pytest.raises(ConfigError, match="is a DoRA, which cannot be under or beside"):
        build(tiny_pipeline_dir, adapters=[{"path": str(tmp_path), "mode": "freeze"}])


def test_an_adapter_of_the_unet_alone_cannot_be_continued_with_the_text_encoder(tiny_pipeline_dir, tmp_path):
    build(tiny_pipeline_dir).export(tmp_path)
    adapter = {"path": str(tmp_path), "mode": "continue"}
    with pytest.raises(ConfigError, match="changes nothing of the text_encoder"):
        build(tiny_pipeline_dir, adapters=[adapter], train_text_encoder=True)
