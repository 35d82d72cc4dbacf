from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from diffalign.algorithms.base import Context
from diffalign.algorithms.online import OnlineRL
from diffalign.config import DDPOConfig, RewardConfig, SamplerConfig
from diffalign.data.prompts import PromptSource
from diffalign.errors import ConfigError, NumericsError
from diffalign.rewards import RewardMixture

PROMPTS = [f"prompt {i}" for i in range(8)]


@pytest.fixture
def reward(tmp_path):
    """Brightness, as a user's own file."""
    return RewardMixture([brightness(tmp_path)])


def brightness(folder):
    file = folder / "mine.py"
    file.write_text("def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3)) * 100\n")
    return RewardConfig(name=f"{file}:brightness", label="brightness")


def make(denoiser, reward, *, context=None, sampler=None, **options):
    defaults = {
        "prompts_per_iteration": 4,
        "group_size": 2,
        "advantage": "group",
        "sample_batch_size": 3,
        "train_batch_size": 5,
        "updates_per_epoch": 2,
    }
    config = DDPOConfig(**{**defaults, **options})
    sampler = sampler or SamplerConfig(steps=5, guidance_scale=1.0)
    prompts = PromptSource(PROMPTS, seed=1)
    return OnlineRL(config, sampler, denoiser, prompts, reward, context or Context(seed=1))


def test_every_sample_and_timestep_is_trained_on_once_an_epoch(make_denoiser, reward):
    algorithm = make(make_denoiser(), reward, inner_epochs=2)
    updates = list(algorithm.updates(0))
    assert len(updates) == 4  # 2 inner epochs x 2 updates
    for epoch in (updates[:2], updates[2:]):
        pairs = [
            pair
            for update in epoch
            for batch in update
            for pair in zip(batch.samples.tolist(), batch.steps.tolist(), strict=True)
        ]
        assert sorted(pairs) == [(sample, step) for sample in range(8) for step in range(5)]
    for update in updates:
        assert_close(sum(batch.weight for batch in update), 1.0)
        assert all(len(batch.samples) <= 5 for batch in update)


def test_a_timestep_fraction_keeps_that_share_of_each_trajectory(make_denoiser, reward):
    algorithm = make(make_denoiser(), reward, timestep_fraction=0.4)
    kept: dict[int, set[int]] = {}
    for update in algorithm.updates(0):
        for batch in update:
            for sample, step in zip(batch.samples.tolist(), batch.steps.tolist(), strict=True):
                kept.setdefault(sample, set()).add(step)
    assert set(map(len, kept.values())) == {2}
    assert len({tuple(sorted(steps)) for steps in kept.values()}) > 1


def test_an_iteration_is_a_function_of_seed_and_number(make_denoiser, reward):
    denoiser = make_denoiser()
    direct = make(denoiser, reward)
    list(direct.updates(3))
    after_others = make(denoiser, reward)
    for iteration in (0, 3):
        list(after_others.updates(iteration))
    assert torch.equal(direct.experience.trajectory.latents, after_others.experience.trajectory.latents)
    assert direct.experience.prompts == after_others.experience.prompts


def test_sampling_batch_size_does_not_change_the_pictures(make_denoiser, reward):
    denoiser = make_denoiser()
    one, other = make(denoiser, reward, sample_batch_size=8), make(denoiser, reward, sample_batch_size=3)
    list(one.updates(0))
    list(other.updates(0))
    a, b = one.experience.trajectory.latents, other.experience.trajectory.latents
    assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_two_processes_sample_what_one_does(make_denoiser, reward):
    denoiser = make_denoiser()
    whole = make(denoiser, reward)
    list(whole.updates(0))
    ranks = [make(denoiser, reward, context=Context(seed=1, rank=r, world=2)) for r in range(2)]
    shares = [algorithm._sample_pictures(algorithm._assign(0)[1])[0] for algorithm in ranks]
    finals = torch.stack([share.final for share in shares])  # [rank, 4, ...]: prompts 0, 2 and 1, 3
    merged = (
        finals.view(2, 2, 2, *finals.shape[2:]).transpose(0, 1).reshape_as(whole.experience.trajectory.final)
    )
    assert_close(merged, whole.experience.trajectory.final, atol=1e-5, rtol=1e-5)


def test_prompts_that_processes_cannot_share_are_refused(make_denoiser, reward):
    with pytest.raises(ConfigError, match="cannot be shared evenly by 3 processes"):
        make(make_denoiser(), reward, context=Context(rank=0, world=3))


def test_the_first_update_has_ratio_one_and_minus_the_mean_advantage_as_loss(make_denoiser, reward):
    algorithm = make(make_denoiser(), reward)
    batch = next(iter(algorithm.updates(0)))[0]
    out = algorithm.loss(batch)
    assert_close(out.loss.detach(), -batch.advantages.mean(), atol=1e-4, rtol=0)
    assert float(out.metrics["clip_fraction"]) == 0
    assert algorithm.ratio_error < 1e-5


def test_a_replay_that_differs_from_the_rollout_stops_the_run(make_denoiser, reward, capsys):
    def broken(ratio_check):
        algorithm = make(make_denoiser(), reward, ratio_check=ratio_check)
        original, calls = algorithm.denoiser.predict, []

        def drifting(x, t, *rest):
            calls.append(1)
            return original(x, t, *rest) + (0.01 if torch.is_grad_enabled() else 0.0)

        algorithm.denoiser.predict = drifting
        return algorithm

    with pytest.raises(NumericsError, match=r"importance ratio is off by .* at timestep") as caught:
        list(broken("error").updates(0))
    assert caught.value.exit_code == 4
    list(broken("warn").updates(0))
    assert "warning: before any update" in capsys.readouterr().out


def test_learning_raises_the_reward(make_denoiser, reward):
    denoiser = make_denoiser(full=True)
    algorithm = make(
        denoiser, reward, clip_range=0.05, prompts_per_iteration=8, group_size=4,
        updates_per_epoch=1, train_batch_size=64,
    )  # fmt: skip
    optimizer = torch.optim.Adam(denoiser.trainable_parameters().values(), lr=3e-3)
    means = []
    for iteration in range(8):
        for update in algorithm.updates(iteration):
            optimizer.zero_grad()
            for batch in update:
                (algorithm.loss(batch).loss * batch.weight).backward()
            optimizer.step()
        means.append(algorithm.metrics()["reward/mean"])
    assert sum(means[-2:]) / 2 > sum(means[:2]) / 2 + 0.5


def test_guidance_in_training_is_that_of_sampling(make_denoiser, reward):
    sampler = SamplerConfig(steps=4, guidance_scale=4.0)
    algorithm = make(make_denoiser(), reward, sampler=sampler)
    scales = []
    original = algorithm.denoiser.predict
    algorithm.denoiser.predict = lambda x, t, c, scale: (scales.append(scale), original(x, t, c, scale))[1]
    algorithm.loss(next(iter(algorithm.updates(0)))[0])
    assert set(scales) == {4.0}


def test_running_prompt_statistics_are_state(make_denoiser, reward):
    algorithm = make(make_denoiser(), reward, advantage="prompt", prompt_min_count=2)
    list(algorithm.updates(0))
    state = algorithm.state_dict()
    assert sum(len(values) for values in state["prompt_statistics"].values()) == 8
    other = make(make_denoiser(), reward, advantage="prompt", prompt_min_count=2)
    other.load_state_dict(state)
    assert other.state_dict() == state


def test_rewards_are_reported_by_component(make_denoiser, reward):
    algorithm = make(make_denoiser(), reward)
    list(algorithm.updates(0))
    metrics = algorithm.metrics()
    assert_close(metrics["reward/mean"], metrics["reward/brightness"])
    assert metrics["reward/group_std"] > 0


def test_scoring_in_the_background_changes_no_number(make_denoiser, reward):
    denoiser = make_denoiser()
    beside, after = (make(denoiser, reward, score_in_background=flag) for flag in (True, False))
    list(beside.updates(0))
    list(after.updates(0))
    assert torch.equal(beside.experience.trajectory.latents, after.experience.trajectory.latents)
    assert torch.equal(beside.experience.advantages, after.experience.advantages)
    assert beside.metrics() == after.metrics()


def test_standard_scores_are_taken_over_the_whole_iteration(make_denoiser, tmp_path):
    normalized = RewardMixture([brightness(tmp_path)], normalized=True)
    algorithm = make(make_denoiser(), normalized, advantage="batch", sample_batch_size=3)
    list(algorithm.updates(0))
    metrics = algorithm.metrics()
    assert abs(metrics["reward/mean"]) < 1e-4
    assert abs(metrics["reward/std"] - 1) < 1e-3
    assert metrics["reward/brightness"] > 1  # the component keeps its own scale


def test_a_timestep_range_keeps_that_part_of_each_trajectory(make_denoiser, reward):
    algorithm = make(make_denoiser(), reward, timestep_range=(0.0, 0.6))
    steps = {int(step) for update in algorithm.updates(0) for batch in update for step in batch.steps}
    assert steps == {0, 1, 2}  # of five; the middle of step 2 lies at 0.5, that of step 3 at 0.7
    with pytest.raises(ConfigError, match="no stochastic step"):
        make(make_denoiser(), reward, timestep_range=(0.31, 0.32))


def test_the_normalised_ratio_weighs_steps_by_their_std(make_denoiser, reward):
    """Its gradient at ratio one is the plain one's times std, step by step."""
    denoiser = make_denoiser(full=True)
    gradients = {}
    for normalized in (False, True):
        algorithm = make(denoiser, reward, normalize_ratio=normalized)
        next(iter(algorithm.updates(0)))
        experience, samples = algorithm.experience, torch.arange(4)
        for step in range(5):
            denoiser.unet.zero_grad()
            algorithm._log_ratio(experience, samples, torch.full((4,), step)).sum().backward()
            parameter = next(iter(denoiser.trainable_parameters().values()))
            gradients[normalized, step] = parameter.grad.clone()
    like = torch.zeros(5, 1, 1, 1)
    sampler = algorithm.sampler
    std = sampler.step(like, like, sampler.timesteps, sampler.previous).std.flatten()
    for step in range(5):
        assert_close(gradients[True, step], gradients[False, step] * std[step], rtol=1e-2, atol=1e-7)
