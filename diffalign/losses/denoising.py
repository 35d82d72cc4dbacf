"""Supervised denoising: squared error on what the network predicts, and how timesteps are weighted."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.losses.base import LossOutput, require_same_shape
from diffalign.schedule import PredictionType


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error *averaged* over all but the first dimension: [B] float32."""
    require_same_shape(prediction=prediction, target=target)
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def min_snr_weight(snr: Tensor, prediction_type: PredictionType, *, gamma: float) -> Tensor:
    """Min-SNR weights [B] (Hang et al. 2023, arXiv:2303.09556, section 3.4).

        x_0: min(snr, gamma)     eps: min(snr, gamma) / snr     v: min(snr, gamma) / (snr + 1)

    At zero terminal SNR the eps form would divide 0 by 0; its limit, 1, is returned.
    """
    clipped = snr.float().clamp_max(gamma)
    if prediction_type == "sample":
        return clipped
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return torch.where(snr > 0, clipped / snr.clamp_min(torch.finfo(torch.float32).tiny), 1.0)


def denoising(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> LossOutput:
    """Denoising score matching (Ho et al. 2020, arXiv:2006.11239, eq. 14), optionally weighted.

        loss = mean_B(weight * mean_D (prediction - target)^2)

    Args:
        prediction, target: [B, C, H, W] in the network's own parameterisation.
        weight: [B] per-sample factors, not renormalised.
    """
    error = squared_error(prediction, target)
    if weight is not None:
        require_same_shape(error=error, weight=weight)
    weighted = error if weight is None else weight.to(error) * error
    return LossOutput(weighted.mean(), {"error": error.detach().mean()})
