"""The training loop. It knows batches, losses and an optimizer, and no algorithm.

Iteration n is a function of (weights, optimizer state, seed, n). What it needs to continue is in `Trainer.snapshot`,
and inside an iteration in `Trainer.part` of each process. It can be told to stop between any two batches.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffalign.algorithms.base import Algorithm, KeepsTensors, KeepsWork, Meter
from diffalign.config import TrainingConfig
from diffalign.errors import NumericsError
from diffalign.losses.base import LossOutput
from diffalign.training.checkpoint import Snapshot
from diffalign.training.optimizer import make_optimizer
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


@dataclass
class Position:
    """How far the iteration under way is, on this process: JSON-safe.

    `updates` are done (or left out), and `batches` of the next; `sums` and `partial` are what they measured.
    """

    updates: int = 0
    batches: int = 0
    sums: Metrics = field(default_factory=dict)
    partial: Metrics = field(default_factory=dict)
    skipped: int = 0


class Trainer:
    """An optimizer over `parameters`, with precision, averaging and everything that a resume needs.

    Args:
        on_fault: told of numbers that are not finite, with the batches of the update, before anything else happens.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        parameters: Mapping[str, nn.Parameter],
        config: TrainingConfig,
        processes: Processes,
        meter: Meter,
        on_fault: Callable[[NumericsError, int, Sequence[Any]], None] = lambda *_: None,
    ) -> None:
        self.algorithm, self.parameters, self.config = algorithm, dict(parameters), config
        self.processes, self.meter, self._on_fault = processes, meter, on_fault
        self.iteration, self.at, self.left_out = 0, Position(), 0
        self.ended = False  # by `end`, before the last iteration
        self.optimizer = make_optimizer(list(self.parameters.values()), config, processes.device)
        self.step = GradientStep(self.optimizer, self.parameters, config, processes.device)
        self.ema = None
        if config.ema_decay is not None:
            self.ema = EMAModel(list(self.parameters.values()), decay=config.ema_decay)

    def run(self, on_iteration: Callable[[int, Metrics], None]) -> None:
        """Train until `config.iterations`; `on_iteration(iterations done, metrics)` after each."""
        while self.iteration < self.config.iterations and not self.ended:
            self.processes.poll()
            metrics = self._run_iteration(self.iteration)
            metrics |= self.algorithm.validate(self.iteration + 1)
            metrics = self._over_processes(metrics)
            self.iteration, self.at = self.iteration + 1, Position()
            on_iteration(self.iteration, metrics)

    def end(self) -> None:
        """Make the iteration under way the last."""
        self.ended = True

    def _run_iteration(self, iteration: int) -> Metrics:
        factor = learning_rate_factor(self.config, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        done = self.at.updates
        for update in self._updates(iteration):
            if done:  # before the run was stopped
                done -= 1
                continue
            with self.meter.phase("training"):
                self._update(update, iteration)
        counted = max(1, self.at.updates - self.at.skipped)
        means = {f"train/{name}": value / counted for name, value in self.at.sums.items()}
        means["train/learning_rate"] = self.config.learning_rate * factor
        return means | self.algorithm.metrics()

    def _over_processes(self, metrics: Metrics) -> Metrics:
        """The mean of each figure over the processes that have it.

        It is a meeting, so that no process is an iteration ahead where they are told to stop.
        """
        parts: list[Metrics] = [json.loads(part) for part in self.processes.meet(json.dumps(metrics))]
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: fmean(part[name] for part in parts if name in part) for name in names}

    def _updates(self, iteration: int) -> Iterator[Sequence[Any]]:
        """The algorithm's; none any more after samples that cannot be learned from."""
        updates = self.algorithm.updates(iteration)
        while True:
            try:
                update = next(updates, None)
            except NumericsError as error:
                self._leave_out(error, iteration, ())
                return
            if update is None:
                return
            yield update

    def _update(self, update: Sequence[Any], iteration: int) -> None:
        at = self.at
        try:
            for batch in update[at.batches :]:
                self.processes.poll()
                out = self.algorithm.loss(batch)
                require_finite(out, iteration, self.config.mixed_precision)
                self.step.scale(out.loss * batch.weight).backward()
                for name, value in {"loss": out.loss.detach(), **out.metrics}.items():
                    at.partial[name] = at.partial.get(name, 0.0) + float(value) * batch.weight
                at.batches += 1
            if self.processes.world > 1:
                self.step.require_finite(iteration)
            self.processes.average_gradients(self.parameters.values())
            grad_norm = self.step.apply(iteration)
        except NumericsError as error:
            self._leave_out(error, iteration, update)
            at.skipped += 1
        else:
            if grad_norm is None:
                self.meter.count("skipped_steps", 1)
            else:
                at.partial["grad_norm"] = grad_norm
                if self.ema is not None:
                    self.ema.step(list(self.parameters.values()))
                self.meter.count("optimizer_steps", 1)
            for name, number in at.partial.items():
                at.sums[name] = at.sums.get(name, 0.0) + number
        at.updates, at.batches, at.partial = at.updates + 1, 0, {}

    def _leave_out(self, error: NumericsError, iteration: int, update: Sequence[Any]) -> None:
        """Go on without this update, as all processes do; or raise, when there were too many."""
        if not getattr(error, "shared", False):
            self._on_fault(error, iteration, update)
        ends = self.left_out >= self.config.skip_bad_updates
        ending = self.processes.settle(error, ends=ends)
        if ends or not isinstance(ending, NumericsError):
            raise ending
        self.left_out += 1
        self.step.discard()
        self.meter.count("bad_updates", 1)

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
        """What all processes share."""
        names = list(self.parameters)
        moments: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moment = torch.as_tensor(value)
                own = moment.shape == parameter.shape  # and not a table that parameters share
                moments[f"{name}::{key}"] = moment if own else moment.clone()
        groups = {"trainable": {name: p.data for name, p in self.parameters.items()}, "optimizer": moments}
        if self.ema is not None:
            groups["ema"] = dict(zip(names, self.ema.shadow_params, strict=True))
        if isinstance(self.algorithm, KeepsTensors):
            groups["algorithm"] = self.algorithm.tensors()
        state = {
            "iteration": self.iteration,
            "processes": self.processes.world,
            "left_out": self.left_out,
            "ema_steps": self.ema.optimization_step if self.ema is not None else 0,
            "step": self.step.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "meter": self.meter.state_dict(),
        }
        return Snapshot(groups, state)

    @property
    def is_inside(self) -> bool:
        """Whether this process has done some of the iteration under way."""
        return self.at != Position() or self._work() is not None

    def _work(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.algorithm.unfinished(self.iteration) if isinstance(self.algorithm, KeepsWork) else None

    def part(self) -> Snapshot:
        """What this process has done of the iteration under way."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        tensors, state = self._work() or ({}, None)
        return Snapshot(
            {"gradients": gradients, "work": tensors}, {"at": asdict(self.at), "algorithm": state}
        )

    def take_weights(self, snapshot: Snapshot) -> None:
        """The weights of a snapshot, and their average, and nothing else of it. Raises KeyError or ValueError."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(_like(parameter, snapshot.tensors["trainable"][name]))
        if self.ema is not None:
            self.ema.shadow_params = [
                _like(p, snapshot.tensors["ema"][name]) for name, p in self.parameters.items()
            ]

    def restore(self, snapshot: Snapshot, part: Snapshot | None = None) -> None:
        """Continue as if never interrupted. Raises KeyError or ValueError if the snapshot is of other parameters."""
        names = list(self.parameters)
        self.take_weights(snapshot)
        moments: defaultdict[int, dict[str, Tensor | int]] = defaultdict(dict)
        for key, value in snapshot.tensors["optimizer"].items():
            name, moment = key.split("::")
            moments[names.index(name)][moment] = _as_it_was(self.parameters[name], value)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": dict(moments)})
        if self.ema is not None:
            self.ema.optimization_step = snapshot.state["ema_steps"]
        self.iteration, self.left_out = snapshot.state["iteration"], snapshot.state["left_out"]
        self.step.load_state_dict(snapshot.state["step"])
        self.algorithm.load_state_dict(snapshot.state["algorithm"])
        if isinstance(self.algorithm, KeepsTensors):
            self.algorithm.load_tensors(snapshot.tensors["algorithm"])
        self.meter.load_state_dict(snapshot.state["meter"])
        if part is not None:
            self.at = Position(**part.state["at"])
            for name, gradient in part.tensors["gradients"].items():
                self.parameters[name].grad = _like(self.parameters[name], gradient)
            if part.state["algorithm"] is not None and isinstance(self.algorithm, KeepsWork):
                self.algorithm.take_up(part.tensors["work"], part.state["algorithm"])


def _as_it_was(parameter: nn.Parameter, value: Tensor) -> Tensor | int:
    """Part of an optimizer's state: one number for each of the parameter's, a table, or a count."""
    if value.shape == parameter.shape:
        return _like(parameter, value)
    return int(value) if value.ndim == 0 and not value.is_floating_point() else value


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """`value` where and as `parameter` is in memory: sums over other layouts round differently."""
    if value.shape != parameter.shape:
        raise ValueError(f"stored shape {list(value.shape)}, expected {list(parameter.shape)}")
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


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
