from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from diffalign.losses.policy_gradient import ppo_clip, reinforce


def test_ppo_at_ratio_one_is_minus_the_mean_advantage_with_the_score_function_gradient():
    log_ratio = torch.zeros(2, requires_grad=True)
    advantage = torch.tensor([2.0, -1.0])
    out = ppo_clip(log_ratio, advantage, clip_range=1e-4)
    assert_close(out.loss, torch.tensor(-0.5))  # -(2 - 1) / 2
    out.loss.backward()
    assert_close(log_ratio.grad, torch.tensor([-1.0, 0.5]))  # -A / K
    other = torch.zeros(2, requires_grad=True)
    reinforce(other, advantage).loss.backward()
    assert_close(other.grad, log_ratio.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "flows"),
    [
        (1.3, 1.0, -1.2, False),  # already more likely than allowed: clipped, no gradient
        (0.7, 1.0, -0.7, True),  # a good step made less likely: pulled back
        (1.3, -1.0, 1.3, True),  # a bad step made more likely: pulled back
        (0.7, -1.0, 0.8, False),
    ],
)
def test_ppo_clips_only_in_the_direction_of_the_advantage(ratio, advantage, value, flows):
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    out = ppo_clip(log_ratio, torch.tensor([advantage]), clip_range=0.2)
    assert_close(out.loss, torch.tensor(value))
    out.loss.backward()
    assert bool(log_ratio.grad.abs().item() > 0) is flows


def test_ppo_reports_how_far_the_policy_moved():
    out = ppo_clip(torch.tensor([0.1, 0.0]), torch.ones(2), clip_range=0.05)
    assert_close(out.metrics["clip_fraction"], torch.tensor(0.5))
    assert_close(out.metrics["approx_kl"], torch.tensor(0.5 * 0.01 / 2))


def test_reinforce_by_hand():
    out = reinforce(torch.tensor([-1.0, -3.0]), torch.tensor([1.0, 2.0]))
    assert_close(out.loss, torch.tensor(3.5))  # -(-1 - 6) / 2


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        ppo_clip(torch.zeros(2), torch.zeros(1), clip_range=0.1)
