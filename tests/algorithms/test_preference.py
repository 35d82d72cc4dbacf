from __future__ import annotations

import io
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffalign.algorithms.base import Context
from diffalign.algorithms.preference import DPO
from diffalign.config import DPOConfig, PairsConfig
from diffalign.data.preferences import PreferencePairs


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 255 - shade, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def pairs_file(tmp_path):
    rows = 12
    table = {
        "caption": [f"prompt {i}" for i in range(rows)],
        "jpg_0": [picture(20 * i) for i in range(rows)],
        "jpg_1": [picture(255 - 20 * i) for i in range(rows)],
        "label_0": [[1.0, 0.0, 0.5][i % 3] for i in range(rows)],
    }
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.table(table), file)
    return str(file)


def make(pairs_file, denoiser, *, ties="drop", cache_latents=True, **options):
    pairs = PreferencePairs(PairsConfig(path=pairs_file, validation_fraction=0.4), ties)
    config = DPOConfig(**{"batch_size": 3, "ties": ties, **options})
    return DPO(config, denoiser, pairs, Context(seed=5), cache_latents=cache_latents)


def first_batch(algorithm, iteration=0):
    return next(iter(algorithm.updates(iteration)))[0]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_first_loss_is_ln_2(pairs_file, make_denoiser, precision, full, text_encoder):
    denoiser = make_denoiser(full=full, mixed_precision=precision, train_text_encoder=text_encoder)
    algorithm = make(pairs_file, denoiser)
    out = algorithm.loss(first_batch(algorithm))
    assert abs(float(out.loss.detach()) - math.log(2)) < 1e-6
    out.loss.backward()
    gradients = [p.grad for p in denoiser.trainable_parameters().values() if p.grad is not None]
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients)


def test_both_pictures_of_a_pair_share_timestep_and_noise(pairs_file, make_denoiser):
    algorithm = make(pairs_file, make_denoiser())
    batch = first_batch(algorithm)
    seen = []
    original = algorithm.denoiser.predict
    algorithm.denoiser.predict = lambda x, t, *rest: (seen.append((x, t)), original(x, t, *rest))[1]
    algorithm.loss(batch)
    x, t = seen[0]
    assert torch.equal(t[:3], t[3:])
    alpha, sigma = algorithm.denoiser.schedule.alpha_sigma(batch.t, batch.x0_w)
    noise_w = (x[:3] - alpha * batch.x0_w) / sigma
    noise_l = (x[3:] - alpha * batch.x0_l) / sigma
    assert_close(noise_w, noise_l, atol=1e-4, rtol=1e-3)


def test_training_on_one_batch_lowers_its_loss_below_ln_2(pairs_file, make_denoiser):
    denoiser = make_denoiser(full=True)
    algorithm = make(pairs_file, denoiser, beta=1000.0)
    optimizer = torch.optim.Adam(denoiser.trainable_parameters().values(), lr=1e-4)
    for _ in range(12):
        out = algorithm.loss(first_batch(algorithm))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert float(out.loss.detach()) < math.log(2) - 0.05
    assert float(out.metrics["accuracy"]) == 1.0


def test_ties_are_left_out_or_soft(pairs_file, make_denoiser):
    denoiser = make_denoiser()
    dropped = make(pairs_file, denoiser)
    soft = make(pairs_file, denoiser, ties="soft")
    assert all(dropped.train_pairs.pairs.probability(i) == 1 for i in range(len(dropped.train_pairs)))
    probabilities = {soft.train_pairs.pairs.probability(i) for i in range(len(soft.train_pairs))}
    assert probabilities == {0.5, 1.0}


def test_validation_is_one_half_before_training_and_repeats_itself(pairs_file, make_denoiser):
    algorithm = make(pairs_file, make_denoiser(full=True), validation_every=2)
    start = {"validation/accuracy": 0.5, "validation/margin": 0.0, "validation/winner_drift": 0.0}
    assert algorithm.validate(0) == start
    assert algorithm.validate(1) == {}
    with torch.no_grad():
        for parameter in algorithm.denoiser.trainable_parameters().values():
            parameter.mul_(1.02)
    first, second = algorithm.validate(2), algorithm.validate(4)
    assert first == second
    assert first["validation/margin"] != 0


def test_cached_and_fresh_latents_are_the_same(pairs_file, make_denoiser):
    denoiser = make_denoiser()
    cached, fresh = make(pairs_file, denoiser), make(pairs_file, denoiser, cache_latents=False)
    a, b = first_batch(cached), first_batch(fresh)
    assert_close(a.x0_w, b.x0_w, atol=1e-5, rtol=1e-5)
    assert_close(a.x0_l, b.x0_l, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["uniform", "stratified", "antithetic"])
def test_only_the_chosen_part_of_the_schedule_is_trained_on(pairs_file, make_denoiser, how):
    algorithm = make(pairs_file, make_denoiser(), timestep_range=(0.2, 0.5), timestep_sampling=how)
    t = torch.cat([first_batch(algorithm, iteration).t for iteration in range(20)])
    total = algorithm.denoiser.schedule.num_timesteps
    assert int(t.min()) >= total // 2
    assert int(t.max()) < total * 4 // 5
    assert len(t.unique()) > 10
