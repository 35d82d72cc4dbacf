"""Pictures sampled for the prompts of an iteration, and their rewards, for methods that keep no trajectory.

A picture is a function of the policy, its prompt and its seed; its seed of (run's seed, iteration, place in the
iteration). So neither the number of processes nor the batch size changes what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.algorithms.base import Algorithm, Context
from diffalign.algorithms.sample_metrics import GroupDiversity, distance_in_groups, reward_metrics
from diffalign.algorithms.scored_batches import ScoredBatches, named_scores, scores_of
from diffalign.config import SamplerConfig
from diffalign.data.prompts import PromptSource
from diffalign.errors import NumericsError
from diffalign.models.base import Denoiser
from diffalign.rewards import RewardMixture
from diffalign.seeding import derive_seed
from diffalign.trajectory import rollout


@dataclass(frozen=True)
class Drawn:
    """The pictures of one iteration: P prompts of G pictures each, B = P G / processes of them on this process.

    Args:
        latents: [B, C, H, W] float32 on the denoiser's device, of this process; whole groups follow each other.
        prompts, seeds: B each.
        rows: [B] int64 on the CPU, the place of each picture in the whole iteration: prompt * G + member.
        rewards: [P, G] float32, of all processes.
        components: the scores [P, G] by label that `rewards` was made from, of all processes.
    """

    latents: Tensor
    prompts: list[str]
    seeds: list[int]
    rows: Tensor
    rewards: Tensor
    components: dict[str, Tensor]

    def mine(self, values: Tensor) -> Tensor:
        """Of values [P, G] for all pictures, those [B] of this process."""
        return values.flatten()[self.rows.to(values.device)]


class Drawing:
    """Samples and scores; see the module. Every process samples all pictures of its share of the prompts.

    Args:
        prompts: what an iteration's prompts are drawn from.
        reward: scored in a thread while the next batch is sampled.
        denoiser: the policy, as it is when `draw` is called.
        prompts_per_iteration: over all processes; group_size: pictures per prompt.
        batch_size: pictures per denoiser call; changes memory and speed only.

    Raises:
        ConfigError: the prompts cannot be shared evenly by the processes.
    """

    keeps_trajectories: ClassVar[bool] = False
    """What `_sample_batch` gives is of whole trajectories; see `ScoredBatches`."""

    def __init__(
        self,
        prompts: PromptSource,
        reward: RewardMixture,
        denoiser: Denoiser,
        sampler: SamplerConfig,
        context: Context,
        *,
        prompts_per_iteration: int,
        group_size: int,
        batch_size: int,
    ) -> None:
        self.prompts, self.reward, self.denoiser, self.context = prompts, reward, denoiser, context
        self.sampler = denoiser.make_sampler(sampler)
        self.prompts_per_iteration, self.group_size = prompts_per_iteration, group_size
        self._batches = ScoredBatches(
            reward, denoiser, context, size=batch_size, trajectories=self.keeps_trajectories
        )
        self._sampled: dict[str, Tensor] = {}  # of the whole draw
        self._drawn: Drawn | None = None
        self._distance: float | None = None  # inside the groups of `_drawn`
        self.diversity = GroupDiversity()
        self._iteration = -1  # of `_drawn` and `_batches`
        self._resumed = False
        context.share(prompts_per_iteration)

    def draw(self, iteration: int) -> Drawn:
        """The pictures of an iteration, sampled now; after `take_up`, what is missing of them.

        Raises:
            NumericsError: a reward that is not finite, with prompts and seeds as evidence.
        """
        resumed, self._resumed = self._resumed and self._iteration == iteration, False
        if resumed and self._drawn is not None:
            return self._drawn
        if not resumed:
            self._batches.clear()
        self._drawn, self._iteration = None, iteration
        prompts, seeds, _ = self._my_share(iteration)
        self._sampled, mine = self._batches.sample(
            prompts, seeds, lambda rows: self._sample_batch(prompts[rows], seeds[rows])
        )
        components = {label: self._gather(scores) for label, scores in mine.items()}
        drawn = self._whole(iteration, components)
        if self.group_size > 1:
            distances = distance_in_groups(drawn.latents, self.group_size)
            self._distance = float(self.context.gather(distances).mean())
            self.diversity.start(self._distance)
        self._drawn = drawn
        self._batches.clear()
        self.context.meter.count("sampled_pictures", drawn.rewards.numel())
        self.context.meter.count("reward_queries", drawn.rewards.numel() * len(components))
        return drawn

    def metrics(self) -> dict[str, float]:
        """Of the last draw; see `reward_metrics` and `GroupDiversity`."""
        if self._drawn is None:
            return {}
        components = {label: scores.flatten() for label, scores in self._drawn.components.items()}
        figures = reward_metrics(self._drawn.rewards.flatten(), components, self.group_size)
        return figures | self.diversity.metrics(self._distance)

    # Inside an iteration, for `KeepsWork`

    def unfinished(self, iteration: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What is drawn of `iteration`, whole or in part, as tensors and JSON-safe state; None: nothing yet."""
        if self._iteration != iteration:
            return None
        if self._drawn is not None:
            tensors = {**self._sampled, **named_scores(self._drawn.components)}
            return tensors, {"iteration": iteration, "batches": None, "distance": self._distance}
        tensors = self._batches.tensors()
        return (tensors, {"iteration": iteration, "batches": len(self._batches)}) if tensors else None

    def take_up(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from what `unfinished` gave: the next `draw` is of the same iteration and draws nothing twice."""
        tensors = {name: tensor.to(self.denoiser.device) for name, tensor in tensors.items()}
        self._iteration, self._drawn, self._resumed = state["iteration"], None, True
        self._batches.clear()
        if state["batches"] is not None:
            self._batches.take_up(tensors, state["batches"])
            return
        components = scores_of(tensors)
        named = named_scores(components)
        self._sampled = {name: tensor for name, tensor in tensors.items() if name not in named}
        self._drawn, self._distance = self._whole(self._iteration, components), state["distance"]
        if self._distance is not None:
            self.diversity.start(self._distance)

    # Sampling

    def _my_share(self, iteration: int) -> tuple[list[str], list[int], Tensor]:
        """This process's prompts, each `group_size` times, their seeds, and their places in the iteration."""
        context, group = self.context, self.group_size
        drawn = self.prompts.draw(iteration, self.prompts_per_iteration)
        mine = range(context.rank, len(drawn), context.world)
        rows = [row * group + member for row in mine for member in range(group)]
        seeds = [derive_seed(context.seed, "rollout", iteration, row) for row in rows]
        return [drawn[row // group] for row in rows], seeds, torch.tensor(rows)

    def _sample_batch(self, prompts: list[str], seeds: list[int]) -> dict[str, Tensor]:
        conditioning = self.denoiser.encode_prompts(prompts)
        *_, last = self.context.watched(rollout(self.denoiser, conditioning, self.sampler, seeds))
        return {"latents": last.x_prev}

    def _gather(self, scores: Tensor) -> Tensor:
        """Scores [P, G] of all pictures in the order of the prompts drawn, whoever sampled them."""
        world, group = self.context.world, self.group_size
        return self.context.gather(scores).view(world, -1, group).transpose(0, 1).reshape(-1, group)

    def _whole(self, iteration: int, components: dict[str, Tensor]) -> Drawn:
        """What `draw` returns, from what this process sampled and the components [P, G] of all."""
        prompts, seeds, rows = self._my_share(iteration)
        latents = self._batches.final(self._sampled)
        rewards = self.reward.combine(components).float()  # of all: standard scores need every picture
        drawn = Drawn(latents, prompts, seeds, rows, rewards, components)
        bad = ~rewards.isfinite()
        if bad.any():
            mine = drawn.mine(bad).nonzero().flatten().tolist()
            error = NumericsError(
                f"{int(bad.sum())} of {bad.numel()} rewards are not finite",
                where=f"iteration {iteration}" + (f", prompt {prompts[mine[0]]!r}" if mine else ""),
                hint="scores must be finite, and not so large that their weighted sum overflows float32",
            )
            error.evidence = {"prompts": [prompts[i] for i in mine], "seeds": [seeds[i] for i in mine]}
            raise error
        return drawn


class LearnsFromDrawing(Algorithm):
    """An algorithm whose iteration begins with a draw; the loop's other questions are the drawing's to answer."""

    drawing: Drawing

    def metrics(self) -> dict[str, float]:
        return self.drawing.metrics()

    def state_dict(self) -> dict[str, Any]:
        return self.drawing.diversity.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawing.diversity.load_state_dict(state)

    def unfinished(self, iteration: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.drawing.unfinished(iteration)

    def take_up(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.drawing.take_up(tensors, state)
