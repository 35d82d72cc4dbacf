"""What the diffusers families share as policies: prompts and their cache, guidance, pictures.

A family says how prompts are encoded and how its network is called; its networks are in `pipeline_networks.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from diffalign.config import ModelConfig
from diffalign.errors import CheckpointError
from diffalign.models.base import Conditioning, Denoiser
from diffalign.models.offload import on_device
from diffalign.models.pipeline_networks import PipelineNetworks

PROMPT_CACHE_BYTES = 512 * 2**20


class DiffusersDenoiser(PipelineNetworks):
    """A diffusers pipeline as a policy; its arguments and attributes are those of `PipelineNetworks`."""

    def __init__(
        self,
        pipeline: Any,
        config: ModelConfig,
        *,
        device: torch.device,
        compute_dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        trainable: bool = False,
        seed: int = 0,
    ) -> None:
        self._prompt_cache: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._negative: Denoiser | None = None
        super().__init__(
            pipeline,
            config,
            device=device,
            compute_dtype=compute_dtype,
            channels_last=channels_last,
            trainable=trainable,
            seed=seed,
        )

    # What a family says

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts, one row each: "embeddings" [B, L, C], and the family's `Conditioning.extra`.

        The empty text is what guidance starts from, and what training without a caption sees.
        """

    @abstractmethod
    def _forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output, float32, without guidance."""

    # The policy

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        texts = [*prompts, ""]
        rows = self._encode(texts) if self.trains_text_encoder else self._cached(texts)
        given = {name: value[:-1] for name, value in rows.items()}
        without = {name: value[-1:] for name, value in rows.items()}
        return Conditioning(given.pop("embeddings"), without.pop("embeddings"), given, without)

    def _cached(self, texts: Sequence[str]) -> dict[str, Tensor]:
        missing = [text for text in dict.fromkeys(texts) if text not in self._prompt_cache]
        lent = self.config.offload_text_encoders and bool(missing)
        with torch.no_grad(), on_device(self.encoders.values(), self.device, lent=lent):
            for start in range(0, len(missing), 64):
                chunk = missing[start : start + 64]
                rows = self._encode(chunk)
                for i, text in enumerate(chunk):
                    self._prompt_cache[text] = {name: value[i].clone() for name, value in rows.items()}
        encoded = [self._prompt_cache[text] for text in texts]
        size = sum(value.nbytes for value in encoded[-1].values())
        while len(self._prompt_cache) * size > PROMPT_CACHE_BYTES:
            self._prompt_cache.popitem(last=False)
        return {name: torch.stack([row[name] for row in encoded]) for name in encoded[-1]}

    def _tokens(self, name: str, texts: Sequence[str], length: int | None = None) -> Any:
        """Padded and cut before the end token, to the length of the encoder `name` unless another is given."""
        tokenizer = self._tokenizer(name)
        return tokenizer(
            list(texts),
            padding="max_length",
            max_length=length or tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)

    def predict(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        t = t.to(self.device).expand(len(x))
        if guidance_scale == 1.0:
            return self._forward(x, t, conditioning)
        if self._negative is not None:
            without = self._negative.predict(x, t, self._negative.encode_prompts([""] * len(x)))
            return without + guidance_scale * (self._forward(x, t, conditioning) - without)
        both = self._forward(torch.cat([x, x]), torch.cat([t, t]), conditioning.after_unconditional())
        without, with_prompt = both.chunk(2)
        return without + guidance_scale * (with_prompt - without)

    def _autocast(self) -> torch.autocast:
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(
            self.device.type, dtype=self.compute_dtype if enabled else torch.bfloat16, enabled=enabled
        )

    def guide_away_from(self, negative: Denoiser) -> None:
        """From now on, guidance starts at what `negative` predicts without a prompt, instead of this model itself:

            guided = e_negative(x, "") + w (e(x, prompt) - e_negative(x, ""))

        (Wang et al. 2025, arXiv:2505.11245). With w = 1 it has no effect.

        Raises:
            CheckpointError: it is of another family, latent shape, noise schedule or parameterisation.
        """
        ours, theirs = _predicts(self), _predicts(negative)
        different = [name for name in ours if ours[name] != theirs[name]]
        if different:
            raise CheckpointError(
                "the negative model's predictions do not fit this model's",
                why="; ".join(f"{name}: {theirs[name]} instead of {ours[name]}" for name in different),
                hint="use a checkpoint that was trained from the same base model, at the same resolution",
            )
        self._negative = negative

    def fingerprint(self) -> str:
        own = super().fingerprint()
        if self._negative is None:
            return own
        return sha256(f"{own} {self._negative.fingerprint()}".encode()).hexdigest()

    # Pictures

    def encode_images(self, images: Tensor) -> Tensor:
        pixels = (2 * images - 1).to(self.device, self.vae.dtype)
        with self._vae_on_device():
            return (self._encoded(pixels).float() - self._latent_shift()) * self.vae.config.scaling_factor

    def _encoded(self, pixels: Tensor) -> Tensor:
        """The VAE's latents, without shift and scale, of pictures in [-1, 1]."""
        mean: Tensor = self.vae.encode(pixels).latent_dist.mean
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents.float() / self.vae.config.scaling_factor + self._latent_shift()
        with self._vae_on_device():
            return (self.vae.decode(scaled.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    def _vae_on_device(self) -> AbstractContextManager[None]:
        return on_device([self.vae], self.device, lent=self.config.offload_vae)

    def _latent_shift(self) -> float:
        return float(self.vae.config.get("shift_factor") or 0.0)


def _predicts(denoiser: Denoiser) -> dict[str, object]:
    """What a prediction means: two models that agree in this can be mixed."""
    schedule = denoiser.schedule
    signal, _ = schedule.levels(torch.tensor([0, schedule.num_timesteps - 1]))
    first, last = signal.square().tolist()
    return {
        "family": type(denoiser).__name__,
        "latent shape": denoiser.latent_shape,
        "prediction type": schedule.prediction_type,
        "noise levels": f"{schedule.num_timesteps} from {first:.6f} to {last:.6f}",
    }
