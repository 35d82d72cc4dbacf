"""Policy gradients on denoising trajectories: sampled, scored, and replayed under the policy that learns from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffalign import advantages as relative
from diffalign.algorithms.assignment import Assignment, assign, trainable_steps
from diffalign.algorithms.base import Algorithm, Context
from diffalign.algorithms.experience import (
    Experience,
    StepBatch,
    minibatches,
    trajectory_from,
    trajectory_tensors,
)
from diffalign.algorithms.ratio_check import check_ratio
from diffalign.algorithms.rollouts import Rollouts
from diffalign.algorithms.sample_metrics import GroupDiversity, distance_in_groups, reward_metrics
from diffalign.config import SamplerConfig
from diffalign.config.online import TrajectoryRLConfig
from diffalign.data.prompts import PromptSource
from diffalign.errors import ConfigError, NumericsError
from diffalign.losses.base import LossOutput
from diffalign.losses.policy_gradient import (
    add_divergence,
    clamped_ratio,
    ppo_clip,
    prediction_divergence,
    reinforce,
)
from diffalign.models.base import Conditioning, Denoiser
from diffalign.rewards import RewardMixture
from diffalign.trajectory import Trajectory
from diffalign.transitions import GaussianStep


class OnlineRL(Algorithm):
    """Sample pictures, score them, raise the probability of the steps that led to the better ones."""

    def __init__(
        self,
        config: TrajectoryRLConfig,
        sampler: SamplerConfig,
        denoiser: Denoiser,
        prompts: PromptSource,
        reward: RewardMixture,
        context: Context,
    ) -> None:
        self.config, self.denoiser, self.prompts, self.reward, self.context = (
            config, denoiser, prompts, reward, context,
        )  # fmt: skip
        self.uses_reference = config.kl_weight > 0
        self.sampler = denoiser.make_sampler(sampler)
        self.trainable_steps = trainable_steps(config, self.sampler)
        self.statistics = relative.PromptStatistics(config.prompt_buffer, config.prompt_min_count)
        self.experience: Experience | None = None
        self._rollouts = Rollouts(config, self.sampler, denoiser, reward, context)
        self._iteration = -1  # of `experience`, or of the batches sampled so far
        self._taken_up = False
        self._metrics: dict[str, float] = {}
        self._diversity = GroupDiversity()
        self.ratio_error: float | None = None
        _require_even_shares(config, context)
        if config.shared_steps:
            context.say(
                f"groups share their first {config.shared_steps} of {len(self.sampler)} steps: "
                f"{self._rollouts.work_saved:.0%} less work for the denoiser while sampling"
            )

    # Sampling

    def updates(self, iteration: int) -> Iterator[list[StepBatch]]:
        if not self._taken_up:
            self._rollouts.clear()
        if not self._taken_up or self.experience is None:
            self.experience, self._iteration, self._metrics = None, iteration, {}
            self.experience = self._sample(iteration)
            if self.ratio_error is None:
                with self.context.meter.phase("ratio check"):
                    self.ratio_error = self._check_ratio(self.experience)
        self._taken_up = False
        self._rollouts.clear()
        for epoch in range(self.config.inner_epochs):
            yield from minibatches(self.experience, self.config, self.context, iteration, epoch)

    def _sample(self, iteration: int) -> Experience:
        drawn, assignment = self._assign(iteration)
        prompts, seeds = assignment.prompts, assignment.seeds
        trajectory, components = self._sample_pictures(assignment)
        components = {label: self._gather(scores) for label, scores in components.items()}
        rewards = self.reward.combine(components)  # of all processes: standard scores need every picture
        self._metrics = self._sample_metrics(rewards, components, trajectory.final)
        with torch.no_grad():
            conditioning = self.denoiser.encode_prompts(prompts)
        advantages = self._advantages(rewards, drawn, trajectory, conditioning)
        _require_finite(advantages, iteration, prompts, seeds)
        self.context.meter.count("sampled_pictures", len(prompts) * self.context.world)
        queries = len(prompts) * len(self.reward.labels)
        self.context.meter.count("reward_queries", queries * self.context.world)
        return Experience(trajectory, prompts, seeds, conditioning, assignment.steps, advantages)

    def _assign(self, iteration: int) -> tuple[list[str], Assignment]:
        """All prompts drawn for this iteration, and this process's part of them."""
        drawn = self.prompts.draw(iteration, self.config.prompts_per_iteration)
        total = len(self.sampler)
        return drawn, assign(self.config, drawn, self.trainable_steps, total, iteration, self.context)

    def _sample_pictures(self, assignment: Assignment) -> tuple[Trajectory, dict[str, Tensor]]:
        return self._rollouts.sample(assignment)

    def _gather(self, values: Tensor) -> Tensor:
        """Values [B, ...] of all pictures in the order of the prompts drawn, whoever sampled them."""
        world, group = self.context.world, self.config.group_size
        gathered = self.context.gather(values.contiguous())
        return gathered.view(world, -1, group, *values.shape[1:]).transpose(0, 1).flatten(0, 2)

    def _mine(self, values: Tensor) -> Tensor:
        """The way back from `_gather`: those of this process's pictures."""
        groups = values.reshape(-1, self.config.group_size, *values.shape[1:])
        return groups[self.context.rank :: self.context.world].flatten(0, 1)

    def _advantages(
        self, rewards: Tensor, drawn: list[str], trajectory: Trajectory, conditioning: Conditioning
    ) -> Tensor:
        """Advantages [B, N] of this process's pictures at each step, from the rewards of all."""
        all_advantages = self._over_baseline(rewards, drawn, trajectory, conditioning)
        if all_advantages.ndim == 1:
            all_advantages = all_advantages[:, None].expand(-1, len(self.sampler))
        if self.config.advantage_clip is not None:
            all_advantages = all_advantages.clamp(-self.config.advantage_clip, self.config.advantage_clip)
        return self._mine(all_advantages)

    def _over_baseline(
        self, rewards: Tensor, drawn: list[str], trajectory: Trajectory, conditioning: Conditioning
    ) -> Tensor:
        """Advantages of all pictures: [B] where they are the same at each of their steps, or [B, N]."""
        config = self.config
        if config.advantage == "prompt":
            prompts = [prompt for prompt in drawn for _ in range(config.group_size)]
            return self.statistics.update(prompts, rewards)
        if config.advantage == "batch":
            return relative.batch_advantages(rewards)
        of_groups = {
            "group": relative.group_advantages,
            "group_mean": relative.group_mean_advantages,
            "group_mean_batch_std": relative.group_mean_batch_std_advantages,
            "leave_one_out": relative.leave_one_out_advantages,
        }
        return of_groups[config.advantage](rewards, config.group_size)

    def _sample_metrics(
        self, rewards: Tensor, components: dict[str, Tensor], final: Tensor
    ) -> dict[str, float]:
        metrics = reward_metrics(rewards, components, self.config.group_size)
        if self.config.shared_steps:
            metrics["sampling/work_saved"] = self._rollouts.work_saved
        if self.config.group_size > 1:
            distance = float(self._gather(distance_in_groups(final, self.config.group_size)).mean())
            self._diversity.start(distance)
            metrics |= self._diversity.metrics(distance)
        return metrics

    # Learning

    def _predict(self, experience: Experience, samples: Tensor, steps: Tensor) -> Tensor:
        """The guided output at stored steps, of the present policy or, inside `reference()`, of the frozen one."""
        if self.denoiser.trains_text_encoder:
            conditioning = self.denoiser.encode_prompts([experience.prompts[i] for i in samples.tolist()])
        else:
            conditioning = experience.conditioning[samples.to(self.denoiser.device)]
        return experience.trajectory.predict(self.denoiser, conditioning, samples, steps)

    def _log_ratio(self, experience: Experience, samples: Tensor, steps: Tensor) -> Tensor:
        """log(present policy / sampling policy) [K]."""
        step = experience.trajectory.step(self._predict(experience, samples, steps), samples, steps)
        return experience.trajectory.log_ratio(step, samples, steps, normalized=self.config.normalize_ratio)

    def _check_ratio(self, experience: Experience) -> float:
        def log_ratio(samples: Tensor, steps: Tensor) -> Tensor:
            return self._log_ratio(experience, samples, steps)

        return check_ratio(log_ratio, experience.steps, self.sampler, self.config, self.context)

    def loss(self, batch: StepBatch) -> LossOutput:
        assert self.experience is not None
        self.context.meter.count("training_pictures", len(batch.samples) * self.context.world)
        config, trajectory, pairs = self.config, self.experience.trajectory, (batch.samples, batch.steps)
        prediction = self._predict(self.experience, *pairs)
        step = trajectory.step(prediction, *pairs)
        log_ratio = trajectory.log_ratio(step, *pairs, normalized=config.normalize_ratio)
        if config.objective == "reinforce":
            out = reinforce(log_ratio, batch.advantages)
        else:
            objective = {"ppo_clip": ppo_clip, "clamp": clamped_ratio}[config.objective]
            out = objective(log_ratio, batch.advantages, clip_range=config.clip_range)
        if not config.kl_weight:
            return out
        return add_divergence(out, self._divergence(prediction, step, *pairs), weight=config.kl_weight)

    def _divergence(self, prediction: Tensor, step: GaussianStep, samples: Tensor, steps: Tensor) -> Tensor:
        """Of the present policy from the frozen reference, which sees the same latents and guidance: [K]."""
        assert self.experience is not None
        trajectory = self.experience.trajectory
        with torch.no_grad(), self.denoiser.reference():
            reference = self._predict(self.experience, samples, steps)
        if self.config.kl_kind == "prediction":
            noise = [trajectory.noise(output, samples, steps) for output in (prediction, reference)]
            return prediction_divergence(*noise)
        return step.kl(trajectory.step(reference, samples, steps))

    # The loop's other questions

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"prompt_statistics": self.statistics.state_dict(), **self._diversity.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics.load_state_dict(state["prompt_statistics"])
        self._diversity.load_state_dict(state)

    def unfinished(self, iteration: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self._iteration != iteration:
            return None
        state = {"iteration": iteration, "metrics": self._metrics, "batches": len(self._rollouts)}
        if self.experience is not None:
            return {
                **trajectory_tensors(self.experience.trajectory),
                "advantages": self.experience.advantages,
            }, state
        tensors = self._rollouts.tensors()
        return (tensors, state) if tensors else None

    def take_up(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self._taken_up, self._iteration = True, state["iteration"]
        if "advantages" not in tensors:
            self._rollouts.take_up(tensors, state["batches"])
            return
        _, assignment = self._assign(self._iteration)
        with torch.no_grad():
            conditioning = self.denoiser.encode_prompts(assignment.prompts)
        device = self.denoiser.device
        self.experience = Experience(
            trajectory_from(self.sampler, tensors, device),
            assignment.prompts,
            assignment.seeds,
            conditioning,
            assignment.steps,
            tensors["advantages"].to(device),
        )
        self._metrics = dict(state["metrics"])


def _require_even_shares(config: TrajectoryRLConfig, context: Context) -> None:
    share = context.share(config.prompts_per_iteration) * config.group_size
    if share % config.updates_per_epoch:
        raise ConfigError(
            f"algorithm.updates_per_epoch: {config.updates_per_epoch} does not divide the {share} pictures that "
            f"each of {context.world} processes samples"
        )


def _require_finite(advantages: Tensor, iteration: int, prompts: list[str], seeds: list[int]) -> None:
    bad = (~advantages.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        error = NumericsError(
            f"{len(bad)} of {len(advantages)} advantages are not finite",
            where=f"iteration {iteration}, prompt {prompts[bad[0]]!r}",
            hint="rewards must be finite, and not so large that their variance overflows float32",
        )
        error.evidence = {"prompts": [prompts[i] for i in bad], "seeds": [seeds[i] for i in bad]}
        raise error
