from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from diffalign.algorithms.base import Meter
from diffalign.config import TrainingConfig
from diffalign.errors import DeviceError
from diffalign.losses.base import LossOutput
from diffalign.training.checkpoint import Place, read_checkpoint, write_checkpoint
from diffalign.training.loop import Trainer
from diffalign.training.processes import Processes


class TowardsAShape:
    """Minimise (w - target)^2 over two weights, the larger of which 8 bits are for."""

    uses_reference = False

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters

    def updates(self, iteration):
        yield [_Part(1.0)]

    def loss(self, batch):
        target = torch.linspace(-1.0, 1.0, 4096).view(2, 2, 32, 32)
        large = (self.parameters["large"] - target).square().sum()
        return LossOutput(large + self.parameters["small"].square().sum())

    def metrics(self):
        return {}

    def validate(self, iteration):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class _Part:
    def __init__(self, weight):
        self.weight = weight


def make(iterations: int, optimizer: str = "adamw8bit") -> Trainer:
    torch.manual_seed(0)
    large = torch.randn(2, 2, 32, 32).to(memory_format=torch.channels_last)
    parameters = {"large": nn.Parameter(large), "small": nn.Parameter(torch.ones(8))}
    config = TrainingConfig(
        iterations=iterations, learning_rate=0.01, device="cpu", optimizer=optimizer, max_grad_norm=1e3
    )
    return Trainer(TowardsAShape(parameters), parameters, config, Processes("cpu"), Meter())


def run(trainer: Trainer) -> Trainer:
    trainer.run(lambda iteration, metrics: None)
    return trainer


def test_moments_in_8_bits_follow_adamw_at_a_quarter_of_their_size_and_resume_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    straight, exact = run(make(6)), run(make(6, "adamw"))
    moved = exact.parameters["large"].detach() - make(1).parameters["large"].detach()
    difference = straight.parameters["large"] - exact.parameters["large"]
    assert difference.norm() < 0.05 * moved.norm()

    state = straight.optimizer.state[straight.parameters["large"]]
    assert {state["state1"].dtype, state["state2"].dtype} == {torch.uint8}

    half = run(make(3))
    snapshot, _ = read_checkpoint(write_checkpoint(tmp_path, Place(3), half.snapshot()))
    resumed = make(6)
    resumed.restore(snapshot)
    run(resumed)
    for name, parameter in straight.parameters.items():
        assert torch.equal(resumed.parameters[name], parameter)


def test_without_bitsandbytes_adamw8bit_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DeviceError, match=r"training\.optimizer: adamw8bit needs bitsandbytes") as caught:
        make(1)
    assert "pip install 'diffalign[quantization]'" in caught.value.render()
