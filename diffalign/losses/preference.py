"""Preference losses on image pairs.

Shapes: B pairs; w = preferred, l = rejected. Every error is [B], squared and *averaged* over the D = C*H*W latent
elements; the two pictures of a pair share timestep and noise.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from diffalign.losses.base import LossOutput, require_same_shape


def diffusion_dpo(
    err_w: Tensor,
    err_l: Tensor,
    ref_w: Tensor,
    ref_l: Tensor,
    *,
    beta: float,
    probability: Tensor | None = None,
) -> LossOutput:
    """Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908, eq. 14).

        m    = (err_w - ref_w) - (err_l - ref_l)
        loss = -p log sigmoid(-beta/2 m) - (1 - p) log sigmoid(beta/2 m)

    Args:
        err_w, err_l: the policy's errors; ref_w, ref_l: the frozen reference's, without gradient.
        beta: for averaged errors; the paper's sum convention is beta / D.
        probability: [B] P(w is preferred), for soft labels (a tie is 0.5). Default: 1, the paper's loss.
    """
    require_same_shape(err_w=err_w, err_l=err_l, ref_w=ref_w, ref_l=ref_l)
    margin = (err_w.float() - ref_w.float()) - (err_l.float() - ref_l.float())
    logits = -0.5 * beta * margin
    loss = -F.logsigmoid(logits)
    if probability is not None:
        require_same_shape(logits=logits, probability=probability)
        p = probability.to(logits)
        loss = p * loss - (1 - p) * F.logsigmoid(-logits)
    drift_w, drift_l = (err_w - ref_w).detach(), (err_l - ref_l).detach()
    metrics = {
        "accuracy": _accuracy(logits.detach()),
        "margin": -margin.detach().mean(),
        "winner_drift": drift_w.mean(),
        "loser_drift": drift_l.mean(),
    }
    return LossOutput(loss.mean(), metrics)


def _accuracy(logits: Tensor) -> Tensor:
    """Share of pairs ordered as labelled; an exact tie, as at the reference, counts half."""
    return ((logits > 0).float() + 0.5 * (logits == 0).float()).mean()
