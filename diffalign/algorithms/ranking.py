"""Preference optimisation on ranked lists of pictures: RankDPO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.algorithms.base import Algorithm, Context
from diffalign.algorithms.latents import Latents, draw_noise
from diffalign.algorithms.ranked_lists import SampledLatents, Scores, sample_lists, score_lists
from diffalign.config import RankDPOConfig, RankDPORun
from diffalign.data.order import batch_indices, batch_positions, first_seen
from diffalign.data.ranked import PromptsToRank, RankedLists, names_prompts
from diffalign.errors import DataError
from diffalign.losses.base import LossOutput
from diffalign.losses.denoising import squared_error
from diffalign.losses.ranking import rank_dpo, win_rates
from diffalign.models.base import Denoiser
from diffalign.rewards import RewardMixture

RELEVANCES = (-10.0, 10.0)
"""Scores that may weigh as they are: the gain is 2^score, and one list must not outweigh a thousand others."""


@dataclass(frozen=True)
class ListBatch:
    """x0, noise [N, C, H, W], t and relevance [N], lists [N] int64 and N prompts: the N pictures of B lists.

    The pictures of a list share noise and timestep. `positions`: B places in the run, which seed each draw.
    `new_lists`: how many lists of the whole batch, over all processes, training sees for the first time.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    relevance: Tensor
    lists: Tensor
    prompts: list[str]
    positions: list[int]
    new_lists: int
    weight: float


class RankDPO(Algorithm):
    """RankDPO on lists of pictures; policy and reference see the same latents, noise and timesteps.

    Args:
        prompts, scores: of each list; those whose pictures all score alike are left out.
        latents: of the lists' pictures.

    Raises:
        DataError: scores that cannot weigh as they are, or that are all equal in every list.
    """

    uses_reference = True

    def __init__(
        self,
        config: RankDPOConfig,
        denoiser: Denoiser,
        prompts: Sequence[str],
        latents: Latents | SampledLatents,
        scores: Scores,
        context: Context,
    ) -> None:
        self.config, self.denoiser, self.prompts, self.context = config, denoiser, prompts, context
        self._latents = latents
        self._relevance = [_relevance(config, values) for values in scores]
        self._kept = [row for row, values in enumerate(scores) if len(set(values)) > 1]
        if not self._kept:
            raise DataError(
                "the rewards score all pictures of every list alike",
                why=f"none of the {len(scores)} lists can be ranked",
                hint="use another reward, or give the file a column scores",
            )
        if len(self._kept) < len(scores):
            left_out = len(scores) - len(self._kept)
            context.say(f"{left_out:,} of {len(scores):,} lists left out: all of their pictures score alike")

    def updates(self, iteration: int) -> Iterator[list[ListBatch]]:
        accumulation = self.config.gradient_accumulation
        yield [self._batch(iteration * accumulation + i) for i in range(accumulation)]

    def _batch(self, step: int) -> ListBatch:
        context, size, device = self.context, self.config.batch_size, self.denoiser.device
        walk = batch_indices(len(self._kept), size, step, context.seed, context.rank, context.world)
        indices = [self._kept[place] for place in walk]
        positions = batch_positions(size, step, context.rank, context.world)
        latents = self._latents.take(indices)
        lists = torch.arange(size).repeat_interleave(torch.tensor([len(x0) for x0 in latents])).to(device)
        noise, t = draw_noise(self.denoiser, context.seed, "rankdpo", positions)
        used = [self._latents.index(index) for index in indices]
        relevance = torch.cat([self._relevance[index] for index in used]).to(device)
        prompts = [self.prompts[used[number]] for number in lists.tolist()]
        new = first_seen(len(self._kept), size * context.world, step)
        weight = 1 / self.config.gradient_accumulation
        return ListBatch(
            torch.cat(latents), noise[lists], t[lists], relevance, lists, prompts, positions, new, weight
        )

    def _errors(self, batch: ListBatch) -> Tensor:
        schedule = self.denoiser.schedule
        x = schedule.add_noise(batch.x0, batch.noise, batch.t)
        prediction = self.denoiser.predict(x, batch.t, self.denoiser.encode_prompts(batch.prompts))
        return squared_error(prediction, schedule.target(batch.x0, batch.noise, batch.t))

    def loss(self, batch: ListBatch) -> LossOutput:
        self.context.meter.count("training_pictures", len(batch.prompts) * self.context.world)
        self.context.meter.count("preference_labels", batch.new_lists)
        with torch.no_grad(), self.denoiser.reference():
            ref = self._errors(batch)
        return rank_dpo(self._errors(batch), ref, batch.relevance, batch.lists, beta=self.config.beta)


def _relevance(config: RankDPOConfig, scores: list[float]) -> Tensor:
    values = torch.tensor(scores)
    if config.relevance == "wins":
        return win_rates(values)
    low, high = RELEVANCES
    if not low <= min(scores) <= max(scores) <= high:
        raise DataError(
            "scores that cannot weigh as they are",
            where=f"algorithm.relevance: scores, a list with scores from {min(scores):g} to {max(scores):g}",
            why=f"a picture weighs as 2^score, which is meant for grades and probabilities ({low:g} to {high:g})",
            hint="set algorithm.relevance to wins, which takes scores of any unit, or rescale them",
        )
    return values


def open_data(config: RankDPORun, reward: RewardMixture | None) -> RankedLists | PromptsToRank:
    path = config.data.path
    data = PromptsToRank(path) if names_prompts(path) else RankedLists(config.data)
    if data.scores is None and not any(spec.weight for spec in config.rewards):
        raise DataError(
            "lists without scores, and no reward to score them",
            where=path,
            hint="give the file a column scores, or the run a reward with a weight other than 0",
        )
    for values in data.scores or ():
        _relevance(config.algorithm, values)
    return data


def build(
    config: RankDPORun,
    data: RankedLists | PromptsToRank,
    denoiser: Denoiser,
    reward: RewardMixture | None,
    context: Context,
) -> RankDPO:
    """Lists are sampled and scored here: before a checkpoint is read, by the policy that training starts from."""
    prompts = [data.prompt(index) for index in range(len(data))]
    latents: Latents | SampledLatents
    if isinstance(data, PromptsToRank):
        assert reward is not None  # open_data has looked
        pictures = config.data.pictures_per_prompt
        latents, scores = sample_lists(
            prompts, pictures, denoiser, config.sampler, reward, context, config.algorithm.sample_batch_size
        )
        return RankDPO(config.algorithm, denoiser, prompts, latents, scores, context)

    latents = Latents(data.load, len(data), denoiser, context, cached=config.data.cache_latents)
    if data.scores is None:
        assert reward is not None
        with context.meter.phase("reward"):
            scores = score_lists(latents, prompts, reward, context)
    else:
        scores = data.scores
    return RankDPO(config.algorithm, denoiser, prompts, latents, scores, context)
