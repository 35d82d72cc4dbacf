"""The training loop. It knows batches, losses and an optimizer, and no algorithm.

Iteration n is a function of (weights, optimizer state, seed, n). What it needs to continue is in `Trainer.snapshot`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffalign.algorithms.base import Algorithm, Meter
from diffalign.config import TrainingConfig
from diffalign.errors import NumericsError
from diffalign.losses.base import LossOutput
from diffalign.training.checkpoint import Snapshot
from diffalign.training.precision import GradientStep
from diffalign.training.processes import Processes

Metrics = dict[str, float]


def learning_rate_factor(config: TrainingConfig, iteration: int) -> float:
    """The share of `learning_rate` used in 0-based `iteration`: linear warm-up, then the scheduler's shape."""
    if iteration < config.warmup_iterations:
        return (iteration + 1) / config.warmup_iterations
    if config.lr_scheduler == "constant":
        return 1.0
    remaining = max(1, config.iterations - config.warmup_iterations)
    progress = min(1.0, (iteration - config.warmup_iterations) / remaining)
    if config.lr_scheduler == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


class Trainer:
    """An optimizer over `parameters`, with precision, averaging and everything that a resume needs."""

    def __init__(
        self,
        algorithm: Algorithm,
        parameters: Mapping[str, nn.Parameter],
        config: TrainingConfig,
        processes: Processes,
        meter: Meter,
    ) -> None:
        self.algorithm, self.parameters, self.config = algorithm, dict(parameters), config
        self.processes, self.meter = processes, meter
        self.iteration = 0
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.learning_rate,
            betas=config.adam_betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=processes.device.type == "cuda",
        )
        self.step = GradientStep(self.optimizer, self.parameters, config, processes.device)
        self.ema = None
        if config.ema_decay is not None:
            self.ema = EMAModel(list(self.parameters.values()), decay=config.ema_decay)

    def run(self, on_iteration: Callable[[int, Metrics], None]) -> None:
        """Train until `config.iterations`; `on_iteration(iterations done, metrics)` after each."""
        while self.iteration < self.config.iterations:
            metrics = self._run_iteration(self.iteration)
            self.iteration += 1
            metrics |= self.algorithm.validate(self.iteration)
            on_iteration(self.iteration, metrics)

    def _run_iteration(self, iteration: int) -> Metrics:
        factor = learning_rate_factor(self.config, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        sums: defaultdict[str, float] = defaultdict(float)
        updates = 0
        for update in self.algorithm.updates(iteration):
            with self.meter.phase("training"):
                for name, value in self._update(update, iteration).items():
                    sums[name] += value
            updates += 1
        means = {f"train/{name}": value / updates for name, value in sums.items()}
        means["train/learning_rate"] = self.config.learning_rate * factor
        return means | self.algorithm.metrics()

    def _update(self, update: Sequence[Any], iteration: int) -> Metrics:
        sums: defaultdict[str, float] = defaultdict(float)
        for batch in update:
            out = self.algorithm.loss(batch)
            require_finite(out, iteration, self.config.mixed_precision)
            self.step.scale(out.loss * batch.weight).backward()
            for name, value in {"loss": out.loss.detach(), **out.metrics}.items():
                sums[name] += float(value) * batch.weight
        self.processes.average_gradients(self.parameters.values())
        grad_norm = self.step.apply(iteration)
        if grad_norm is None:
            self.meter.count("skipped_steps", 1)
            return sums
        sums["grad_norm"] = grad_norm
        if self.ema is not None:
            self.ema.step(list(self.parameters.values()))
        self.meter.count("optimizer_steps", 1)
        return sums

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it, the parameters hold their moving average (or stay as they are without one)."""
        if self.ema is None:
            yield
            return
        live = list(self.parameters.values())
        self.ema.store(live)
        self.ema.copy_to(live)
        try:
            yield
        finally:
            self.ema.restore(live)

    # Everything that the next iteration depends on

    def snapshot(self) -> Snapshot:
        names = list(self.parameters)
        moments: dict[str, Tensor] = {}
        for index, values in self.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                moments[f"{names[index]}::{key}"] = torch.as_tensor(value)
        groups = {"trainable": {name: p.data for name, p in self.parameters.items()}, "optimizer": moments}
        if self.ema is not None:
            groups["ema"] = dict(zip(names, self.ema.shadow_params, strict=True))
        state = {
            "iteration": self.iteration,
            "ema_steps": self.ema.optimization_step if self.ema is not None else 0,
            "step": self.step.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "meter": self.meter.state_dict(),
        }
        return Snapshot(groups, state)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue as if never interrupted. Raises KeyError if the snapshot is of other parameters."""
        names = list(self.parameters)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(snapshot.tensors["trainable"][name])
        moments: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in snapshot.tensors["optimizer"].items():
            name, moment = key.split("::")
            moments[names.index(name)][moment] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": dict(moments)})
        if self.ema is not None:
            shadow = [snapshot.tensors["ema"][name].to(p.device) for name, p in self.parameters.items()]
            self.ema.shadow_params = shadow
            self.ema.optimization_step = snapshot.state["ema_steps"]
        self.iteration = snapshot.state["iteration"]
        self.step.load_state_dict(snapshot.state["step"])
        self.algorithm.load_state_dict(snapshot.state["algorithm"])
        self.meter.load_state_dict(snapshot.state["meter"])


def require_finite(out: LossOutput, iteration: int, precision: str) -> None:
    """Raise NumericsError, naming the first culprit, if the loss or a metric is not finite."""
    for name, value in {"loss": out.loss, **out.metrics}.items():
        if not bool(torch.isfinite(value).all()):
            raise NumericsError(
                f"{name} is {float(value.detach()):g}",
                where=f"iteration {iteration}, precision {precision}",
                hint="the weights have not changed; resume from the last checkpoint with a lower "
                "training.learning_rate, or mixed_precision bf16 or no",
            )
