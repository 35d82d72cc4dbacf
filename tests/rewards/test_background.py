"""Scoring beside sampling: the same numbers, in order, and failures that surface."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.testing import assert_close

from diffalign.config import RewardConfig
from diffalign.errors import RewardError
from diffalign.rewards import BackgroundScorer, RewardMixture

CPU = torch.device("cpu")


class Gate:
    """A reward that waits for permission, fails on demand and says in which thread it ran."""

    def __init__(self) -> None:
        self.open, self.threads = threading.Event(), set()

    def __call__(self, images, prompts):
        assert self.open.wait(10)
        self.threads.add(threading.current_thread())
        assert not torch.is_grad_enabled()
        if "bad" in prompts:
            raise ValueError("no such picture")
        return images.mean((1, 2, 3))


@pytest.fixture
def gate(monkeypatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr("diffalign.rewards.background.gate", gate, raising=False)
    return gate


@pytest.fixture
def mixture(gate) -> RewardMixture:
    return RewardMixture([RewardConfig(name="diffalign.rewards.background:gate", label="gate")])


def batch(value: float) -> torch.Tensor:
    return torch.full((2, 3, 4, 4), value)


def test_scores_come_back_in_the_order_of_submission(mixture, gate):
    gate.open.set()
    with BackgroundScorer(mixture, CPU) as scorer:
        for value in (0.25, 0.5, 0.75):
            scorer.submit(batch(value), ["a", "b"])
        totals = torch.cat([scores.total for scores in scorer.results()])
    assert_close(totals, torch.tensor([0.25, 0.25, 0.5, 0.5, 0.75, 0.75]))
    assert len(gate.threads) == 1


def test_submitting_does_not_wait_for_the_scores(mixture, gate):
    with BackgroundScorer(mixture, CPU) as scorer:
        scorer.submit(batch(0.5), ["a", "b"])  # would hang here: the gate is closed
        assert not gate.threads
        gate.open.set()
        assert len(scorer.results()) == 1
    assert threading.main_thread() not in gate.threads


def test_a_failure_is_raised_where_the_scores_are_read(mixture, gate):
    gate.open.set()
    with BackgroundScorer(mixture, CPU) as scorer:
        scorer.submit(batch(0.5), ["a", "bad"])
        with pytest.raises(RewardError, match="failed"):
            scorer.results()


def test_a_failure_ends_the_sampling_at_its_next_batch(mixture, gate):
    gate.open.set()
    with BackgroundScorer(mixture, CPU) as scorer:
        scorer.submit(batch(0.5), ["a", "bad"])
        scorer._futures[0].exception(timeout=10)
        with pytest.raises(RewardError, match="failed"):
            scorer.submit(batch(0.5), ["a", "b"])
