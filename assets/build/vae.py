"""Stage 1: the autoencoder, 64x64 pictures to 4x8x8 latents.

Plain mean squared error with a very small KL weight: on flat-coloured pictures this converges in minutes,
where L1 or a perceptual loss on two CPU cores does not.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffalign.data.shapes import draw_scene, render

KL_WEIGHT = 1e-6
BATCH = 16
STEPS = 2400
PEAK_LEARNING_RATE = 2e-3


def new_vae() -> AutoencoderKL:
    """The architecture: 0.65 M parameters, three halvings, narrow at full resolution where the time goes."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def picture_batch(step: int, size: int = BATCH) -> Tensor:
    """Fresh pictures of step `step`, [size, 3, 64, 64] in [-1, 1]."""
    rng = np.random.default_rng([1, step])
    splits = ("train", "eval", "ood")
    pictures = [np.asarray(render(draw_scene(rng, splits[i % 3]), rng)) for i in range(size)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def learning_rate(step: int) -> float:
    """100 steps of warm-up, then a cosine to zero."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * step / STEPS))


def train_vae(folder: Path) -> None:
    """Train into `folder` (a diffusers VAE); continues from `folder/state.pt` when it was interrupted."""
    torch.manual_seed(0)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.0)
    state_file, first = folder / "state.pt", 0
    folder.mkdir(parents=True, exist_ok=True)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started = time.time()
    for step in range(first, STEPS):
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        pictures = picture_batch(step)
        posterior = vae.encode(pictures).latent_dist
        error = (vae.decode(posterior.sample()).sample - pictures).square().mean()
        (error + KL_WEIGHT * posterior.kl().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"vae {step + 1}/{STEPS} mse {error.item():.5f} {time.time() - started:.0f} s", flush=True)
        if (step + 1) % 500 == 0:
            torch.save(
                {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, state_file
            )
    vae.register_to_config(scaling_factor=round(1.0 / latent_std(vae), 5))
    vae.save_pretrained(folder)


@torch.no_grad()
def latent_std(vae: AutoencoderKL) -> float:
    """Standard deviation of posterior means over 512 pictures; its inverse is the scaling factor."""
    means = [vae.encode(picture_batch(10_000_000 + i, 64)).latent_dist.mean for i in range(8)]
    return float(torch.cat(means).std())
