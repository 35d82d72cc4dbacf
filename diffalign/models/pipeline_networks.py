"""The networks of a diffusers pipeline: where they lie and in which type, what trains, the reference, export.

A family says which networks it has and reads its noise levels.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from diffalign.config import ModelConfig
from diffalign.config.sizes import Size, as_resolution, as_size, in_words
from diffalign.errors import CheckpointError, ConfigError
from diffalign.models.adapters import Adapters
from diffalign.models.base import Denoiser
from diffalign.models.fingerprint import fingerprint
from diffalign.models.lora import TEXT_ENCODER_TARGETS
from diffalign.models.quantization import quantize


class PipelineNetworks(Denoiser):
    """The networks of a diffusers pipeline, one of them and perhaps its text encoders trained.

    Args:
        pipeline: a `pipeline_class` with float32 weights, any device.
        config: the run's model section.
        device: where to compute.
        compute_dtype: float32, or the type of mixed precision; frozen weights are stored in it.
        trainable: add the adapter (or unfreeze the weights) and keep a reference.
        seed: initial values of the adapter.

    Attributes:
        network: the UNet or transformer that denoises.
        encoders: the pipeline's name of each text encoder that is there -> the encoder.

    Raises:
        CheckpointError: a pipeline of this class that is not a text-to-picture model.
        ConfigError: options that this checkpoint cannot have.
    """

    pipeline_class: ClassVar[Any]
    """What loads a checkpoint of this family."""
    load_options: ClassVar[dict[str, object]] = {}
    """Arguments of `pipeline_class` that leave out what is not needed."""
    network_name: ClassVar[str]
    encoder_names: ClassVar[tuple[str, ...]]
    optional_encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders that a checkpoint may lack."""
    trained_encoders: ClassVar[tuple[str, ...]]
    """Text encoders that `train_text_encoder` is about."""
    bfloat16_encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders that overflow in float16: under fp16 they are stored in bfloat16."""
    lora_targets: ClassVar[tuple[str, ...]]

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
        self.pipeline, self.config, self.device, self.compute_dtype = pipeline, config, device, compute_dtype
        self.network: Any = getattr(pipeline, self.network_name)
        self.vae = pipeline.vae
        found = {name: getattr(pipeline, name) for name in self.encoder_names}
        self.encoders: dict[str, Any] = {name: part for name, part in found.items() if part is not None}
        self.trains_text_encoder = trainable and config.train_text_encoder
        self._check_pipeline()
        self._set_resolution()
        self._set_schedule()
        self._frozen_copies: tuple[Any, dict[str, Any]] | None = None
        adaptable = {name: self.encoders[name] for name in self.trained_encoders if name in self.encoders}
        adaptable[self.network_name] = self.network
        self._adapters = Adapters(config, pipeline, adaptable, trainable=trainable)
        self._place(channels_last, trainable)
        if trainable:
            self._make_trainable(seed)

    # What a family says

    @abstractmethod
    def _set_schedule(self) -> None:
        """Read `schedule` from the checkpoint's scheduler. `resolution` is known."""

    @abstractmethod
    def _schedule_settings(self) -> dict[str, object]:
        """What the noise levels and timesteps depend on, for the fingerprint."""

    def _check_pipeline(self) -> None:
        """Raise for a checkpoint that this family cannot work with."""
        missing = [
            name for name in self.encoder_names if name not in (*self.encoders, *self.optional_encoders)
        ]
        if missing:
            raise CheckpointError(
                f"{self.config.path} lacks a text encoder: {', '.join(missing)}",
                why=f"a {type(self).__name__} encodes its prompts with {', '.join(self.encoder_names)}",
                hint="give a text-to-picture base model; a refiner, which has one encoder, is not one",
            )
        silent = [name for name in self.encoders if self._tokenizer(name) is None]
        if silent:
            raise CheckpointError(
                f"{self.config.path} lacks the tokenizer of its {', '.join(silent)}",
                hint="copy the tokenizer folders of the base model, and their lines of its model_index.json",
            )
        if self.config.train_text_encoder and not self.trained_encoders:
            raise ConfigError(
                f"model.train_text_encoder: that of a {type(self).__name__} is a language model, which is not trained",
                hint="leave train_text_encoder out",
            )
        channels, latent = self._network_channels(), int(self.vae.config.latent_channels)
        if channels != latent:
            raise CheckpointError(
                f"the network of {self.config.path} takes {channels} channels, and a latent has {latent}",
                why="it is made for inpainting, editing or depth, and expects a picture beside the noise",
                hint="give the text-to-picture base model",
            )

    def _network_channels(self) -> int:
        """Channels of a latent as the network takes it."""
        return int(self.network.config.in_channels)

    def _patch_side(self) -> int:
        """Latent cells along the side of what the network takes as one token; 1 for a UNet."""
        return int(self.network.config.get("patch_size") or 1)

    def _default_side(self) -> int:
        """Latent cells along the side of the pictures that the checkpoint was trained for."""
        side = self.network.config.sample_size
        if not isinstance(side, int):
            raise ConfigError(
                f"model.resolution: the checkpoint does not say the size of its pictures (sample_size: {side})",
                hint="give model.resolution: a side in pixels, or [height, width]",
            )
        return side

    def _cell_side(self) -> int:
        """Pixels along the side of a latent cell."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def _remember_side(self, side: int) -> None:
        """Write the side of a latent where an exported pipeline has the resolution of its pictures."""
        if "sample_size" in self.network.config:
            self.network.register_to_config(sample_size=side)

    def _encoder_dtype(self, name: str) -> torch.dtype:
        """What a frozen text encoder is stored in."""
        overflows = name in self.bfloat16_encoders and self.compute_dtype == torch.float16
        return torch.bfloat16 if overflows else self.compute_dtype

    # Construction

    def _set_resolution(self) -> None:
        cell = self._cell_side()
        self.size = as_size(self.config.resolution or self._default_side() * cell)
        self.require_size(self.size, "model.resolution")
        height, width = (side // cell for side in self.size)
        self.latent_shape = (int(self.vae.config.latent_channels), height, width)
        if height == width:
            self._remember_side(height)

    def require_size(self, size: Size, option: str) -> None:
        cell = self._cell_side()
        step = cell * self._patch_side()
        if size[0] % step or size[1] % step:
            raise ConfigError(
                f"{option}: {size[0] if size[0] == size[1] else in_words(size)} is not a multiple of {step}",
                why=f"one {'patch' if step > cell else 'latent cell'} of this model covers {step} x {step} pixels",
            )

    def _place(self, channels_last: bool, trainable: bool) -> None:
        full = trainable and self.config.lora is None
        dtypes = {self.network: torch.float32 if full else self.compute_dtype}
        for name, encoder in self.encoders.items():
            trained = full and self.config.train_text_encoder and name in self.trained_encoders
            dtypes[encoder] = torch.float32 if trained else self._encoder_dtype(name)
        dtypes[self.vae] = getattr(torch, self.config.vae_dtype)
        for network, dtype in dtypes.items():
            network.requires_grad_(False).eval()
            if network.dtype != dtype:  # before it is moved: the device never holds more than is needed
                network.to(dtype)
            if network is self.network and self.config.quantization is not None:
                quantize(network, self.config.quantization, self.device)
            network.to(self._home(network))
        if channels_last:
            for network in (self.network, self.vae):
                network.to(memory_format=torch.channels_last)
        if self.config.vae_slicing:
            self.vae.enable_slicing()
        if self.config.vae_tiling:
            self.vae.enable_tiling()

    def _home(self, network: Any) -> torch.device:
        """Where a network waits for its work."""
        offloaded = self.config.offload_vae if network is self.vae else self.config.offload_text_encoders
        return torch.device("cpu") if offloaded and network is not self.network else self.device

    def _trained_networks(self) -> dict[str, Any]:
        """The pipeline's name of each network that training changes -> the network."""
        trained = {self.network_name: self.network}
        if self.config.train_text_encoder:
            trained |= {name: self.encoders[name] for name in self.trained_encoders}
        return trained

    def _make_trainable(self, seed: int) -> None:
        lora = self.config.lora
        if lora is None:
            for network in self._trained_networks().values():
                network.requires_grad_(True)
            return
        targets: dict[str, tuple[str, ...]] = dict.fromkeys(self._trained_networks(), TEXT_ENCODER_TARGETS)
        targets[self.network_name] = tuple(lora.target_modules or self.lora_targets)
        self._adapters.add(lora, targets, seed)

    def keep_reference(self) -> None:
        """Freeze the present weights as the reference. LoRA needs no copy: its reference is "adapter off"."""
        if self.config.lora is None and self._frozen_copies is None:
            trained = (
                self._trained_networks() if self.trains_text_encoder else {self.network_name: self.network}
            )
            frozen = {name: copy.deepcopy(part).requires_grad_(False) for name, part in trained.items()}
            network = frozen.pop(self.network_name)
            self._frozen_copies = (network, {**self.encoders, **frozen})

    def prepare_training(self, *, gradient_checkpointing: bool, compile: bool) -> None:
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        if compile and getattr(self.network, "_repeated_blocks", None):
            self.network.compile_repeated_blocks(dynamic=False)
        elif compile:
            self.network.compile(dynamic=False)

    # Training

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self.config.lora is not None:
            trained = (
                self._trained_networks() if self.trains_text_encoder else {self.network_name: self.network}
            )
            with self._adapters.reference(trained):
                yield
            return
        if self._frozen_copies is None:
            raise RuntimeError("full fine-tuning needs keep_reference() before the first update")
        current = (self.network, self.encoders)
        self.network, self.encoders = self._frozen_copies
        try:
            yield
        finally:
            self.network, self.encoders = current

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{prefix}.{name}": parameter
            for prefix, network in self.networks().items()
            if network is not self.vae
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        }

    def _tokenizer(self, encoder: str) -> Any:
        return getattr(self.pipeline, encoder.replace("text_encoder", "tokenizer"))

    def networks(self) -> dict[str, nn.Module]:
        """The pipeline's name -> each network with weights: what a full export writes."""
        return {self.network_name: self.network, **self.encoders, "vae": self.vae}

    # Saving

    def fingerprint(self) -> str:
        settings = {name: repr(value) for name, value in self._schedule_settings().items() if name[0] != "_"}
        vocabularies = [self._tokenizer(name).get_vocab() for name in self.encoders]
        scales = [scales] if (scales := self._adapters.scales()) else []
        return fingerprint(self.networks(), [*vocabularies, settings, as_resolution(self.size), *scales])

    def export(self, folder: Path) -> None:
        if self.config.lora is not None:
            self._adapters.export(folder, self.pipeline, self._trained_networks())
        else:
            self.pipeline.save_pretrained(folder, safe_serialization=True)
