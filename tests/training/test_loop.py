from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffalign.algorithms.base import Meter
from diffalign.config import TrainingConfig
from diffalign.errors import NumericsError
from diffalign.losses.base import LossOutput
from diffalign.training.loop import Trainer, learning_rate_factor
from diffalign.training.processes import Processes


class Quadratic:
    uses_reference = False

    """Minimise (w - target)^2 in batches whose targets are a function of the iteration."""

    def __init__(self, weight: nn.Parameter, batches: int = 1) -> None:
        self.weight, self.batches = weight, batches

    def updates(self, iteration):
        yield [_Part(float(iteration + i), 1 / self.batches) for i in range(self.batches)]

    def loss(self, batch):
        return LossOutput((self.weight - batch.target).square().sum())

    def metrics(self):
        return {"seen": 1.0}

    def validate(self, iteration):
        return {"checked": float(iteration)} if iteration == 2 else {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class _Part:
    def __init__(self, target, weight):
        self.target, self.weight = target, weight


def make(batches: int = 1, algorithm=None, **options) -> Trainer:
    weight = nn.Parameter(torch.tensor([1.0]))
    config = TrainingConfig(
        **{"iterations": 4, "learning_rate": 0.1, "weight_decay": 0.0, "device": "cpu", **options}
    )
    algorithm = algorithm(weight) if algorithm else Quadratic(weight, batches)
    return Trainer(algorithm, {"w": weight}, config, Processes("cpu"), Meter())


def run(trainer: Trainer) -> list[dict[str, float]]:
    seen: list[dict[str, float]] = []
    trainer.run(lambda iteration, metrics: seen.append(metrics))
    return seen


def test_the_update_is_adamw_on_the_clipped_gradient():
    trainer = make(iterations=1, max_grad_norm=0.5)
    oracle = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.AdamW([oracle], lr=0.1, weight_decay=0.0)
    oracle.grad = torch.tensor([0.5])  # d/dw (w - 0)^2 = 2, clipped to norm 0.5
    optimizer.step()
    (metrics,) = run(trainer)
    assert_close(trainer.parameters["w"].data, oracle.data)
    assert_close(metrics["train/grad_norm"], 2.0)
    assert_close(metrics["train/loss"], 1.0)


def test_accumulated_batches_give_the_mean_gradient():
    trainer = make(batches=2, iterations=1, max_grad_norm=100.0)
    (metrics,) = run(trainer)
    # gradients 2 (1 - 0) and 2 (1 - 1), weights 1/2 each
    assert_close(metrics["train/grad_norm"], 1.0)


def test_iteration_metrics_and_validation_reach_the_caller():
    seen = run(make())
    assert [metrics.get("checked") for metrics in seen] == [None, 2.0, None, None]
    assert all(metrics["seen"] == 1.0 for metrics in seen)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_number_stops_before_the_weights_change(poison):
    class Poisoned(Quadratic):
        def loss(self, batch):
            if poison == "loss":
                return LossOutput(self.weight.sum() * torch.inf)
            return LossOutput((self.weight - 1).abs().sqrt().sum())  # infinite slope at w = 1

    trainer = make(algorithm=Poisoned)
    with pytest.raises(NumericsError, match=r"loss is|gradient of w is not finite"):
        run(trainer)
    assert_close(trainer.parameters["w"].data, torch.tensor([1.0]))


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_restored_trainer_continues_bit_for_bit(ema):
    straight = make(ema_decay=ema, lr_scheduler="cosine")
    run(straight)
    second = make(ema_decay=ema, lr_scheduler="cosine")
    again = make(ema_decay=ema, lr_scheduler="cosine")
    stop_at_two(second)
    again.restore(second.snapshot())
    run(again)
    assert torch.equal(again.parameters["w"], straight.parameters["w"])
    if ema is not None:
        assert torch.equal(again.ema.shadow_params[0], straight.ema.shadow_params[0])


def stop_at_two(trainer: Trainer) -> None:
    class Stop(Exception):
        pass

    def stop(iteration, metrics):
        if iteration == 2:
            raise Stop

    with pytest.raises(Stop):
        trainer.run(stop)


def test_the_average_is_used_inside_and_put_back_after():
    trainer = make(ema_decay=0.5)
    run(trainer)
    live = trainer.parameters["w"].detach().clone()
    with trainer.averaged_weights():
        assert not torch.equal(trainer.parameters["w"], live)
    assert torch.equal(trainer.parameters["w"], live)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.5]),
        ("cosine", [0.5, 1.0, 1.0, 0.5]),
    ],
)
def test_learning_rates_warm_up_and_decay(scheduler, expected):
    config = TrainingConfig(iterations=4, warmup_iterations=2, lr_scheduler=scheduler)
    assert_close([learning_rate_factor(config, i) for i in range(4)], expected)
