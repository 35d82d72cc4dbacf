"""Preferences between whole denoising trajectories of a prompt: D3PO, dense-reward DPO and PRDP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.algorithms.base import Context
from diffalign.algorithms.comparing import compare, prompts_per_update
from diffalign.algorithms.drawing import LearnsFromDrawing
from diffalign.algorithms.trajectory_drawing import TrajectoryDrawing
from diffalign.config import SamplerConfig
from diffalign.config.trajectory_preference import D3POConfig, D3PORun, PRDPConfig, PRDPRun
from diffalign.data.prompts import PromptSource, load_prompts
from diffalign.errors import ConfigError, NumericsError
from diffalign.losses.base import LossOutput
from diffalign.losses.trajectory_preference import (
    reward_difference,
    step_preference,
    trajectory_preference,
)
from diffalign.models.base import Conditioning, Denoiser
from diffalign.rewards import RewardMixture
from diffalign.trajectory import Trajectory
from diffalign.transitions import Sampler


@dataclass(frozen=True)
class PathBatch:
    """K (sample, step) pairs of this process: indices [K] of samples, steps, and columns among the trained steps.

    `number`: which update of the iteration it is part of.
    """

    samples: Tensor
    steps: Tensor
    columns: Tensor
    prompts: list[str]
    seeds: list[int]
    number: int
    weight: float


@dataclass(frozen=True)
class _Compared:
    """An iteration on this process: B = p G samples, of which `used` [U] are in a pair; their rewards [p, G].

    old, reference: log-probabilities [B, S] of the S trained steps, under the policy that sampled and, where used,
    under the frozen one.
    """

    trajectory: Trajectory
    prompts: list[str]
    seeds: list[int]
    conditioning: Conditioning
    rewards: Tensor
    used: Tensor
    old: Tensor
    reference: Tensor


@dataclass(frozen=True)
class _Weighed:
    """The loss of an update and its derivative by the log-ratio of each of its samples at each step, [b, S]."""

    number: int
    out: LossOutput
    slopes: Tensor


class TrajectoryPreference(LearnsFromDrawing):
    """Makes the trajectories of better pictures more probable than those of worse ones of the same prompt.

    A loss on whole trajectories needs all their steps at once, and memory has room for a few. It depends on them
    through one number each, their log-ratio; so its derivative by these is worked out first, without gradients, and
    batches of any size then carry it on to the weights: exact, for one more pass per update after the first.
    """

    uses_reference = True

    def __init__(
        self,
        config: D3POConfig | PRDPConfig,
        sampler: SamplerConfig,
        denoiser: Denoiser,
        prompts: PromptSource,
        reward: RewardMixture,
        context: Context,
    ) -> None:
        self.config, self.denoiser, self.context = config, denoiser, context
        self._prompts_per_update = prompts_per_update(config, context)
        self.drawing: TrajectoryDrawing = TrajectoryDrawing(
            config, sampler, denoiser, prompts, reward, context
        )
        self.steps = trained_steps(self.drawing.sampler, config.timestep_range)
        self._compared: _Compared | None = None
        self._weighed: _Weighed | None = None
        self._reference: Tensor | None = None  # of the iteration under way, once it is known
        self._reference_taken_up: Tensor | None = None

    # Sampling

    def updates(self, iteration: int) -> Iterator[list[PathBatch]]:
        reference, self._reference_taken_up = self._reference_taken_up, None
        self._reference, self._compared, self._weighed = None, None, None
        drawn = self.drawing.draw(iteration)
        trajectory = self.drawing.trajectory
        with torch.no_grad():
            conditioning = self.denoiser.encode_prompts(drawn.prompts)
        rewards = drawn.rewards[self.context.rank :: self.context.world]
        pairs = compare(rewards, self.config.pairs)
        compared = _Compared(
            trajectory,
            drawn.prompts,
            drawn.seeds,
            conditioning,
            rewards,
            torch.cat([pairs.better, pairs.worse]).unique().cpu(),
            trajectory.log_probs[self.steps].T,
            torch.empty(0),
        )
        if reference is None:
            with self.context.meter.phase("reference"), self.denoiser.reference():
                reference = self._replayed(compared, compared.used, compared.old)
        self._reference = reference
        self._compared = replace(compared, reference=reference)
        for number in range(self.config.inner_epochs * self.config.updates_per_epoch):
            yield self._batches(self._compared, number)

    def _samples(self, number: int) -> range:
        """The samples of this process that update `number` compares."""
        place = number % self.config.updates_per_epoch
        size = self._prompts_per_update * self.config.group_size
        return range(place * size, (place + 1) * size)

    def _used(self, compared: _Compared, number: int) -> Tensor:
        """Those of them that are in a pair."""
        samples = self._samples(number)
        return compared.used[(compared.used >= samples.start) & (compared.used < samples.stop)]

    def _batches(self, compared: _Compared, number: int) -> list[PathBatch]:
        used = self._used(compared, number)
        items = torch.cartesian_prod(used, torch.arange(len(self.steps))).view(-1, 2)
        return [
            PathBatch(
                rows, self.steps[columns], columns,
                [compared.prompts[i] for i in rows.tolist()],
                [compared.seeds[i] for i in rows.tolist()],
                number, len(rows) / len(items),
            )
            for rows, columns in (part.T for part in items.split(self.config.train_batch_size))
        ]  # fmt: skip

    # Learning

    def _log_probs(self, compared: _Compared, samples: Tensor, steps: Tensor) -> Tensor:
        """Of K stored steps under the present policy, [K], averaged over latent elements."""
        if self.denoiser.trains_text_encoder:
            conditioning = self.denoiser.encode_prompts([compared.prompts[i] for i in samples.tolist()])
        else:
            conditioning = compared.conditioning[samples.to(self.denoiser.device)]
        trajectory = compared.trajectory
        gaussian = trajectory.replay(self.denoiser, conditioning, samples, steps)
        device = trajectory.latents.device
        return gaussian.log_prob(trajectory.latents[steps.to(device) + 1, samples.to(device)])

    @torch.no_grad()
    def _replayed(self, compared: _Compared, samples: Tensor, known: Tensor) -> Tensor:
        """`known` [B, S], with the rows `samples` under the present policy."""
        items = torch.cartesian_prod(samples, torch.arange(len(self.steps))).view(-1, 2)
        found = [
            self._log_probs(compared, part[:, 0], self.steps[part[:, 1]])
            for part in self.context.watched(items.split(self.config.train_batch_size))
        ]
        whole = known.clone()
        whole[samples.to(whole.device)] = torch.cat(found).view(len(samples), -1)
        return whole

    def _weigh(self, number: int) -> _Weighed:
        """Before the first update the policy is the one that sampled, so its log-probabilities are known."""
        compared, samples = self._compared, self._samples(number)
        assert compared is not None
        rows = slice(samples.start, samples.stop)
        old, reference = compared.old[rows], compared.reference[rows]
        now = compared.old
        if number:
            now = self._replayed(compared, self._used(compared, number), now)
        log_ratio = (now[rows] - reference).detach().requires_grad_()
        prompts = slice(samples.start // self.config.group_size, samples.stop // self.config.group_size)
        with torch.enable_grad():
            out = compared_loss(self.config, log_ratio, old - reference, compared.rewards[prompts])
            (slopes,) = torch.autograd.grad(out.loss, log_ratio)
        return _Weighed(number, LossOutput(out.loss.detach(), out.metrics), slopes)

    def loss(self, batch: PathBatch) -> LossOutput:
        """The loss of the whole update; the gradients of all its batches together are its gradient."""
        compared = self._compared
        assert compared is not None
        self.context.meter.count("training_pictures", len(batch.samples) * self.context.world)
        if self._weighed is None or self._weighed.number != batch.number:
            self._weighed = self._weigh(batch.number)
        log_prob = self._log_probs(compared, batch.samples, batch.steps)
        device = log_prob.device
        samples, columns = batch.samples.to(device), batch.columns.to(device)
        if batch.number == 0:
            self._require_ratio_one(log_prob.detach() - compared.old[samples, columns], batch)
        slopes = self._weighed.slopes[samples - self._samples(batch.number).start, columns]
        pull = (slopes * (log_prob - log_prob.detach())).sum() / batch.weight
        return LossOutput(self._weighed.out.loss + pull, self._weighed.out.metrics)

    def _require_ratio_one(self, log_ratio: Tensor, batch: PathBatch) -> None:
        """Before the first update of an iteration, replaying must give what sampling gave."""
        config = self.config
        name = "ratio_clip" if isinstance(config, D3POConfig) else "clip_range"
        allowed = getattr(config, name) / 10
        off = (log_ratio.exp() - 1).abs().nan_to_num(nan=torch.inf)
        if float(off.max()) <= allowed:
            return
        step = int(batch.steps[int(off.argmax())])
        raise NumericsError(
            f"before any update, the importance ratio is off by {float(off.max()):.2g} "
            f"at timestep {self.drawing.sampler.timesteps[step].item():g}",
            where=f"step {step} of {len(self.drawing.sampler)}, allowed: a tenth of {name} = {allowed:.2g}",
            why="replaying the stored steps does not give the log-probabilities that sampling gave",
            hint="use mixed_precision no or bf16, turn compile off, or set equal algorithm.sample_batch_size "
            "and train_batch_size",
        )

    # The loop's other questions

    def unfinished(self, iteration: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        found = super().unfinished(iteration)
        if found is None or self._reference is None:
            return found
        return {**found[0], "reference": self._reference}, found[1]

    def take_up(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        super().take_up(tensors, state)
        reference = tensors.get("reference")
        self._reference_taken_up = None if reference is None else reference.to(self.denoiser.device)


def compared_loss(
    config: D3POConfig | PRDPConfig, log_ratio: Tensor, old: Tensor, rewards: Tensor
) -> LossOutput:
    """The loss of p prompts x G samples: log_ratio, old [p G, S], of the present and of the sampling policy; rewards
    [p, G]."""
    pairs = compare(rewards, config.pairs)
    better, worse = pairs.better, pairs.worse
    if isinstance(config, PRDPConfig):
        return reward_difference(
            log_ratio[better], log_ratio[worse], old[better], old[worse], pairs.gap,
            beta=config.beta, clip_range=config.clip_range,
        )  # fmt: skip
    loss = step_preference if config.compare == "step" else trajectory_preference
    probability = pairs.probability(config.label_temperature)
    return loss(
        log_ratio[better],
        log_ratio[worse],
        beta=config.beta,
        ratio_clip=config.ratio_clip,
        discount=config.discount,
        probability=probability,
        tied=pairs.tied if probability is None else None,
    )


def trained_steps(sampler: Sampler, timestep_range: tuple[float, float]) -> Tensor:
    """Indices [S] of the steps that are trained on: stochastic, and in that part of the trajectory.

    Raises:
        ConfigError: there is none.
    """
    first, last = (share * len(sampler) for share in timestep_range)
    steps = [index for index in sampler.stochastic_steps() if first <= index + 0.5 < last]
    if not steps:
        raise ConfigError(
            f"algorithm.timestep_range: no stochastic step of {len(sampler)} lies in {list(timestep_range)}",
            why="step i of n lies at (i + 0.5) / n; steps without noise cannot be trained on",
            hint="widen the range, or raise sampler.steps",
        )
    return torch.tensor(steps)


def open_data(config: D3PORun | PRDPRun, reward: RewardMixture | None) -> PromptSource:
    return PromptSource(load_prompts(config.data.path), config.seed)


def build(
    config: D3PORun | PRDPRun,
    data: PromptSource,
    denoiser: Denoiser,
    reward: RewardMixture | None,
    context: Context,
) -> TrajectoryPreference:
    assert reward is not None  # the configuration requires one
    return TrajectoryPreference(config.algorithm, config.sampler, denoiser, data, reward, context)
