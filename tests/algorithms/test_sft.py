from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffalign.algorithms.base import Context
from diffalign.algorithms.sft import SFT
from diffalign.config import ImagesConfig, SFTConfig
from diffalign.data.images import CaptionedImages
from diffalign.losses.denoising import squared_error


@pytest.fixture
def images(tmp_path):
    for i in range(5):
        Image.new("RGB", (16, 16), (50 * i, 100, 200)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    return CaptionedImages(ImagesConfig(path=str(tmp_path)))


def make(images, denoiser, context=None, cache_latents=True, **options):
    config = SFTConfig(**{"batch_size": 4, **options})
    return SFT(config, denoiser, images, context or Context(seed=3), cache_latents=cache_latents)


def test_a_batch_is_a_function_of_seed_and_step_only(images, make_denoiser):
    denoiser = make_denoiser()
    one = [list(make(images, denoiser).updates(n)) for n in range(3)][2][0][0]
    two = next(iter(make(images, denoiser).updates(2)))[0]
    assert torch.equal(one.x0, two.x0)
    assert torch.equal(one.noise, two.noise)
    assert torch.equal(one.t, two.t)
    assert one.captions == two.captions


def test_ranks_draw_their_own_pictures_and_noise(images, make_denoiser):
    denoiser = make_denoiser()
    batches = [
        next(iter(make(images, denoiser, Context(seed=3, rank=rank, world=2), batch_size=2).updates(0)))[0]
        for rank in range(2)
    ]
    assert not torch.equal(batches[0].x0, batches[1].x0)
    assert not torch.equal(batches[0].noise, batches[1].noise)


def test_accumulated_batches_weigh_one_together(images, make_denoiser):
    (update,) = make(images, make_denoiser(), gradient_accumulation=3).updates(0)
    assert_close(sum(batch.weight for batch in update), 1.0)
    assert not torch.equal(update[0].noise, update[1].noise)


def test_cached_and_fresh_latents_are_the_same(images, make_denoiser):
    denoiser = make_denoiser()
    cached = next(iter(make(images, denoiser).updates(1)))[0]
    fresh = next(iter(make(images, denoiser, cache_latents=False).updates(1)))[0]
    assert_close(cached.x0, fresh.x0, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_noise_prediction_error(images, make_denoiser):
    denoiser = make_denoiser()
    algorithm = make(images, denoiser)
    batch = next(iter(algorithm.updates(0)))[0]
    alpha, sigma = denoiser.schedule.alpha_sigma(batch.t, batch.x0)
    x = alpha * batch.x0 + sigma * batch.noise
    prediction = denoiser.predict(x, batch.t, denoiser.encode_prompts(batch.captions))
    assert_close(algorithm.loss(batch).loss, squared_error(prediction, batch.noise).mean())


def test_min_snr_weighs_the_loss(images, make_denoiser):
    denoiser = make_denoiser()
    plain, weighted = make(images, denoiser), make(images, denoiser, min_snr_gamma=5.0)
    batch = next(iter(plain.updates(0)))[0]
    snr = denoiser.schedule.snr(batch.t)
    with torch.no_grad():
        x = denoiser.schedule.add_noise(batch.x0, batch.noise, batch.t)
        error = squared_error(
            denoiser.predict(x, batch.t, denoiser.encode_prompts(batch.captions)), batch.noise
        )
    assert_close(weighted.loss(batch).loss.detach(), (snr.clamp_max(5.0) / snr * error).mean())


def test_caption_dropout_drops_about_its_share(images, make_denoiser):
    algorithm = make(images, make_denoiser(), caption_dropout=0.5, batch_size=50)
    captions = next(iter(algorithm.updates(0)))[0].captions
    assert 10 <= captions.count("") <= 40
    none = make(images, make_denoiser(), caption_dropout=0.0, batch_size=50)
    assert "" not in next(iter(none.updates(0)))[0].captions


def test_noise_offset_shifts_whole_channels(images, make_denoiser):
    denoiser = make_denoiser()
    plain = next(iter(make(images, denoiser).updates(0)))[0].noise
    offset = next(iter(make(images, denoiser, noise_offset=0.5).updates(0)))[0].noise
    shift = offset - plain
    assert float(shift.abs().max()) > 0.05
    assert_close(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6, rtol=0)
