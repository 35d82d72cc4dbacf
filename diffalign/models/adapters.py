"""The LoRAs of a model beside the one that is trained: merged, frozen under it, or trained on; and the reference.

What a run exports is one LoRA of the plain base model: merged, frozen and trained ones together, by the sum of their
ranks, which is exact. So plain diffusers draws the run's pictures with it, and nobody needs the files it came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from diffalign.config import LoRAConfig, ModelConfig
from diffalign.errors import ConfigError
from diffalign.models.lora import TRAINED, add_lora, lora_layers, require_matches
from diffalign.models.lora_files import read_lora
from diffalign.models.lora_updates import Updates, merge, peft_config, put_on, total, updates_of, write_lora

Networks = Mapping[str, Any]
"""The pipeline's name of each network -> it."""


class Adapters:
    """Reads `config.adapters` and adds what is to be merged; `add` puts on the networks the others and what is trained.

    Args:
        config: the run's model section.
        pipeline: with its weights as they were loaded.
        networks: those that may have adapters.
        trainable: without training, frozen and continued adapters are merged, too.

    Raises:
        CheckpointError: a file that is not there, is damaged, or is of another model.
        ConfigError: a DoRA that could not be exported together with others.
    """

    def __init__(self, config: ModelConfig, pipeline: Any, networks: Networks, *, trainable: bool) -> None:
        self._networks = networks
        self._merged: list[tuple[Mapping[str, Updates], float]] = []
        self._frozen: list[tuple[Mapping[str, Updates], float]] = []
        self._continued: Mapping[str, Updates] = {}
        self._start: dict[nn.Parameter, Tensor] = {}
        for adapter in config.adapters:
            updates = read_lora(adapter, pipeline, networks)
            if trainable and config.quantization is not None:
                _require_plain(adapter.path, updates)
            if trainable and config.lora is not None:
                _require_sum(
                    adapter.path, updates, alone=len(config.adapters) == 1 and adapter.mode == "continue"
                )
            if trainable and adapter.mode == "freeze":
                self._frozen.append((updates, adapter.weight))
            elif trainable and adapter.mode == "continue":
                self._continued = updates
            else:
                self._merged.append((updates, adapter.weight))
                for name, own in updates.items():
                    merge(networks[name], own, adapter.weight)

    def add(self, lora: LoRAConfig, targets: Mapping[str, Sequence[str]], seed: int) -> None:
        """Put the frozen adapters on the networks, and over them the one that is trained; all are float32.

        Args:
            lora: of a new adapter; one to continue is used instead, where there is one.
            targets: of each network that is trained, the patterns of its layers.
            seed: initial values of a new adapter.

        Raises:
            ConfigError: no module matches a pattern, or the adapter to continue has nothing for a trained network.
        """
        if self._continued:
            self._divide_continued(targets)
        else:
            require_matches(lora, {name: (self._networks[name], own) for name, own in targets.items()})
        for adapter, (parts, weight) in zip(self._frozen_names, self._frozen, strict=True):
            for name, updates in parts.items():
                put_on(self._networks[name], updates, adapter, weight)
        for name, patterns in targets.items():
            network = self._networks[name]
            if self._continued:
                put_on(network, self._continued[name], TRAINED)
                self._start |= {p: p.detach().clone() for p in _trained_parameters(network)}
            else:
                add_lora(network, lora, patterns, seed)
        for name, network in self._networks.items():
            _activate(network, [*self._frozen_names, *([TRAINED] if name in targets else [])])

    def _divide_continued(self, targets: Mapping[str, Sequence[str]]) -> None:
        """What the adapter to continue changes of networks that are not trained is frozen."""
        without = [name for name in targets if name not in self._continued]
        if without:
            raise ConfigError(
                f"model.adapters: the adapter to continue changes nothing of the {without[0]}",
                why=f"it changes {', '.join(self._continued)}; model.train_text_encoder trains {', '.join(targets)}",
                hint="leave model.train_text_encoder out"
                if without[0].startswith("text_encoder")
                else "use mode: freeze or merge",
            )
        rest = {name: updates for name, updates in self._continued.items() if name not in targets}
        if rest:
            self._frozen.append((rest, 1.0))

    @property
    def _frozen_names(self) -> list[str]:
        return [f"frozen_{index}" for index in range(len(self._frozen))]

    @contextmanager
    def reference(self, trained: Networks) -> Iterator[None]:
        """Within it, networks are as the run started: without the new adapter, or with the continued one as it was.

        A backward pass belongs outside.
        """
        if self._start:
            with self._at_start():
                yield
            return
        requires_grad = {p: p.requires_grad for part in trained.values() for p in _trained_parameters(part)}
        for network in trained.values():
            _activate(network, self._frozen_names)
        try:
            yield
        finally:
            for network in trained.values():
                _activate(network, [*self._frozen_names, TRAINED])
            for parameter, value in requires_grad.items():
                parameter.requires_grad_(value)

    @contextmanager
    def _at_start(self) -> Iterator[None]:
        present = {parameter: parameter.data for parameter in self._start}
        try:
            for parameter, start in self._start.items():
                parameter.data = start
            yield
        finally:
            for parameter, data in present.items():
                parameter.data = data

    def export(self, folder: Path, pipeline: Any, trained: Networks) -> None:
        """Write one LoRA of the plain base model that makes of it what the run has, for `load_lora_weights`."""
        others = [*self._merged, *self._frozen]
        names = dict.fromkeys([*trained, *(name for parts, _ in others for name in parts)])
        networks, configs = {}, {}
        for name in names:
            parts = [(updates[name], weight) for updates, weight in others if name in updates]
            if name in trained:
                parts.append((updates_of(trained[name], TRAINED), 1.0))
            networks[name] = total(parts)
            alone = name in trained and len(parts) == 1
            configs[name] = trained[name].peft_config[TRAINED] if alone else peft_config(networks[name])
        write_lora(folder, pipeline, networks, configs)

    def scales(self) -> dict[str, float]:
        """How much of each adapter is added to each layer: pictures depend on it as they do on weights."""
        return {
            f"{part}.{name}.{adapter}": scale
            for part, network in self._networks.items()
            for name, layer in network.named_modules()
            if isinstance(layer, LoraLayer)
            for adapter, scale in layer.scaling.items()
        }


def _require_sum(path: str, parts: Mapping[str, Updates], *, alone: bool) -> None:
    """Refuse a DoRA among other adapters: there would be no one LoRA of the base model to export."""
    if alone or not any(update.magnitude is not None for own in parts.values() for update in own.values()):
        return
    raise ConfigError(
        f"model.adapters: {path} is a DoRA, which cannot be under or beside another adapter",
        why="it changes the length of the weights that it finds, so that the two are not a sum",
        hint="continue it alone, or make a base model with it first (diffusers: fuse_lora, save_pretrained)",
    )


def _require_plain(path: str, parts: Mapping[str, Updates]) -> None:
    if any(update.magnitude is not None for own in parts.values() for update in own.values()):
        raise ConfigError(
            f"model.adapters: {path} is a DoRA, which needs the lengths of the base model's rows",
            why="model.quantization stores other weights",
            hint="leave model.quantization out",
        )


def _activate(network: nn.Module, adapters: list[str]) -> None:
    """Switch these adapters on and all others off; the trained one has gradients."""
    for layer in lora_layers(network):
        layer.set_adapter(adapters, inference_mode=True)
        layer.set_requires_grad(TRAINED, TRAINED in adapters)


def _trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in network.named_parameters() if f".{TRAINED}." in name]
