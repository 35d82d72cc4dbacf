from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffalign.estimate.counting import Counter, stored_bytes, weights_of
from diffalign.estimate.kernels import Autocast, Kernels, recompute_in


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_result_counts_until_nothing_refers_to_it(device):
    x, w = torch.ones(2, 4, device=device), torch.ones(4, 8, device=device)
    with torch.no_grad(), Counter([x, w]) as counter:
        y = x @ w  # 2 * 8 floats: 64 bytes
        assert counter.now == 64
        z = y.relu()
        view = z[0]  # no memory of its own
        assert counter.now == 128
        del y
        assert counter.now == 64
        del z
        assert counter.now == 64  # the view keeps it
        del view
    assert counter.now == 0
    assert counter.peak == 128
    assert counter.flops == 2 * 2 * 4 * 8


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_the_backward_pass_needs_counts_until_then(device):
    x = torch.ones(8, device=device)
    w = torch.ones(8, device=device, requires_grad=True)
    with Counter([x, w]) as counter:
        loss = (x * w).exp().sum()  # exp keeps its result (32 bytes); its input is not needed
        assert counter.now == 32 + 4
        loss.backward()
        assert w.grad is not None
        del loss
    assert counter.now == 32  # the gradient


def test_the_second_of_equal_operations_is_counted_as_the_first():
    x, w = torch.ones(2, 4, device="meta"), torch.ones(4, 8, device="meta")
    with torch.no_grad(), Counter([x, w]) as counter:
        first, second = x @ w, x @ w
    assert first.shape == second.shape
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
    assert counter.peak == 2 * 64
    assert counter.flops == 2 * 2 * 2 * 4 * 8


def test_tied_weights_are_stored_once():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    assert stored_bytes(weights_of(first, second)) == 36


def test_attention_keeps_no_scores():
    q = torch.ones(1, 1, 512, 8, device="meta", requires_grad=True)
    with Kernels(), Counter([q]) as counter:
        out = F.scaled_dot_product_attention(q, q, q)
    assert out.shape == q.shape
    assert counter.peak < 512 * 512 * 4 / 8  # the scores alone are 1 MiB
    assert counter.now >= 512 * 8 * 4 + 512 * 4  # the output, and a number for each row


class Block(nn.Module):
    """As transformers have them: a norm, two linear layers, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def kept(device: str, context, frozen: bool) -> tuple[int, int]:
    """Bytes that two blocks keep for the backward pass, and the peak until its end."""
    torch.manual_seed(0)
    network = nn.Sequential(Block(), Block()).to(device).requires_grad_(not frozen)
    x = torch.ones(32, 16, 64, device=device, requires_grad=True)
    with Counter([*weights_of(network), x]) as counter:
        with context:
            out = network(x)
        loss = out.float().sum()
        after = counter.now
        loss.backward()
    return after, counter.peak


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_autocast_on_the_meta_device_keeps_what_pytorchs_own_keeps_on_the_cpu(frozen):
    real = kept("cpu", torch.autocast("cpu", torch.bfloat16), frozen)
    with Kernels():
        found = kept("meta", Autocast("cpu", torch.bfloat16), frozen)
    assert found[0] == pytest.approx(real[0], rel=0.03)
    assert found[1] == pytest.approx(real[1], rel=0.03)


def test_autocast_of_a_gpu_normalises_in_float32():
    norm = nn.LayerNorm(8).to("meta")
    x = torch.ones(2, 8, device="meta", dtype=torch.bfloat16)
    with Kernels():
        with Autocast("cuda", torch.bfloat16):
            assert norm(x).dtype == torch.float32
            assert nn.Linear(8, 8, device="meta")(norm(x)).dtype == torch.bfloat16
        with Autocast("cpu", torch.bfloat16):
            assert norm(x).dtype == torch.bfloat16


def test_a_recomputed_block_keeps_its_input_only():
    block = Block().to("meta")
    x = torch.ones(32, 16, 64, device="meta", requires_grad=True)
    call = recompute_in("cuda", torch.bfloat16)
    with Kernels(), Counter([*weights_of(block), x]) as counter:
        with Autocast("cuda", torch.bfloat16):
            out = call(block, x)
        assert counter.now == stored_bytes([out])
        out.float().sum().backward()
    assert block.up.weight.grad is not None
