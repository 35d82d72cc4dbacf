"""Policy gradients on denoising steps (Black et al. 2023, "Training Diffusion Models with RL", arXiv:2305.13301).

All arguments are [K]: one (picture, timestep) pair each. Log-ratios are *means* over latent elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.losses.base import LossOutput, require_same_shape


def ppo_clip(log_ratio: Tensor, advantage: Tensor, *, clip_range: float) -> LossOutput:
    """DDPO-IS with PPO's clipped ratio (arXiv:2305.13301, eq. 4; Schulman et al. 2017, arXiv:1707.06347, eq. 7).

        ratio = exp(log_ratio)
        loss  = -mean min(ratio A, clip(ratio, 1 - c, 1 + c) A)

    Args:
        log_ratio: log-probability under the present policy, with gradient, minus that under the policy that sampled.
        clip_range: c, for log-ratios averaged over latent elements (1e-4 is about 1.6 nats of the joint at
            4x64x64).
    """
    require_same_shape(log_ratio=log_ratio, advantage=advantage)
    log_ratio = log_ratio.float()
    ratio, advantage = log_ratio.exp(), advantage.float()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    detached = log_ratio.detach()
    metrics = {
        "clip_fraction": ((ratio.detach() - 1).abs() > clip_range).float().mean(),
        "approx_kl": 0.5 * detached.square().mean(),
        "ratio_deviation": (ratio.detach() - 1).abs().mean(),
    }
    return LossOutput(-torch.minimum(ratio * advantage, clipped * advantage).mean(), metrics)


def reinforce(log_ratio: Tensor, advantage: Tensor) -> LossOutput:
    """DDPO-SF, the score-function estimator (arXiv:2305.13301, eq. 3): loss = -mean(A log_ratio).

    The old log-probability in it is a constant, so its gradient is that of -mean(A log_prob), the policy gradient
    per latent element. At ratio 1 it equals the gradient of `ppo_clip`.
    """
    require_same_shape(log_ratio=log_ratio, advantage=advantage)
    log_ratio = log_ratio.float()
    loss = -(advantage.float() * log_ratio).mean()
    return LossOutput(loss, {"ratio_deviation": (log_ratio.detach().exp() - 1).abs().mean()})
