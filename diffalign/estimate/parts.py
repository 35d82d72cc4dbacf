"""The parts of a run's memory that lie there whatever it does: weights, optimizer, copies, caches, rewards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from math import ceil
from typing import Any, Literal

from torch import Tensor

from diffalign.assets import resolve
from diffalign.config import Run
from diffalign.estimate.counting import stored_bytes
from diffalign.estimate.hardware import CUDA_CONTEXT, resident_bytes
from diffalign.estimate.kernels import DeviceKind
from diffalign.estimate.phases import Phases
from diffalign.models.diffusers_denoiser import PROMPT_CACHE_BYTES
from diffalign.rewards import RewardModel
from diffalign.rewards.registry import ENTRY_POINTS

Phase = Literal["encoding prompts", "encoding pictures", "sampling", "decoding", "training", "evaluation"]
PICTURES: tuple[Phase, ...] = ("encoding pictures", "decoding", "evaluation")
"""Phases that need the VAE."""
PROMPTS: tuple[Phase, ...] = ("encoding prompts",)
ADAM_MOMENTS = 2
"""Numbers that AdamW keeps for each trained weight, in the weight's type: float32."""
FEWEST_IN_8_BITS, NUMBERS_PER_SCALE = 4096, 256
"""bitsandbytes' AdamW8bit: the smallest weights whose moments are in 8 bits, and how many of these share a float32."""


@dataclass(frozen=True)
class Part:
    """`bytes` of the peak memory of `phases`; without any, of all."""

    name: str
    bytes: int
    phases: tuple[Phase, ...] = ()


def standing_parts(phases: Phases, config: Run, kind: DeviceKind) -> Iterator[Part]:
    """All parts but what the phases themselves allocate."""
    denoiser, work, training = phases.denoiser, phases.work, config.training
    yield from _weights(phases, config, kind)
    parameters = denoiser.trainable_parameters().values()
    trained = stored_bytes(parameters)
    yield Part("gradients (float32)", trained, ("training",))
    if training.optimizer == "adamw8bit":
        yield Part("optimizer (AdamW, two moments in 8 bits)", sum(map(_bytes_in_8_bits, parameters)))
    else:
        yield Part("optimizer (AdamW, two moments in float32)", ADAM_MOMENTS * trained)
    if training.ema_decay is not None:
        yield Part("moving average (float32)", trained)
    if denoiser._frozen_copies is not None:
        network, encoders = denoiser._frozen_copies
        copies = [network, *(e for name, e in encoders.items() if e is not denoiser.encoders[name])]
        yield Part("frozen reference", sum(_size(copy) for copy in copies))
    if work.snapshot:
        yield Part("earlier policy (float32)", trained)
    latent = denoiser.latent_shape[0] * denoiser.latent_shape[1] * denoiser.latent_shape[2]
    if work.kept_elements:
        yield Part("sampled latents", int(work.kept_elements * latent))
    if work.kept_prompts:
        yield Part("prompts of the sampled pictures", int(work.kept_prompts * phases.prompt_bytes))
    if not denoiser.trains_text_encoder:
        most = min(PROMPT_CACHE_BYTES, _prompts_seen(config, work.rows) * phases.prompt_bytes)
        yield Part("cache of encoded prompts (at most)", most)
    if kind == "cuda":
        yield Part("CUDA context and libraries (assumed)", CUDA_CONTEXT)
    else:
        yield Part("Python and libraries (measured here)", resident_bytes())


def _weights(phases: Phases, config: Run, kind: DeviceKind) -> Iterator[Part]:
    denoiser = phases.denoiser
    for name, network in denoiser.networks().items():
        trained = [p for p in network.parameters() if p.requires_grad and network is not denoiser.vae]
        ids = {id(parameter) for parameter in trained}
        frozen = [t for t in (*network.parameters(), *network.buffers()) if id(t) not in ids]
        where: tuple[Phase, ...] = ()
        if kind == "cuda" and name in denoiser.encoders and config.model.offload_text_encoders:
            where = PROMPTS
        if kind == "cuda" and network is denoiser.vae and config.model.offload_vae:
            where = (*PICTURES, *(("training",) if phases.work.decodes else ()))
        if frozen:
            yield Part(f"{name} ({_types(frozen)})", stored_bytes(frozen), where)
        if trained:
            what = "adapter" if config.model.lora is not None else "trained weights"
            yield Part(f"{name}: {what} ({_types(trained)})", stored_bytes(trained))


def _types(tensors: Iterable[Tensor]) -> str:
    """The type that most of the bytes are in."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + tensor.numel() * tensor.element_size()
    return max(sizes, key=lambda name: sizes[name])


def _bytes_in_8_bits(parameter: Tensor) -> int:
    """Of the moments that AdamW8bit keeps for a weight."""
    count = parameter.numel()
    if count < FEWEST_IN_8_BITS:
        return ADAM_MOMENTS * 4 * count
    return ADAM_MOMENTS * (count + 4 * ceil(count / NUMBERS_PER_SCALE))


def _size(network: Any) -> int:
    return stored_bytes([*network.parameters(), *network.buffers()])


def _prompts_seen(config: Run, rows: int) -> int:
    """Most prompts that a run can see: how many its data has is not looked at."""
    options: Any = config.algorithm
    each = getattr(options, "prompts_per_iteration", rows * getattr(options, "gradient_accumulation", 1))
    evaluated = len(config.evaluation.sets) * config.evaluation.prompts_per_set
    return int(each) * config.training.iterations + evaluated + 1


def reward_parts(config: Run) -> tuple[list[Part], list[str]]:
    """Weights of the rewards that are known without building or fetching them, and the names of the others.

    Known are rewards whose class has no weights, and those with a local `checkpoint`, by the size of its files.
    """
    parts: list[Part] = []
    unknown: list[str] = []
    seen: set[str] = set()
    for reward in config.rewards:
        size = _reward_bytes(reward.name, reward.options, seen)
        if size is None:
            unknown.append(reward.label or reward.name)
        elif size:
            phases: tuple[Phase, ...] = ("sampling", "decoding", "evaluation") if reward.offload else ()
            parts.append(Part(f"reward {reward.label or reward.name} (its file)", size, phases))
    return parts, unknown


def _reward_bytes(name: str, options: dict[str, Any], seen: set[str]) -> int | None:
    """None: not known. Backbones that several rewards share count once, by their path in `seen`."""
    checkpoint = options.get("checkpoint")
    if isinstance(checkpoint, str) and resolve(checkpoint).exists():
        path = resolve(checkpoint)
        if str(path) in seen:
            return 0
        seen.add(str(path))
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        return sum(file.stat().st_size for file in files)
    for point in entry_points(group=ENTRY_POINTS, name=name):
        try:
            kind = point.load()
        except Exception:  # the run itself will say what is wrong with it
            return None
        return 0 if getattr(kind, "parameters", None) is RewardModel.parameters else None
    return None
