"""The checkpoint, how it is sampled, and what its pictures are scored by."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from diffalign.config.adapters import AdapterConfig, LoRAConfig, adapter_problems
from diffalign.config.base import Options, raise_all
from diffalign.config.sizes import ResolutionOption
from diffalign.redaction import written_secrets


class ModelConfig(Options):
    path: Annotated[str, Field(min_length=1)] = "bundled:tiny-sd"
    """A diffusers folder, a hub id, a single .safetensors file, or bundled:tiny-sd."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of `path`."""
    variant: str | None = None
    """Weight-file variant in a diffusers folder, e.g. fp16."""
    resolution: ResolutionOption | None = None
    """Size of the pictures that are sampled, and trained on without data.buckets: a side in pixels, or [height, width].
    Default: what the checkpoint was trained for."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """Override the checkpoint's own parameterisation (single files do not always carry it)."""
    zero_terminal_snr: bool | None = None
    """Rescale betas to zero terminal SNR (Lin et al. 2023). Default: the checkpoint's own setting."""
    single_file_config: str | None = None
    """Folder or hub id with a single file's configuration and tokenizer, and with all that a file of the network
    alone has not. Default: diffusers' guess (hub)."""
    lora: LoRAConfig | None = LoRAConfig()
    """Train an adapter; null trains all weights of the denoising network."""
    adapters: list[AdapterConfig] = []
    """LoRAs that there are already, in the order in which they are added."""
    train_text_encoder: bool = False
    """Train the CLIP text encoders too (by LoRA or in full, as the denoising network). T5, Gemma and Qwen always stay
    as they are."""
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Storage and compute type of the VAE, apart from the rest."""
    vae_slicing: bool = False
    """Decode one picture at a time: less memory, a little slower."""
    vae_tiling: bool = False
    """Decode large pictures in overlapping tiles."""
    offload_text_encoders: bool = False
    """Keep frozen text encoders in the CPU's memory, except while they encode prompts that are not yet in the cache."""
    offload_vae: bool = False
    """Keep the VAE in the CPU's memory, except while it encodes or decodes pictures."""
    quantization: Literal["int8", "nf4"] | None = None
    """Store the network that a LoRA leaves as it is in 8 or 4 bits: the linear layers of its blocks. nf4 is QLoRA's
    format, and needs bitsandbytes (pip install 'diffalign[quantization]')."""

    @property
    def trained(self) -> str:
        """What is trained, in words."""
        continued = [adapter.path for adapter in self.adapters if adapter.mode == "continue"]
        if self.lora is None:
            return "all weights"
        if continued:
            return f"the adapter {continued[0]}"
        names = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}
        return f"{names[self.lora.kind]} of rank {self.lora.rank}"

    @model_validator(mode="after")
    def _adapters_can_be_combined(self) -> ModelConfig:
        return raise_all(self, list(adapter_problems(self.lora, self.adapters)))

    @model_validator(mode="after")
    def _only_what_is_frozen_is_put_away(self) -> ModelConfig:
        problems = []
        if self.offload_text_encoders and self.train_text_encoder:
            problems.append(
                "offload_text_encoders: trained text encoders are needed in every step (train_text_encoder)"
            )
        if self.quantization is not None and self.lora is None:
            problems.append(
                "quantization: lora: null trains all weights, and these cannot be quantised (give lora)"
            )
        if self.quantization is not None and self.lora is not None and self.lora.kind == "dora":
            problems.append(
                "quantization: dora needs the lengths of the base model's rows (use lora or rslora)"
            )
        if self.quantization is not None and any(adapter.mode == "merge" for adapter in self.adapters):
            problems.append(
                "quantization: the exported LoRA is one of the plain base model, which must be what was quantised "
                "(adapters: mode freeze instead of merge, which comes to the same)"
            )
        return raise_all(self, problems)


class SamplerConfig(Options):
    kind: Literal["ddim", "ddpm", "euler", "flow_sde", "cps", "dance_sde"] = "ddim"
    """Transition kernel. Diffusion: ddim (eta = 0 deterministic), ddpm. Flow models: euler (deterministic), or the
    stochastic flow_sde (Flow-GRPO), cps (FlowCPS) and dance_sde (DanceGRPO)."""
    steps: PositiveInt = 50
    """Denoising steps per picture."""
    eta: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """DDIM noise scale (Song et al. 2021, eq. 16): 1 fully stochastic, 0 deterministic. For ddim only."""
    noise_level: PositiveFloat | None = None
    """Noise scale of flow_sde and cps (a, cps at most 1) and dance_sde (eta). Default: 0.7, dance_sde 0.3."""
    guidance_scale: NonNegativeFloat = 5.0
    """Classifier-free guidance weight w in uncond + w (cond - uncond); 1 turns guidance off (one pass)."""

    @property
    def is_flow(self) -> bool:
        """Whether the kernel belongs to flow models."""
        return self.kind not in ("ddim", "ddpm")

    @property
    def is_stochastic(self) -> bool:
        """Whether steps draw noise, so that they have the density that a policy gradient needs."""
        return self.noise > 0

    @property
    def noise(self) -> float:
        """`Sampler.eta`: the noise scale in force, whichever option or default it comes from; 0: deterministic."""
        if self.kind == "ddim":
            return self.eta
        defaults = {"ddpm": 1.0, "euler": 0.0, "flow_sde": 0.7, "cps": 0.7, "dance_sde": 0.3}
        return defaults[self.kind] if self.noise_level is None else self.noise_level

    @model_validator(mode="after")
    def _noise_fits_the_kind(self) -> SamplerConfig:
        always = "is deterministic" if self.kind == "euler" else "always adds its own noise"
        problems = []
        if self.kind != "ddim" and self.eta != 1.0:
            problems.append(f"eta belongs to ddim; {self.kind} {always} (leave eta out)")
        if self.noise_level is not None:
            if self.kind in ("ddim", "ddpm", "euler"):
                problems.append(
                    f"noise_level belongs to flow_sde, cps and dance_sde, not to {self.kind} (leave it out)"
                )
            elif self.kind == "cps" and self.noise_level > 1:
                problems.append(
                    f"noise_level: at most 1 for cps, whose std is s' sin(a pi/2); got {self.noise_level}"
                )
        return raise_all(self, problems)


class RewardConfig(Options):
    name: Annotated[str, Field(min_length=1)]
    """A registered reward (`diffalign score --help` lists them), file.py:function or package.mod:function."""
    weight: float = 1.0
    """Factor in the training reward; 0 only watches."""
    label: str | None = None
    """Column name in metrics. Default: the reward's name."""
    clip: tuple[float, float] | None = None
    """Clamp the reward to [low, high] before it is weighted; the component is logged as it was published."""
    offload: bool = False
    """Move the model to the CPU between rollouts, so that training has the GPU's memory."""
    options: dict[str, Any] = {}
    """Keyword arguments of the reward, e.g. {checkpoint: bundled:clip}; ${NAME} is an environment variable."""

    @model_validator(mode="after")
    def _clip_is_a_range(self) -> RewardConfig:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip: [low, high] with low below high, not {list(self.clip)}")
        return self

    @model_validator(mode="after")
    def _holds_no_secrets(self) -> RewardConfig:
        return raise_all(self, list(written_secrets(self.options, "options")))
