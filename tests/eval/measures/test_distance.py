"""Distance from the base: closed forms on hand-made denoisers, torch.distributions on a tiny real pipeline."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffalign_eval.measures.distance import DenoisingDrift, denoising_drift, stochastic, trajectory_kl
from PIL import Image
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffalign.config import SamplerConfig
from diffalign.errors import CheckpointError, ConfigError, DataError, NumericsError
from diffalign.images import to_tensor
from diffalign.models.base import Conditioning, Denoiser
from diffalign.schedule import NoiseSchedule, PredictionType
from diffalign.seeding import sample_noise
from diffalign.trajectory import Trajectory, rollout
from diffalign.transitions import Sampler

SHAPE = (2, 3, 3)
ELEMENTS = 18
ABAR = torch.linspace(0.95, 0.05, 10, dtype=torch.float64)
TIMES = ((8, 5), (5, 2), (2, -1))
"""(t, t_prev) of the hand-made sampler."""
PROMPTS = ["a", "b", "a", "c", "d"]
NOISY = SamplerConfig(steps=3, eta=1.0, guidance_scale=1.0)


class Constant(Denoiser):
    """Predicts one number everywhere, and for prompt "nan" NaN; remembers how many pictures it saw at once."""

    def __init__(
        self,
        value: float,
        prediction_type: PredictionType = "epsilon",
        abar: Tensor = ABAR,
        final: float = 1.0,
        shape: tuple[int, int, int] = SHAPE,
    ) -> None:
        self.value, self.batches = value, set[int]()
        self.schedule = NoiseSchedule(abar, prediction_type, final)
        self.device, self.size, self.latent_shape = torch.device("cpu"), (3, 3), shape
        self.trains_text_encoder = False

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        values = [torch.nan if prompt == "nan" else 0.0 for prompt in prompts]
        return Conditioning(torch.tensor(values).view(-1, 1, 1), torch.zeros(1, 1, 1))

    def predict(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        self.batches.add(len(x))
        return torch.full_like(x, self.value) + conditioning.embeddings[..., None]

    def make_sampler(self, config: SamplerConfig) -> Sampler:
        times, previous = torch.tensor(TIMES).T
        return Sampler(self.schedule, times, previous, config.kind, config.eta, config.guidance_scale)

    def encode_images(self, images: Tensor) -> Tensor:
        return images[:, :2]

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {}

    def reference(self) -> nullcontext[None]:
        return nullcontext()

    def export(self, folder: Path) -> None: ...

    def fingerprint(self) -> str:
        return str(self.value)

    def prepare_training(self, *, gradient_checkpointing: bool, compile: bool) -> None: ...


def epsilon_kl(delta: float, abar_t: float, abar_s: float) -> float:
    """KL in nats of one DDIM step, eta = 1, of two eps-predictions that differ by `delta` in every element.

        mean = sqrt(abar_s) (x - sigma_t eps) / alpha_t + sqrt(1 - abar_s - std^2) eps
        d mean / d eps = sqrt(1 - abar_s - std^2) - sqrt(abar_s) sigma_t / alpha_t

    and KL = elements * (d mean / d eps * delta)^2 / (2 std^2).
    """
    variance = (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
    slope = np.sqrt(1 - abar_s - variance) - np.sqrt(abar_s * (1 - abar_t) / abar_t)
    return ELEMENTS * (slope * delta) ** 2 / (2 * variance)


# --- KL along the trajectory --------------------------------------------------------------------------------


def test_the_kl_of_constant_predictions_is_the_closed_form():
    found = trajectory_kl(Constant(0.7), Constant(0.4), PROMPTS, range(5), NOISY, batch_size=2)
    expected = {t: epsilon_kl(0.3, float(ABAR[t]), float(ABAR[s])) for t, s in TIMES[:2]}
    assert found.by_timestep == pytest.approx(expected, rel=1e-5)  # the last step, to abar = 1, has no noise
    assert found.nats == pytest.approx([sum(expected.values())] * 5, rel=1e-5)
    assert found.elements == ELEMENTS
    assert found.interval().mean == pytest.approx(sum(expected.values()), rel=1e-5)
    assert found.per_element().mean == pytest.approx(sum(expected.values()) / ELEMENTS, rel=1e-5)
    assert found.prompts == tuple(PROMPTS)
    assert found.interval().n == 5
    json.dumps(found.interval().to_json(), allow_nan=False)


def test_the_kl_grows_with_the_square_of_the_change():
    near, far = (trajectory_kl(Constant(d), Constant(0), PROMPTS, range(5), NOISY) for d in (0.1, 0.2))
    assert far.interval().mean == pytest.approx(4 * near.interval().mean, rel=1e-4)


def test_a_last_step_with_noise_counts():
    abar = float(ABAR[0])
    pair = [Constant(value, final=abar) for value in (0.1, 0.0)]
    found = trajectory_kl(*pair, PROMPTS, range(5), NOISY)
    assert list(found.by_timestep) == [8, 5, 2]
    assert found.by_timestep[2] == pytest.approx(epsilon_kl(0.1, float(ABAR[2]), abar), rel=1e-5)


def test_memory_and_results_do_not_depend_on_the_number_of_prompts_per_call():
    policy = Constant(0.7)
    many = trajectory_kl(policy, Constant(0.4), [f"{i}" for i in range(40)], range(40), NOISY, batch_size=3)
    assert policy.batches == {3, 1}  # 40 = 13 * 3 + 1
    assert len(many.nats) == 40


def test_a_checkpoint_is_at_distance_exactly_zero_from_itself(make_denoiser):
    denoiser = make_denoiser()
    again = copy.deepcopy(denoiser)
    sampler = SamplerConfig(steps=4, eta=1.0, guidance_scale=3.0)
    found = trajectory_kl(denoiser, again, PROMPTS, range(5), sampler, batch_size=2)
    assert found.nats == (0.0,) * 5
    assert found.interval().low == found.interval().high == 0.0


@pytest.mark.parametrize("variant", ["epsilon", "v zero-snr"])
def test_the_kl_of_a_real_pipeline_is_that_of_torch_distributions_on_its_replayed_trajectory(
    make_denoiser, tiny_pipeline_dir, tiny_v_pipeline_dir, variant
):
    folder = tiny_pipeline_dir if variant == "epsilon" else tiny_v_pipeline_dir
    base = make_denoiser(full=True, path=folder)
    policy = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.mul_(1.05)
    sampler = SamplerConfig(steps=4, eta=1.0, guidance_scale=3.0)
    found = trajectory_kl(policy, base, PROMPTS, [3, 1, 4, 1, 5], sampler, batch_size=5)

    steps = policy.make_sampler(sampler)
    conditioning = policy.encode_prompts(PROMPTS)
    moves = rollout(policy, conditioning, steps, [3, 1, 4, 1, 5])
    trajectory = Trajectory.collect(steps, moves)
    rows, expected = torch.arange(5), torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        for index in steps.stochastic_steps():
            at = torch.full_like(rows, index)
            ours, theirs = (trajectory.replay(d, conditioning, rows, at) for d in (policy, base))
            both = [Normal(step.mean.double(), step.std.double()) for step in (ours, theirs)]
            expected += kl_divergence(*both).flatten(1).sum(dim=1)
    assert expected.min() > 0.1
    assert found.nats == pytest.approx(expected.tolist(), rel=1e-4)
    assert sum(found.by_timestep.values()) == pytest.approx(np.mean(found.nats))
    assert len(found.by_timestep) == len(steps.stochastic_steps())


def test_a_sampler_without_noise_is_refused_and_given_noise():
    quiet = SamplerConfig(steps=3, eta=0.0, guidance_scale=2.0)
    with pytest.raises(ConfigError, match="a sampler with noise"):
        trajectory_kl(Constant(0.7), Constant(0.4), PROMPTS, range(5), quiet)
    assert stochastic(quiet) == SamplerConfig(steps=3, eta=1.0, guidance_scale=2.0)
    ddpm = SamplerConfig(kind="ddpm")
    assert stochastic(ddpm) == ddpm


def test_checkpoints_of_different_processes_have_no_kl():
    policy = Constant(0.7)
    for base in (Constant(0.7, abar=ABAR * 0.9), Constant(0.7, final=0.99)):
        with pytest.raises(CheckpointError, match="different noise schedules"):
            trajectory_kl(policy, base, PROMPTS, range(5), NOISY)
    with pytest.raises(CheckpointError, match="different shapes"):
        trajectory_kl(policy, Constant(0.7, shape=(2, 4, 4)), PROMPTS, range(5), NOISY)


def test_a_kl_that_is_not_finite_names_the_prompt():
    with pytest.raises(NumericsError, match="not finite") as caught:
        trajectory_kl(Constant(0.7), Constant(0.4), ["a", "nan"], range(2), NOISY)
    assert caught.value.where == "prompt 'nan'"
    with pytest.raises(ValueError, match="pairs"):
        trajectory_kl(Constant(0.7), Constant(0.4), PROMPTS, range(4), NOISY)
    with pytest.raises(ValueError, match="pairs"):
        trajectory_kl(Constant(0.7), Constant(0.4), [], [], NOISY)


# --- drift of the denoising error ---------------------------------------------------------------------------


def pictures(count: int, size: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(array) for array in rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)]


def drift(policy: Denoiser, base: Denoiser, batch_size: int = 2, **options: object) -> DenoisingDrift:
    """Over five pictures with `PROMPTS`."""
    shown = pictures(5, base.size[0])
    batches = [(shown[i : i + batch_size], PROMPTS[i : i + batch_size]) for i in range(0, 5, batch_size)]
    return denoising_drift(policy, base, iter(batches), **options)


def test_the_drift_of_constant_predictions_is_the_closed_form():
    """(eps - c)^2 on average over elements; c^2 - b^2 - 2 (c - b) mean(eps) is the difference of two."""
    found = drift(Constant(0.7), Constant(0.4), noise_levels=(0.0, 1.0))
    noise = [sample_noise(SHAPE, range(5), "drift", 0, t).flatten(1) for t in (0, 9)]
    expected = [0.49 - 0.16 - 2 * 0.3 * eps.mean(dim=1) for eps in noise]
    assert found.by_timestep == pytest.approx({0: float(expected[0].mean()), 9: float(expected[1].mean())})
    differences = [after - before for after, before in zip(found.policy, found.base, strict=True)]
    assert differences == pytest.approx(torch.stack(expected).mean(dim=0).tolist(), rel=1e-4)
    assert found.base == pytest.approx(
        torch.stack([(eps - 0.4).square().mean(dim=1) for eps in noise]).mean(dim=0).tolist()
    )
    assert found.interval().mean == pytest.approx(np.mean(differences))
    assert found.relative == pytest.approx(sum(found.policy) / sum(found.base) - 1)
    assert found.captions == tuple(PROMPTS)


def test_the_target_is_the_latent_where_the_network_predicts_it():
    found = drift(Constant(0.7, "sample"), Constant(0.4, "sample"), noise_levels=(0.5,))
    latents = to_tensor(pictures(5))[:, :2].flatten(1)
    expected = (latents - 0.7).square().mean(dim=1) - (latents - 0.4).square().mean(dim=1)
    assert found.interval().mean == pytest.approx(float(expected.mean()), rel=1e-4)


def test_a_checkpoint_has_no_drift_from_itself_and_the_batch_does_not_matter(make_denoiser):
    base = make_denoiser(full=True)
    policy, moved = copy.deepcopy(base), copy.deepcopy(base)
    found = drift(policy, base)
    assert found.interval().mean == found.interval().high == found.relative == 0.0
    assert found.policy == found.base
    assert list(found.by_timestep) == [100, 300, 500, 699, 899]  # round(0.1 * 999) = 100, ..., 899
    with torch.no_grad():
        for parameter in moved.trainable_parameters().values():
            parameter.mul_(1.05)
    apart, together = drift(moved, base, batch_size=1), drift(moved, base, batch_size=5)
    assert apart.policy == pytest.approx(together.policy, rel=1e-4)
    assert apart.interval().mean != 0
    assert drift(moved, base, seed=1).policy != apart.policy


def test_pictures_of_any_size_are_fitted():
    found = denoising_drift(Constant(0.7), Constant(0.4), [([pictures(1, 9)[0]], ["a"])])
    assert len(found.policy) == 1


def test_errors_of_different_targets_cannot_be_subtracted():
    for base in (Constant(0.4, "v_prediction"), Constant(0.4, abar=ABAR * 0.9)):
        with pytest.raises(CheckpointError, match="different denoising errors"):
            drift(Constant(0.7), base)
    with pytest.raises(CheckpointError, match="different shapes"):
        drift(Constant(0.7), Constant(0.4, shape=(3, 3, 3)))
    with pytest.raises(DataError, match="no pictures"):
        denoising_drift(Constant(0.7), Constant(0.4), [])
    with pytest.raises(NumericsError, match="not finite") as caught:
        denoising_drift(Constant(0.7), Constant(0.4), [(pictures(2), ["a", "nan"])])
    assert caught.value.where == "prompt 'nan'"
