"""What scores pictures: the contract of a reward model, the registry, weighted mixtures.

A reward gives every picture one float32 in its own published scale. Scale, sign and weight belong to the
mixture in the configuration, never to a reward; and a picture's score never depends on its batch.

Rewards are found by entry point (group `diffalign.rewards`), so any installed package can add one, or as
`path/to/file.py:function` and `package.module:function`.
"""

from diffalign.rewards.background import BackgroundScorer
from diffalign.rewards.mixture import RewardMixture, Scores
from diffalign.rewards.model import Images, NetworkReward, NonFiniteScore, RewardModel, once_per_batch
from diffalign.rewards.registry import CallableReward, available_rewards, load_reward

__all__ = [
    "BackgroundScorer",
    "CallableReward",
    "Images",
    "NetworkReward",
    "NonFiniteScore",
    "RewardMixture",
    "RewardModel",
    "Scores",
    "available_rewards",
    "load_reward",
    "once_per_batch",
]
