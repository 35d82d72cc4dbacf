from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from diffalign.losses.denoising import denoising, min_snr_weight, squared_error


def test_squared_error_is_a_mean_over_elements_for_each_sample():
    prediction = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    # (1 + 9) / 2 = 5 and 0
    assert_close(squared_error(prediction, torch.zeros(2, 1, 1, 2)), torch.tensor([5.0, 0.0]))


def test_weights_multiply_each_sample_and_are_not_renormalised():
    prediction = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    out = denoising(prediction, torch.zeros(2, 1, 1, 1), torch.tensor([2.0, 0.5]))
    assert_close(out.loss, torch.tensor((2 * 1 + 0.5 * 4) / 2))
    assert_close(out.metrics["error"], torch.tensor(2.5))  # unweighted


@pytest.mark.parametrize(
    ("kind", "expected"),
    # snr 1 and 20, gamma 5: min = 1, 5
    [("sample", [1.0, 5.0]), ("epsilon", [1.0, 0.25]), ("v_prediction", [0.5, 5 / 21])],
)
def test_min_snr_weights_by_hand(kind, expected):
    assert_close(min_snr_weight(torch.tensor([1.0, 20.0]), kind, gamma=5.0), torch.tensor(expected))


def test_min_snr_weight_is_finite_at_zero_snr():
    zero = torch.zeros(1)
    assert_close(min_snr_weight(zero, "epsilon", gamma=5.0), torch.ones(1))
    assert_close(min_snr_weight(zero, "v_prediction", gamma=5.0), zero)


def test_half_precision_inputs_are_subtracted_in_float32():
    a, b = torch.full((1, 1, 1, 1), 256.0).bfloat16(), torch.full((1, 1, 1, 1), 257.5)
    assert_close(squared_error(a, b), torch.tensor([2.25]))


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"prediction \(1, 2\), target \(2, 1\)"):
        squared_error(torch.zeros(1, 2), torch.zeros(2, 1))
