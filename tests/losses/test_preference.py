from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from diffalign.losses.preference import diffusion_dpo

ERR_W, ERR_L = torch.tensor([0.3, 0.7]), torch.tensor([0.5, 0.1])


def test_dpo_at_the_reference_is_ln_2_and_pushes_the_pair_apart():
    err_w, err_l = ERR_W.clone().requires_grad_(), ERR_L.clone().requires_grad_()
    out = diffusion_dpo(err_w, err_l, ERR_W, ERR_L, beta=2.0)
    assert_close(out.loss, torch.tensor(math.log(2)))  # sigmoid(0) = 1/2
    out.loss.backward()  # beta/2 * (1 - sigmoid(0)) / B = 1/4
    assert_close(err_w.grad, torch.full((2,), 0.25))
    assert_close(err_l.grad, torch.full((2,), -0.25))


def test_dpo_by_hand():
    # m = (0.2 - 0.3) - (0.6 - 0.5) = -0.2; -beta/2 m = 1; loss = log(1 + e^-1)
    one = torch.ones(1)
    out = diffusion_dpo(0.2 * one, 0.6 * one, 0.3 * one, 0.5 * one, beta=10.0)
    assert_close(out.loss, torch.tensor(math.log1p(math.exp(-1))))
    assert_close(out.metrics["accuracy"], torch.tensor(1.0))
    assert_close(out.metrics["margin"], torch.tensor(0.2))
    assert_close(out.metrics["winner_drift"], torch.tensor(-0.1))
    assert_close(out.metrics["loser_drift"], torch.tensor(0.1))


def test_the_logarithm_is_inside_the_batch_mean():
    zero = torch.zeros(2)
    out = diffusion_dpo(torch.tensor([-1.0, 1.0]), zero, zero, zero, beta=2.0)
    # logits 1 and -1, whose mean would give ln 2
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2
    assert_close(out.loss, torch.tensor(expected))


def test_a_soft_label_mixes_both_directions():
    one = torch.ones(1)
    # logit 1, p = 0.75: 0.75 log(1 + e^-1) + 0.25 log(1 + e)
    out = diffusion_dpo(0.2 * one, 0.6 * one, 0.3 * one, 0.5 * one, beta=10.0, probability=0.75 * one)
    expected = 0.75 * math.log1p(math.exp(-1)) + 0.25 * math.log1p(math.exp(1))
    assert_close(out.loss, torch.tensor(expected))


def test_a_tie_has_no_gradient_at_the_reference():
    err_w = ERR_W.clone().requires_grad_()
    out = diffusion_dpo(err_w, ERR_L, ERR_W, ERR_L, beta=2.0, probability=torch.full((2,), 0.5))
    out.loss.backward()
    assert_close(err_w.grad, torch.zeros(2))


def test_beta_in_mean_units_is_the_papers_divided_by_the_number_of_elements():
    elements, beta_sum = 16, 3.0
    w, lose, rw, rl = (torch.rand(4) for _ in range(4))
    sums = [elements * e for e in (w, lose, rw, rl)]
    # the paper's loss on summed errors with beta_sum equals ours on means with elements * beta_sum
    assert_close(
        diffusion_dpo(*sums, beta=beta_sum).loss,
        diffusion_dpo(w, lose, rw, rl, beta=elements * beta_sum).loss,
    )


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        diffusion_dpo(ERR_W, ERR_L[:1], ERR_W, ERR_L, beta=1.0)
