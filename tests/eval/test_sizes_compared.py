"""Comparisons of pictures that are not square."""

from __future__ import annotations

import pytest
from diffalign_eval.generate import Drawing, describe, inspect, require_one_resolution
from diffalign_eval.store import picture_key

from diffalign.config import SamplerConfig
from diffalign.errors import CheckpointError

SAMPLER = SamplerConfig(steps=2, eta=0.0, guidance_scale=2.0)


def test_pictures_of_different_sizes_are_not_compared(tiny_pipeline_dir):
    square = inspect("square", str(tiny_pipeline_dir), Drawing(SAMPLER))
    tall = inspect("tall", str(tiny_pipeline_dir), Drawing(SAMPLER, resolution=(24, 16)))
    require_one_resolution([tall, tall])
    with pytest.raises(CheckpointError, match="different sizes") as caught:
        require_one_resolution([square, tall])
    assert caught.value.why == "square: 16 x 16 pixels, tall: 24 x 16 pixels"
    assert square.key != tall.key
    assert describe(square, Drawing(SAMPLER))["resolution"] == 16
    assert describe(tall, Drawing(SAMPLER))["resolution"] == [24, 16]


def test_square_pictures_lie_where_they_always_did(tiny_pipeline_dir):
    """In stores of earlier comparisons the side of a square is a number."""
    square = inspect("square", str(tiny_pipeline_dir), Drawing(SAMPLER))
    assert square.key == picture_key(square.fingerprint, SAMPLER.model_dump(), 16, "no")
