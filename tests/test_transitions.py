"""Kernels against hand-derived numbers, torch.distributions and diffusers' own schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from diffalign.schedule import NoiseSchedule
from diffalign.transitions import GaussianStep, Sampler, ddim_step, ddpm_step

SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
ONE = torch.ones(1, 1, 1, 1)


def step_of(mean: torch.Tensor, std: float) -> GaussianStep:
    return GaussianStep(mean, torch.full((len(mean), 1, 1, 1), std))


def test_log_prob_is_the_mean_of_the_normal_log_density():
    mean, x = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    expected = Normal(mean, 0.3).log_prob(x).flatten(1).mean(dim=1)
    assert_close(step_of(mean, 0.3).log_prob(x), expected, atol=1e-6, rtol=1e-6)


def test_log_prob_at_the_mean_is_minus_log_std_minus_half_log_two_pi():
    expected = -math.log(0.5) - 0.5 * math.log(2 * math.pi)
    assert_close(step_of(0 * ONE, 0.5).log_prob(0 * ONE).item(), expected)


def test_kl_matches_torch_distributions():
    a, b = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    expected = kl_divergence(Normal(a, 0.7), Normal(b, 0.7)).flatten(1).mean(dim=1)
    assert_close(step_of(a, 0.7).kl(step_of(b, 0.7)), expected)


def test_the_normalised_ratio_by_hand():
    old_mean, x_prev = torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[[0.2, 0.6]]]])
    new = GaussianStep(torch.tensor([[[[0.1, 1.2]]]]), torch.tensor([[[[0.4]]]]))
    # z = (0.2, -0.4) / 0.4 = (0.5, -1), moved by (0.1, 0.2): mean(0.05, -0.2)
    assert_close(new.normalized_log_ratio(old_mean, x_prev), torch.tensor([-0.075]))


def test_the_normalised_ratio_is_the_published_form_of_the_plain_one():
    draw = torch.Generator().manual_seed(0)
    old_mean, moved, x_prev = (torch.randn(3, 4, 2, 2, generator=draw) for _ in range(3))
    std = torch.tensor([0.05, 0.4, 0.9]).view(3, 1, 1, 1)
    old, new = GaussianStep(old_mean, std), GaussianStep(old_mean + 0.1 * moved, std)
    drift = ((new.mean - old.mean) ** 2 / (2 * std**2)).flatten(1).mean(1)
    published = (new.log_prob(x_prev) - old.log_prob(x_prev) + drift) * std.flatten()
    assert_close(new.normalized_log_ratio(old_mean, x_prev), published, atol=1e-4, rtol=1e-4)


def test_kl_of_unequal_stds_is_refused():
    with pytest.raises(ValueError, match="equal stds"):
        step_of(ONE, 0.5).kl(step_of(ONE, 0.6))


def test_a_deterministic_step_has_no_log_prob():
    with pytest.raises(ValueError, match="no log-probability"):
        step_of(ONE, 0.0).log_prob(ONE)


def test_ddim_step_by_hand():
    schedule = NoiseSchedule(torch.tensor([0.64, 0.36]))  # alpha: 0.8, 0.6; sigma: 0.6, 0.8
    step = ddim_step(schedule, 2 * ONE, ONE, torch.tensor([1]), torch.tensor([0]), eta=1.0)
    x0 = (2 - 0.8 * 1) / 0.6  # = 2
    variance = (0.36 / 0.64) * (1 - 0.36 / 0.64)  # = 0.24609375
    mean = 0.8 * x0 + math.sqrt(0.36 - variance) * 1
    assert_close(step.mean.item(), mean)
    assert_close(step.std.item(), math.sqrt(variance))


def test_ddpm_and_ddim_with_eta_one_are_the_same_gaussian():
    schedule = NoiseSchedule(DDPMScheduler(**SETTINGS).alphas_cumprod)
    x, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    t, s = torch.tensor([500, 981]), torch.tensor([480, 961])
    a, b = ddim_step(schedule, x, eps, t, s, eta=1.0), ddpm_step(schedule, x, eps, t, s)
    assert_close(a.mean, b.mean, atol=1e-5, rtol=1e-5)
    assert_close(a.std, b.std)


def linear_network(x: torch.Tensor, t: int) -> torch.Tensor:
    """A stand-in for a network: bounded, depends on x and t."""
    return torch.tanh(0.7 * x + 0.001 * t)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variant", ["sd", "to_one", "zero_snr", "linspace"])
def test_whole_ddim_trajectories_match_diffusers(prediction_type, eta, variant):
    extra = {
        "sd": {"set_alpha_to_one": False, "steps_offset": 1},
        "to_one": {"set_alpha_to_one": True},
        "zero_snr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        "linspace": {"timestep_spacing": "linspace"},
    }[variant]
    if variant == "zero_snr" and prediction_type == "epsilon":
        pytest.skip("epsilon-prediction is undefined at zero SNR")
    theirs = DDIMScheduler(**SETTINGS, **extra, prediction_type=prediction_type)
    theirs.set_timesteps(20)
    # In float32 the scheduler's 1 - abar - std^2 leaves the root of a rounding error where it should be 0.
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.double()
    schedule = NoiseSchedule(theirs.alphas_cumprod, prediction_type, float(theirs.final_alpha_cumprod))
    sampler = Sampler(schedule, theirs.timesteps, (theirs.timesteps - 50).clamp_min(-1), "ddim", eta)
    draw = torch.Generator().manual_seed(0)
    expected = ours = torch.randn(2, 4, 8, 8, generator=draw)
    for t, s in sampler.pairs():
        noise = torch.randn(2, 4, 8, 8, generator=draw)
        output = linear_network(expected, t)
        expected = theirs.step(output, t, expected, eta=eta, variance_noise=noise).prev_sample
        step = sampler.step(ours, linear_network(ours, t), torch.tensor([t, t]), torch.tensor([s, s]))
        ours = step.sample(noise)
        assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_whole_ddpm_trajectories_match_diffusers(prediction_type):
    theirs = DDPMScheduler(**SETTINGS, prediction_type=prediction_type)
    theirs.set_timesteps(25)
    schedule = NoiseSchedule(theirs.alphas_cumprod, prediction_type)
    previous = torch.cat([theirs.timesteps[1:], torch.tensor([-1])])
    sampler = Sampler(schedule, theirs.timesteps, previous, "ddpm")
    expected = ours = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for index, (t, s) in enumerate(sampler.pairs()):
        seed = 100 + index
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        expected = theirs.step(
            linear_network(expected, t), t, expected, generator=torch.Generator().manual_seed(seed)
        ).prev_sample
        ours = sampler.step(ours, linear_network(ours, t), torch.tensor([t, t]), torch.tensor([s, s])).sample(
            noise
        )
        assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_only_steps_with_noise_are_stochastic():
    schedule = NoiseSchedule(DDPMScheduler(**SETTINGS).alphas_cumprod)
    times, previous = torch.tensor([800, 400, 0]), torch.tensor([400, 0, -1])
    assert Sampler(schedule, times, previous, "ddpm").stochastic_steps() == [0, 1]
    assert Sampler(schedule, times, previous, "ddim", eta=1.0).stochastic_steps() == [0, 1]
    assert Sampler(schedule, times, previous, "ddim", eta=0.0).stochastic_steps() == []
