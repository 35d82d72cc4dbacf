from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from diffalign.schedule import FlowSchedule, NoiseSchedule

ABAR = torch.tensor([0.81, 0.36, 0.04])  # alpha = 0.9, 0.6, 0.2


def test_alpha_and_sigma_are_the_roots_of_abar_and_one_minus_abar():
    alpha, sigma = NoiseSchedule(ABAR).alpha_sigma(torch.tensor([1]), torch.zeros(1, 1, 1, 1))
    assert_close(alpha.item(), 0.6)
    assert_close(sigma.item(), 0.8)


def test_snr_is_alpha_squared_over_sigma_squared():
    assert_close(NoiseSchedule(ABAR).snr(torch.tensor([1])), torch.tensor([0.36 / 0.64]))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_target_as_prediction_gives_back_x0_and_noise(kind):
    schedule = NoiseSchedule(ABAR, kind)
    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 2])
    x = schedule.add_noise(x0, noise, t)
    got_x0, got_noise = schedule.to_x0_eps(x, schedule.target(x0, noise, t), t)
    assert_close(got_x0, x0, atol=1e-5, rtol=1e-5)
    assert_close(got_noise, noise, atol=1e-5, rtol=1e-5)


def test_v_is_alpha_noise_minus_sigma_x0():
    schedule = NoiseSchedule(ABAR, "v_prediction")
    x0, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    # 0.6 * 3 - 0.8 * 2 = 0.2
    assert_close(schedule.target(x0, noise, torch.tensor([1])).item(), 0.2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noising_and_velocity_match_diffusers(kind):
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ours = NoiseSchedule(theirs.alphas_cumprod, kind)
    x0, noise, t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 10, 500, 999])
    assert_close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), atol=1e-6, rtol=1e-5)
    if kind == "v_prediction":
        assert_close(ours.target(x0, noise, t), theirs.get_velocity(x0, noise, t), atol=1e-6, rtol=1e-5)


def test_before_timestep_zero_lies_the_final_alpha():
    schedule = NoiseSchedule(ABAR, final_alpha_cumprod=0.9)
    assert_close(schedule.alpha_bar(torch.tensor([-1, 0])), torch.tensor([0.9, ABAR[0].item()]).double())


@pytest.mark.parametrize(
    ("table", "kind", "message"),
    [
        (torch.tensor([0.1, 0.5]), "epsilon", "decrease"),
        (torch.tensor([1.0, 0.5]), "epsilon", "decrease"),
        (torch.tensor([[0.5, 0.1]]), "epsilon", "shape"),
        (ABAR, "velocity", "unknown prediction type"),
        (ABAR, "flow", "unknown prediction type"),
        (torch.tensor([0.5, 0.0]), "epsilon", "zero terminal SNR"),
    ],
)
def test_a_table_that_is_no_schedule_is_refused(table, kind, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(table, kind)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_indices_of_a_flow_are_the_levels_that_diffusers_trains_on(shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.flip(0).double()  # noisiest first there
    assert_close(FlowSchedule(1000, shift).level(torch.arange(1000)), theirs, atol=1e-6, rtol=1e-6)


def test_a_flow_time_is_t_times_the_level_whatever_the_shift():
    level = FlowSchedule(1000, 3.0).level(torch.tensor([0.0, 250.0, 1000.0]))
    assert_close(level, torch.tensor([0.0, 0.25, 1.0]).double())


def test_before_index_zero_of_a_flow_lies_the_picture():
    assert float(FlowSchedule(1000, 3.0).level(torch.tensor([-1]))) == 0


def test_shift_three_moves_the_middle_to_three_quarters():
    # 3 * 0.5 / (1 + 2 * 0.5)
    assert_close(float(FlowSchedule(1000, 3.0).level(torch.tensor([499]))), 0.75)


def test_flow_noising_matches_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x0, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    expected = theirs.scale_noise(x0, theirs.timesteps[999 - t], noise)
    assert_close(FlowSchedule(1000, 3.0).add_noise(x0, noise, t), expected, atol=1e-5, rtol=1e-5)


def test_the_target_of_a_flow_as_prediction_gives_back_x0_and_noise():
    schedule = FlowSchedule(1000)
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    for t in (torch.tensor([0, 500, 999]), torch.tensor([0.5, 333.3, 1000.0])):
        x = schedule.add_noise(x0, noise, t)
        velocity = schedule.target(x0, noise, t)
        assert_close(velocity, noise - x0)
        got_x0, got_noise = schedule.to_x0_eps(x, velocity, t)
        assert_close(got_x0, x0, atol=1e-5, rtol=1e-5)
        assert_close(got_noise, noise, atol=1e-5, rtol=1e-5)


def test_the_snr_of_a_flow():
    # s = 0.2: (0.8 / 0.2)^2; pure noise: 0
    assert_close(FlowSchedule(1000).snr(torch.tensor([199, 999])), torch.tensor([16.0, 0.0]))


@pytest.mark.parametrize(("timesteps", "shift"), [(1, 1.0), (1000, 0.0), (1000, float("nan"))])
def test_a_flow_without_levels_is_refused(timesteps, shift):
    with pytest.raises(ValueError, match="a flow needs two timesteps or more and a positive shift"):
        FlowSchedule(timesteps, shift)


def test_schedules_have_the_same_levels_or_not():
    table = torch.linspace(0.99, 0.01, 10)
    schedule = NoiseSchedule(table)
    assert schedule.same_levels(NoiseSchedule(table, "v_prediction"))
    assert not schedule.same_levels(NoiseSchedule(table, final_alpha_cumprod=0.99))
    assert not schedule.same_levels(NoiseSchedule(table[:9]))
    assert not schedule.same_levels(NoiseSchedule(table - 1e-3))
    assert FlowSchedule(10, 3.0).same_levels(FlowSchedule(10, 3.0))
    assert not FlowSchedule(10, 3.0).same_levels(FlowSchedule(10))
