"""Tiny pipelines of every model family, of the real classes with random weights, and what each of them must pass.

Pictures are 16x16; a text encoder of CLIP reads 16 characters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_tokenizer
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from diffalign.algorithms.base import Algorithm, Context
from diffalign.algorithms.table import build_algorithm
from diffalign.config import (
    RUNS,
    LoRAConfig,
    ModelConfig,
    RewardConfig,
    Run,
    SamplerConfig,
    TrainingConfig,
)
from diffalign.images import to_pil
from diffalign.models.diffusers_denoiser import DiffusersDenoiser
from diffalign.models.loading import load_denoiser, load_for_inference
from diffalign.rewards import RewardMixture
from diffalign.seeding import sample_noise
from diffalign.training.loop import Trainer
from diffalign.training.processes import Processes
from diffalign.trajectory import rollout

PROMPTS = ["a red star", "two blue rings"]
SEEDS = [1, 2]
SIDE = 16


def text_config(width: int) -> CLIPTextConfig:
    """A CLIP text encoder of three layers, so that the penultimate one is not the input."""
    tokenizer = tiny_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_vae(channels: int, **options: object) -> AutoencoderKL:
    """Latents [channels, 8, 8] of 16x16 pictures."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIDE,
        **options,
    )


def tiny_sdxl(*, in_channels: int = 4, **scheduler: object) -> StableDiffusionXLPipeline:
    """SDXL with encoders of width 8 and 16, and the scheduler of its base model."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=24,
        attention_head_dim=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        norm_num_groups=4,
    )
    settings: dict[str, object] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(4, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(text_config(8)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(16)),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**{**settings, **scheduler}),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_t5(width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """One layer of T5 1.1, and a tokenizer of single characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    pieces += [(chr(code), -2.0) for code in range(ord("a"), ord("z") + 1)]
    config = T5Config(
        vocab_size=len(pieces),
        d_model=width,
        d_kv=width // 2,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config), T5TokenizerFast(vocab=pieces, extra_ids=0)


def tiny_sd3(*, t5: bool = True, **scheduler: object) -> StableDiffusion3Pipeline:
    """SD 3.5 (dual attention, normalised queries and keys) with the shift of its scheduler, 3."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        out_channels=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    encoder, tokenizer = tiny_t5(32) if t5 else (None, None)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=tiny_vae(16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(text_config(8)),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(16)),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux(*, guidance_embeds: bool = True, channels: int = 64, **scheduler: object) -> FluxPipeline:
    """FLUX.1 [dev] with its dynamic shift; without `guidance_embeds` [schnell]'s network."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=channels,
        out_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=8,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    encoder, tokenizer = tiny_t5(32)
    settings: dict[str, object] = {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15}
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{**settings, **scheduler}),
        vae=tiny_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(text_config(8)),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# What every family must pass


def load(folder: Path, *, full: bool = False, **options: object) -> DiffusersDenoiser:
    """A trainable denoiser with its reference."""
    lora = None if full else LoRAConfig(rank=2, alpha=5.0)
    config = ModelConfig(**{"path": str(folder), "lora": lora, "resolution": SIDE, **options})
    denoiser = load_denoiser(config, trainable=True)
    denoiser.keep_reference()
    return denoiser


def perturb(denoiser: DiffusersDenoiser) -> None:
    """Move every trainable weight, as training would."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.trainable_parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


@torch.no_grad()
def sampled(
    denoiser: DiffusersDenoiser,
    sampler: SamplerConfig,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = SEEDS,
) -> Tensor:
    """Finished latents [B, C, H, W]."""
    conditioning = denoiser.encode_prompts(prompts)
    *_, last = rollout(denoiser, conditioning, denoiser.make_sampler(sampler), seeds)
    return last.x_prev


@dataclass(frozen=True)
class Plain:
    """A family as plain diffusers draws it, without noise.

    Attributes:
        pipeline_class: its pipeline.
        sampler: of the policy that must draw the same.
        options: of the pipeline's call.
        prepare: what is done to a pipeline first.
    """

    pipeline_class: Any
    sampler: SamplerConfig
    options: Mapping[str, object] = field(default_factory=dict)
    prepare: Callable[[Any], Any] = lambda pipeline: pipeline

    def drawn(
        self, folder: Path, denoiser: DiffusersDenoiser, output: str = "latent", *, lora: Path | None = None
    ) -> Tensor:
        """What the pipeline in a folder makes of the noise of SEEDS: latents ("latent") or pictures ("pt")."""
        pipeline = self.prepare(self.pipeline_class.from_pretrained(folder))
        if lora is not None:
            self.add_lora(pipeline, lora)
        return self.call(pipeline, denoiser, output)

    def add_lora(self, pipeline: Any, folder: Path) -> None:
        pipeline.load_lora_weights(folder)

    def call(self, pipeline: Any, denoiser: DiffusersDenoiser, output: str) -> Tensor:
        return plain(pipeline, denoiser, self.sampler, output, **self.options)


def plain(
    pipeline: Any, denoiser: DiffusersDenoiser, sampler: SamplerConfig, output: str, **options
) -> Tensor:
    """What the pipeline itself makes of the same noise: latents ("latent") or pictures ("pt")."""
    pipeline.set_progress_bar_config(disable=True)
    noise = options.pop("latents", None)
    return pipeline(
        list(PROMPTS),  # Z-Image's pipeline writes into it
        latents=sample_noise(denoiser.latent_shape, SEEDS, "initial") if noise is None else noise,
        num_inference_steps=sampler.steps,
        output_type=output,
        **{"guidance_scale": sampler.guidance_scale, "height": SIDE, "width": SIDE, **options},
    ).images.float()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())


def write_data(folder: Path) -> None:
    """Two captioned pictures, one pair of them, a prompt file, and a differentiable reward."""
    pictures = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    (folder / "pictures").mkdir()
    captions = []
    for i, picture in enumerate(to_pil(pictures)):
        picture.save(folder / "pictures" / f"{i}.png")
        captions.append(json.dumps({"file_name": f"{i}.png", "text": PROMPTS[i]}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(captions))
    pair = {"prompt": PROMPTS[0], "chosen": "pictures/0.png", "rejected": "pictures/1.png"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "mine.py").write_text(
        "def red(images, prompts):\n    return images[:, 0].mean((1, 2))\nred.differentiable = True\n"
    )


def one_step(config: Run, denoiser: DiffusersDenoiser) -> tuple[Algorithm, dict[str, float]]:
    """Run one iteration, which must change the weights; the algorithm and its metrics."""
    reward = RewardMixture(config.rewards) if config.rewards else None
    context = Context()
    algorithm = build_algorithm(config, denoiser, reward, context)
    parameters = denoiser.trainable_parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    collected: dict[str, float] = {}
    trainer = Trainer(algorithm, parameters, config.training, Processes("cpu"), context.meter)
    trainer.run(lambda iteration, metrics: collected.update(metrics))
    changed = [name for name, p in parameters.items() if not torch.equal(p, before[name])]
    assert len(changed) > len(parameters) / 3, f"{len(changed)} of {len(parameters)}"
    assert all(math.isfinite(value) for value in collected.values()), collected
    assert collected["train/grad_norm"] > 0
    return algorithm, collected


def check_drawing(denoiser: DiffusersDenoiser, plain: Plain, folder: Path) -> None:
    """Latents to 1e-4, and pictures to 1/255, of those that the pipeline in `folder` draws."""
    latents = sampled(denoiser, plain.sampler)
    assert relative_error(latents, plain.drawn(folder, denoiser)) < 1e-4
    with torch.no_grad():
        assert_close(denoiser.decode(latents), plain.drawn(folder, denoiser, "pt"), atol=1 / 255, rtol=0)


def check_batches(denoiser: DiffusersDenoiser, online: SamplerConfig) -> None:
    """A picture does not depend on the others in its batch, nor on how long their prompts are."""
    alone = sampled(denoiser, online, PROMPTS[:1], [7])
    together = sampled(denoiser, online, ["a blue ring " * 9, *PROMPTS], [3, 7, 8])
    assert relative_error(together[1], alone[0]) < 1e-5


def check_lora(denoiser: DiffusersDenoiser, plain: Plain, base: Path, folder: Path) -> None:
    """The adapter, exported to `folder`, makes plain diffusers draw with `base` what the policy draws."""
    before = sampled(denoiser, plain.sampler)
    perturb(denoiser)
    ours = sampled(denoiser, plain.sampler)
    assert relative_error(ours, before) > 1e-2
    denoiser.export(folder)
    assert relative_error(plain.drawn(base, denoiser, lora=folder), ours) < 1e-4


def check_full(denoiser: DiffusersDenoiser, plain: Plain, folder: Path) -> None:
    """The pipeline, exported to `folder`, draws what the policy draws, in plain diffusers and when loaded again."""
    perturb(denoiser)
    ours = sampled(denoiser, plain.sampler)
    denoiser.export(folder)
    assert relative_error(plain.drawn(folder, denoiser), ours) < 1e-4
    again = load_for_inference(str(folder), device="cpu", resolution=denoiser.config.resolution)
    assert relative_error(sampled(again, plain.sampler), ours) < 1e-4


def check_training(
    denoiser: DiffusersDenoiser, folder: Path, online: SamplerConfig, exact: SamplerConfig
) -> None:
    """One iteration each of DPO (first loss ln 2), SFT, DDPO (ratio 1 before the update) and DRaFT.

    Args:
        folder: where data may be written.
        online, exact: samplers of the family with noise and without.
    """
    write_data(folder)
    common = {"training": TrainingConfig(iterations=1, device="cpu", learning_rate=1e-4)}
    pairs, prompts = {"path": str(folder / "pairs.jsonl")}, {"path": str(folder / "prompts.txt")}
    red = [RewardConfig(name=f"{folder / 'mine.py'}:red", label="red")]

    dpo = {"name": "dpo", "batch_size": 1, "validation_every": 0}
    data = {**pairs, "validation_fraction": 0.0}
    _, metrics = one_step(RUNS["dpo"](algorithm=dpo, data=data, **common), denoiser)
    assert abs(metrics["train/loss"] - math.log(2)) < 1e-6

    sft = {"name": "sft", "batch_size": 2}
    one_step(RUNS["sft"](algorithm=sft, data={"path": str(folder / "pictures")}, **common), denoiser)

    sizes = {"prompts_per_iteration": 2, "sample_batch_size": 4, "train_batch_size": 4}
    ddpo = {"name": "ddpo", "group_size": 2, "updates_per_epoch": 1, **sizes}
    run = RUNS["ddpo"](algorithm=ddpo, data=prompts, sampler=online, rewards=red, **common)
    algorithm, _ = one_step(run, denoiser)
    assert algorithm.ratio_error <= run.algorithm.clip_range / 10

    draft = {"name": "draft", "prompts_per_iteration": 2, "train_batch_size": 2}
    draft["backprop_steps"] = 1
    one_step(RUNS["draft"](algorithm=draft, data=prompts, sampler=exact, rewards=red, **common), denoiser)
