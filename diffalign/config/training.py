"""How weights are updated and kept, how a run is evaluated and shown."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from diffalign.config.base import Decay, Options
from diffalign.config.model import SamplerConfig


class TrainingConfig(Options):
    iterations: PositiveInt = 100
    """SFT, DPO: optimizer steps. DDPO: rounds of sampling and learning."""
    learning_rate: PositiveFloat = 1e-4
    """AdamW step size, reached after warm-up."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up; linear and cosine reach 0 just after the last iteration."""
    warmup_iterations: Annotated[int, Field(ge=0)] = 0
    """Iterations of linear warm-up."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the moments of weights of 4,096 numbers or more in 8 bits, 2 bytes a number instead of 8. It
    needs bitsandbytes (pip install 'diffalign[quantization]')."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's averaging constants."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's denominator offset."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm is clipped to this."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Compute type of the denoiser. Trainable weights, losses and log-probs stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    gradient_checkpointing: bool = False
    """Recompute the network's activations in the backward pass: less memory, about a third slower."""
    compile: bool = False
    """torch.compile the network's repeated blocks, or the network (minutes at the start, faster steps on a GPU)."""
    tf32: bool = True
    """TensorFloat-32 matrix products for float32 work on GPUs that have them."""
    channels_last: bool = True
    """NHWC memory layout for the UNet and VAE (faster convolutions on CPU and GPU)."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Keep an exponential moving average of the trainable weights (float32); `final/` holds the average."""
    checkpoint_every: PositiveInt = 50
    """Iterations between checkpoints; one is always written at the end, and when the run is told to stop."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept, at least 2: one may be damaged. Older ones go after a newer one is safely written."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints at multiples of this many iterations are kept for good; 0: none."""
    keep_best: str | None = None
    """Column of metrics.jsonl, e.g. reward/mean, whose highest checkpoint is kept too; -train/loss: the lowest."""
    background_checkpoints: bool = False
    """Write checkpoints beside the training, from a copy in memory: no pause, once more the trainable state in RAM."""
    on_full_disk: Literal["stop", "wait"] = "stop"
    """Without room for a checkpoint: end the run (the older ones are whole), or wait until there is room."""
    storage_patience: NonNegativeFloat = 60.0
    """Seconds for which a failed write is repeated: network storage may be away for a moment."""
    skip_bad_updates: Annotated[int, Field(ge=0)] = 0
    """Updates left out in a run for a loss, gradient, reward or advantage that is not finite; one more stops it."""
    timeout: PositiveFloat = 1800.0
    """Seconds that a process waits for the others before the run ends and names those that are missing."""
    preview_every: Annotated[int, Field(ge=0)] = 0
    """Iterations between sample grids in samples/ (same prompts, same seeds); 0: only before and after."""


class EvaluationConfig(Options):
    sets: dict[str, str] = {}
    """Name -> prompt file; pictures before and after training are compared on each."""
    prompts_per_set: PositiveInt = 64
    """The first n prompts of each set."""
    seeds_per_prompt: PositiveInt = 1
    """Pictures per prompt; before and after share their seeds."""
    sampler: SamplerConfig = SamplerConfig(steps=50, eta=0.0, guidance_scale=7.5)
    """How evaluation pictures are sampled."""
    batch_size: PositiveInt = 8
    """Pictures per denoiser call."""

    @field_validator("sampler", mode="before")
    @classmethod
    def _keep_the_other_defaults(cls, value: Any) -> Any:
        """`sampler: {steps: 20}` changes the steps only: the rest is evaluation's default, not training's."""
        if not isinstance(value, dict):
            return value
        eta = {"eta": 0.0} if value.get("kind", "ddim") == "ddim" else {}
        return {"guidance_scale": 7.5, **eta, **value}


class TrackingConfig(Options):
    trackers: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = []
    """Where the figures of metrics.jsonl are shown as well; each needs its own package."""
    project: Annotated[str, Field(min_length=1)] = "diffalign"
    """Project (mlflow: experiment) that the run is listed under; its name there is that of its folder."""
