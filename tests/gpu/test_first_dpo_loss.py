"""A preference run starts at ln 2: policy and reference agree bit for bit in every precision and mode."""

from __future__ import annotations

import json
import math

import pytest
import torch

from diffalign.algorithms.base import Context
from diffalign.algorithms.preference import DPO
from diffalign.config import DPOConfig, PairsConfig
from diffalign.data.preferences import PreferencePairs
from diffalign.images import to_pil

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]

PAIRS = 4
COMPILERS_OWN_WARNINGS = pytest.mark.filterwarnings("default")
MODES = [
    "eager",
    "checkpointing",
    pytest.param("compile", marks=COMPILERS_OWN_WARNINGS),
    pytest.param("compile+checkpointing", marks=COMPILERS_OWN_WARNINGS),
]


@pytest.fixture
def pairs(tmp_path) -> PreferencePairs:
    pictures = torch.rand(2 * PAIRS, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for i, picture in enumerate(to_pil(pictures)):
        picture.save(tmp_path / f"{i}.png")
    rows = [
        {"prompt": f"prompt {i}", "chosen": f"{2 * i}.png", "rejected": f"{2 * i + 1}.png"}
        for i in range(PAIRS)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = PairsConfig(path=str(tmp_path / "pairs.jsonl"), validation_fraction=0.0)
    return PreferencePairs(config, "drop")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("mode", MODES)
def test_the_first_loss_is_ln_2(make_cuda_denoiser, pairs, precision, full, mode):
    """beta = 5000 makes this sharp: errors that differ by 1e-9 move the loss by more than 1e-6."""
    denoiser = make_cuda_denoiser(precision, full=full, mode=mode)
    algorithm = DPO(DPOConfig(batch_size=PAIRS), denoiser, pairs, Context(device=denoiser.device))
    ((batch,),) = algorithm.updates(0)
    loss = algorithm.loss(batch).loss
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach()) - math.log(2)) < 1e-6
    loss.backward()
    gradients = [p.grad for p in denoiser.trainable_parameters().values()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients)
