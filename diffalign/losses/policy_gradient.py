"""Policy gradients on denoising steps (Black et al. 2023, "Training Diffusion Models with RL", arXiv:2305.13301).

All arguments are [K]: one (picture, timestep) pair each. Log-probabilities are *means* over latent elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.losses.base import LossOutput, require_same_shape


def ppo_clip(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip_range: float) -> LossOutput:
    """DDPO-IS with PPO's clipped ratio (arXiv:2305.13301, eq. 4; Schulman et al. 2017, arXiv:1707.06347, eq. 7).

        ratio = exp(log_prob - old_log_prob)
        loss  = -mean min(ratio A, clip(ratio, 1 - c, 1 + c) A)

    Args:
        log_prob: present policy, with gradient. old_log_prob: the policy that sampled.
        clip_range: c, for log-probabilities averaged over latent elements (1e-4 is about 1.6 nats of the joint
            at 4x64x64).
    """
    require_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage)
    log_ratio = log_prob.float() - old_log_prob.float()
    ratio, advantage = log_ratio.exp(), advantage.float()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    detached = log_ratio.detach()
    metrics = {
        "clip_fraction": ((ratio.detach() - 1).abs() > clip_range).float().mean(),
        "approx_kl": 0.5 * detached.square().mean(),
        "ratio_deviation": (ratio.detach() - 1).abs().mean(),
    }
    return LossOutput(-torch.minimum(ratio * advantage, clipped * advantage).mean(), metrics)


def reinforce(log_prob: Tensor, advantage: Tensor) -> LossOutput:
    """DDPO-SF, the score-function estimator (arXiv:2305.13301, eq. 3): loss = -mean(A log_prob).

    The value has no meaning of its own; its gradient is the policy gradient per latent element. At ratio 1 it
    equals the gradient of `ppo_clip`.
    """
    require_same_shape(log_prob=log_prob, advantage=advantage)
    loss = -(advantage.float() * log_prob.float()).mean()
    return LossOutput(loss, {"log_prob": log_prob.detach().float().mean()})
