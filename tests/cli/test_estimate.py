from __future__ import annotations

import json

import pytest

from diffalign.cli import main
from diffalign.estimate.hardware import CARDS, UTILISATION

DPO = ["estimate", "tiny/dpo", "--algorithm.batch_size", "4"]
TIGHT = [
    "estimate",
    "tiny/dpo",
    "--algorithm.batch_size",
    "32",
    "--evaluation.batch_size",
    "4",
    "--memory",
    "700MiB",
]
"""A little more than this is needed; the CUDA context alone is 512 MiB."""


def printed(capsys, words: list[str]) -> dict:
    assert main([*words, "--json"]) in (0, 10)
    return json.loads(capsys.readouterr().out)


def test_it_prints_parts_phases_and_whether_it_fits(capsys):
    assert main([*DPO, "--gpu", "rtx4090"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("dpo of bundled:tiny-sd (StableDiffusion, 64 x 64 pixels, all weights, float32)")
    for line in (
        "unet: trained weights (float32)",
        "frozen reference",
        "total while training",
        "CUDA context",
    ):
        assert line in out
    assert "memory: 24.00 GiB (--gpu rtx4090): fits" in out
    assert "assuming 35% of 82.5 TFLOP/s (rtx4090, TF32, half of bf16)" in out


def test_the_parts_of_full_fine_tuning_follow_from_the_number_of_weights(capsys):
    parameters = 1_819_412  # of the bundled UNet
    found = printed(capsys, [*DPO, "--memory", "1GiB", "--training.ema_decay", "0.9"])
    sizes = {part["name"]: part["bytes"] for part in found["parts"]}
    assert sizes["unet: trained weights (float32)"] == 4 * parameters
    assert sizes["gradients (float32)"] == 4 * parameters
    assert sizes["optimizer (AdamW, two moments in float32)"] == 8 * parameters
    assert sizes["moving average (float32)"] == 4 * parameters
    assert sizes["frozen reference"] == 4 * parameters
    assert found["peak_bytes"] == max(found["phases"].values())
    assert found["fits"] is True
    always = sum(part["bytes"] for part in found["parts"] if not part["phases"])
    inside = sum(part["bytes"] for part in found["parts"] if "training" in part["phases"])
    assert found["phases"]["training"] == always + inside


def test_what_the_figures_leave_out_is_said(capsys):
    found = printed(
        capsys,
        [*DPO, "--memory", "1GiB", "--data.buckets", "[[64, 64], [48, 80]]"],
    )
    assert found["not_counted"] == ["the sizes of data.buckets: every picture as one of model.resolution"]


def test_time_is_arithmetic_over_a_rate_that_is_said(capsys):
    found = printed(capsys, [*DPO, "--tflops", "2"])
    assert found["seconds_per_iteration"] == pytest.approx(found["flops_per_iteration"] / 2e12)
    assert found["seconds_from"].endswith("at 2 TFLOP/s, as given")
    found = printed(capsys, [*DPO, "--gpu", "a100-80gb", "--training.mixed_precision", "bf16"])
    rate = CARDS["a100-80gb"].tflops * UTILISATION * 1e12
    assert found["seconds_per_iteration"] == pytest.approx(found["flops_per_iteration"] / rate)


def test_without_a_rate_there_is_no_time(capsys):
    found = printed(capsys, [*DPO, "--memory", "1GiB"])
    assert found["seconds_per_iteration"] is None
    assert "give --measure, --tflops or --gpu" in found["seconds_from"]


def test_what_does_not_fit_is_told_what_helps_and_ends_with_code_10(capsys):
    assert main(TIGHT) == 10
    captured = capsys.readouterr()
    assert captured.err.startswith("error: the run needs ")
    assert captured.err.count("\n") < 6
    assert "does not fit" in captured.out
    assert "--training.gradient_checkpointing true\n" in captured.out
    assert "about a third more time per update" in captured.out


@pytest.mark.slow
def test_the_savings_are_differences_between_estimates(capsys):
    found = printed(capsys, TIGHT)
    peak = found["peak_bytes"]
    for change in found["changes"]:
        assert change["saves"] == peak - change["peak"] > 0
        peak = change["peak"]
    first = found["changes"][0]
    again = printed(capsys, [*TIGHT, *first["options"].split(), "--memory", "1GiB"])
    assert again["peak_bytes"] == first["peak"]


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--memory", "lots"], 2, "error: --memory: 'lots' is no amount of memory"),
        (["--gpu", "voodoo2"], 2, "error: --gpu: voodoo2 is not in the table"),
        (["--tflops", "0"], 2, "error: --tflops must be above 0"),
        (["--gpu", "l4", "--training.device", "cpu"], 2, "error: --gpu: the run computes on the CPU"),
        (["--model.path", "./nothing"], 5, "error: ./nothing does not exist"),
        (["--model.resolution", "63"], 2, "error: model.resolution: 63 is not a multiple of"),
    ],
)
def test_wrong_input_is_one_screen(capsys, words, code, expected):
    assert main([*DPO, *words]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(expected)
    assert "Traceback" not in captured.err


@pytest.mark.slow
def test_measuring_takes_two_real_iterations(capsys):
    found = printed(capsys, [*DPO, "--measure", "--training.device", "cpu"])
    assert found["seconds_from"].startswith("measured, the second of two iterations on")
    assert found["seconds_per_iteration"] == found["measured"]["seconds"] > 0
    assert found["measured"]["peak"] > 0
