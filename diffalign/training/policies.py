"""A policy to sample from, whatever its path names: also a checkpoint in the middle of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffalign.assets import resolve
from diffalign.config import AdapterConfig
from diffalign.config.sizes import Resolution
from diffalign.config_file import load_config
from diffalign.errors import CheckpointError
from diffalign.layout import run_of_step
from diffalign.models.base import Denoiser
from diffalign.models.loading import load_denoiser, load_for_inference
from diffalign.training.checkpoint import read_checkpoint


def load_policy(
    path: str,
    *,
    device: str = "auto",
    mixed_precision: str = "no",
    resolution: Resolution | None = None,
    adapters: Sequence[AdapterConfig] = (),
) -> Denoiser:
    """`load_for_inference`, or the policy as `RUN/checkpoints/step-N` holds it (its average where there is one).

    Args:
        resolution, adapters: as `load_for_inference` takes them.

    Raises:
        CheckpointError: nothing there, damaged, or of another model than the run's config.yaml says.
    """
    run = run_of_step(resolve(path))
    if run is None:
        return load_for_inference(
            path, device=device, mixed_precision=mixed_precision, resolution=resolution, adapters=adapters
        )
    model = load_config(run / "config.yaml").model
    model = model.model_copy(update={"adapters": [*model.adapters, *adapters]})
    if resolution is not None:
        model = model.model_copy(update={"resolution": resolution})
    snapshot, _ = read_checkpoint(resolve(path))
    denoiser = load_denoiser(model, device=device, mixed_precision=mixed_precision, trainable=True)
    weights = snapshot.tensors.get("ema", snapshot.tensors["trainable"])
    parameters = denoiser.trainable_parameters()
    if set(parameters) != set(weights):
        raise CheckpointError(
            f"{path} does not fit the model of its run",
            where=str(run / "config.yaml"),
            why=f"{len(set(parameters) ^ set(weights))} weights are in one of the two only",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
            parameter.requires_grad_(False)
    return denoiser
