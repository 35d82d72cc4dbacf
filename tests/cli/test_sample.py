"""`diffalign sample`: a folder that the other commands read, complete or not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.cli import main
from diffalign.cli.sample import PROMPT_FILES, read_prompts
from diffalign.config import RUNS, ImagesConfig, SamplerConfig
from diffalign.data.images import CaptionedImages
from diffalign.data.prompts import _READERS
from diffalign.errors import DataError
from diffalign.images import to_pil
from diffalign.models.loading import load_for_inference
from diffalign.sampling import generate
from diffalign.training.run import align

QUICK = ["--steps", "2", "--guidance-scale", "2", "--device", "cpu"]
WRONG = ["--batch-size", "0", "--steps", "0", "--eta", "2"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("# two prompts\na red star\n\nein grüner Bär\n", encoding="utf-8")
    return file


def sample(model: Path | str, prompts: Path | str, output_dir: Path, *more: str) -> int:
    words = ["--model", str(model), "--prompts", str(prompts), "--output-dir", str(output_dir)]
    return main(["sample", *words, *QUICK, *more])


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_prompt_and_seed_has_a_picture_and_a_line(
    tiny_pipeline_dir: Path, prompts: Path, tmp_path: Path
):
    out = tmp_path / "out"
    assert sample(tiny_pipeline_dir, prompts, out, "--seeds-per-prompt", "2", "--seed", "5") == 0
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"file_name": "00000-s5.png", "prompt": "a red star", "seed": 5},
        {"file_name": "00000-s6.png", "prompt": "a red star", "seed": 6},
        {"file_name": "00001-s7.png", "prompt": "ein grüner Bär", "seed": 7},
        {"file_name": "00001-s8.png", "prompt": "ein grüner Bär", "seed": 8},
    ]
    assert listing(out) == sorted([line["file_name"] for line in lines] + ["metadata.jsonl"])
    assert pixels(out / "00000-s5.png").shape == (16, 16, 3)
    assert listing(tmp_path) == ["out", "prompts.txt"]


def test_height_comes_first_in_a_size(tiny_pipeline_dir: Path, prompts: Path, tmp_path: Path):
    assert sample(tiny_pipeline_dir, prompts, tmp_path / "out", "--resolution", "24x16", "--limit", "1") == 0
    assert pixels(tmp_path / "out" / "00000-s0.png").shape == (24, 16, 3)


def test_a_picture_is_generate_of_its_prompt_and_seed(tiny_pipeline_dir: Path, prompts: Path, tmp_path: Path):
    assert sample(tiny_pipeline_dir, prompts, tmp_path / "out", "--batch-size", "1") == 0
    denoiser = load_for_inference(str(tiny_pipeline_dir), device="cpu")
    sampler = SamplerConfig(steps=2, eta=0.0, guidance_scale=2.0)
    (expected,) = to_pil(generate(denoiser, ["ein grüner Bär"], [1], sampler, batch_size=1))
    assert (pixels(tmp_path / "out" / "00001-s1.png") == np.asarray(expected)).all()


def test_a_checkpoint_of_a_run_draws_what_its_policy_drew_then(tiny_pipeline_dir: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a red star\n")
    config = RUNS["ddpo"].model_validate(
        {
            "model": {"path": str(tiny_pipeline_dir), "lora": None},
            "algorithm": {"name": "ddpo", "prompts_per_iteration": 1, "group_size": 2, "train_batch_size": 2},
            "data": {"path": str(tmp_path / "prompts.txt")},
            "sampler": {"steps": 2, "guidance_scale": 1.0},
            "rewards": [{"name": "jpeg_compressibility"}],
            "training": {"iterations": 2, "device": "cpu", "learning_rate": 0.01, "checkpoint_every": 1},
        }
    )
    align(config, tmp_path / "run")
    drawn = {}
    for name in ("", "checkpoints/step-1", "checkpoints/step-2"):
        out = tmp_path / f"out-{name.replace('/', '-')}"
        assert sample(tmp_path / "run" / name, "a red star", out) == 0
        drawn[name] = pixels(out / "00000-s0.png").astype(int)
    assert np.abs(drawn["checkpoints/step-2"] - drawn[""]).max() <= 1
    assert np.abs(drawn["checkpoints/step-1"] - drawn[""]).max() > 4


def test_the_batch_size_changes_no_picture(tiny_pipeline_dir: Path, prompts: Path, tmp_path: Path):
    for size in ("1", "3"):
        sample(tiny_pipeline_dir, prompts, tmp_path / size, "--seeds-per-prompt", "2", "--batch-size", size)
    for name in ("00000-s0.png", "00000-s1.png", "00001-s2.png", "00001-s3.png"):
        difference = pixels(tmp_path / "1" / name).astype(int) - pixels(tmp_path / "3" / name)
        assert abs(difference).max() <= 1  # rounding of sums of other shapes may move a pixel by one step


def test_sft_training_reads_the_folder(tiny_pipeline_dir: Path, prompts: Path, tmp_path: Path):
    sample(tiny_pipeline_dir, prompts, tmp_path / "out")
    images = CaptionedImages(ImagesConfig(path=str(tmp_path / "out")))
    assert [images.caption(i) for i in range(len(images))] == ["a red star", "ein grüner Bär"]
    assert torch.equal(
        images.load(0, 16).mul(255).round().permute(1, 2, 0).to(torch.uint8),
        torch.from_numpy(pixels(tmp_path / "out" / "00000-s0.png").copy()),
    )


def test_the_prompt_itself_can_be_given(tiny_pipeline_dir: Path, tmp_path: Path):
    assert sample(tiny_pipeline_dir, "a star, alone", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "metadata.jsonl").read_text())["prompt"] == "a star, alone"


def test_limit_takes_the_first_prompts(tiny_pipeline_dir: Path, prompts: Path, tmp_path: Path):
    assert sample(tiny_pipeline_dir, prompts, tmp_path / "out", "--limit", "1") == 0
    assert listing(tmp_path / "out") == ["00000-s0.png", "metadata.jsonl"]


def test_a_misspelt_file_does_not_become_the_prompt():
    with pytest.raises(DataError):
        read_prompts("promts.txt", None)
    with pytest.raises(DataError):
        read_prompts("  ", None)


def test_the_endings_of_prompt_files_are_those_that_can_be_read():
    assert set(PROMPT_FILES) == {*_READERS, ".parquet"}


def test_an_occupied_folder_is_refused_and_kept(
    tiny_pipeline_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert sample(tiny_pipeline_dir, prompts, out) == 2
    assert "is not empty" in capsys.readouterr().err
    assert listing(out) == ["mine.txt"]


@pytest.mark.parametrize(
    ("model", "more", "code", "message"),
    [
        ("/no/such/model", [], 5, "/no/such/model does not exist"),
        ("tiny", ["--prompts", "missing.txt"], 3, "missing.txt"),
        ("tiny", WRONG, 2, "--steps should be greater than 0; got 0"),
        ("tiny", WRONG, 2, "--batch-size must be at least 1; got 0"),
        ("tiny", ["--resolution", "-8"], 2, "of at least 1; got -8"),
    ],
)
def test_bad_input_is_one_screen_and_leaves_nothing(
    tiny_pipeline_dir: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    more: list[str],
    code: int,
    message: str,
):
    path = tiny_pipeline_dir if model == "tiny" else model
    assert sample(path, prompts, tmp_path / "out", *more) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert listing(tmp_path) == ["prompts.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(tiny_pipeline_dir: Path, prompts: Path, tmp_path: Path):
    assert sample(tiny_pipeline_dir, prompts, tmp_path / "out", "--device", "cuda") == 7
    assert listing(tmp_path) == ["prompts.txt"]
