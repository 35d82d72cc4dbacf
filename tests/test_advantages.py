from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from diffalign.advantages import PromptStatistics, batch_advantages, group_advantages


def test_batch_advantages_have_mean_zero_and_unit_population_std():
    # mean 2, population std 1
    assert_close(batch_advantages(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]), atol=1e-5, rtol=0)


def test_groups_are_normalised_apart():
    rewards = torch.tensor([1.0, 3.0, 100.0, 300.0])
    expected = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert_close(group_advantages(rewards, 2), expected, atol=1e-5, rtol=0)


def test_equal_rewards_have_advantage_zero():
    assert_close(group_advantages(torch.full((4,), 0.7), 4), torch.zeros(4))
    assert_close(batch_advantages(torch.full((4,), 0.5)), torch.zeros(4))


@pytest.mark.parametrize(("count", "size"), [(4, 1), (5, 2)])
def test_a_group_of_one_or_a_broken_group_is_refused(count, size):
    with pytest.raises(ValueError, match="groups of"):
        group_advantages(torch.zeros(count), size)


def test_prompt_statistics_use_the_batch_until_a_prompt_is_known():
    statistics = PromptStatistics(buffer_size=4, min_count=3)
    first = statistics.update(["a", "b"], torch.tensor([1.0, 3.0]))
    assert_close(first, torch.tensor([-1.0, 1.0]), atol=1e-5, rtol=0)
    later = statistics.update(["a", "a", "b"], torch.tensor([2.0, 3.0, 9.0]))
    # a remembers 1, 2, 3: mean 2, population std sqrt(2/3)
    std = (2 / 3) ** 0.5
    assert_close(later[:2], torch.tensor([0.0, 1 / std]), atol=1e-5, rtol=0)
    # b has 2 < 3 rewards: batch mean 14/3, std of 2, 3, 9
    batch = torch.tensor([2.0, 3.0, 9.0])
    assert_close(later[2], (9 - batch.mean()) / batch.std(correction=0), atol=1e-5, rtol=0)


def test_prompt_statistics_forget_the_oldest():
    statistics = PromptStatistics(buffer_size=2, min_count=1)
    statistics.update(["a", "a", "a"], torch.tensor([1.0, 2.0, 4.0]))
    assert statistics.state_dict() == {"a": [2.0, 4.0]}


def test_prompt_statistics_survive_a_round_trip():
    one = PromptStatistics(8, 2)
    one.update(["a", "b", "a"], torch.tensor([1.0, 5.0, 2.0]))
    other = PromptStatistics(8, 2)
    other.load_state_dict(one.state_dict())
    rewards = torch.tensor([4.0, 6.0])
    assert_close(one.update(["a", "b"], rewards), other.update(["a", "b"], rewards))
