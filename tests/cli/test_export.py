"""`diffalign export`: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from export_runs import FinishedRun, difference
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.cli import main
from diffalign.training.checkpoint import Place, Snapshot, write_checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return FinishedRun(tmp_path_factory.mktemp("lora"), "sd")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return FinishedRun(tmp_path_factory.mktemp("full"), "sd", full=True)


def export(run: Path, form: str, *more: object) -> int:
    return main(["export", str(run), "--format", form, *map(str, more)])


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_kohya_file_lies_in_the_runs_folder_and_the_user_is_told_how_to_load_it(
    finished: FinishedRun, capsys: pytest.CaptureFixture[str]
):
    assert export(finished.path, "kohya", "--dtype", "float16") == 0
    file = finished.path / "export" / "run-lora.safetensors"
    said = capsys.readouterr().out
    assert said.startswith(str(file))
    for words in ("pipeline.load_lora_weights", "models/loras", "<lora:run-lora:1>"):
        assert words in said
    assert listing(file.parent) == [file.name]
    tensors = load_file(file)
    assert (
        tensors["lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"].dtype
        == torch.float16
    )
    assert tensors["lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"] == 5.0


def test_a_runs_final_is_the_run(finished: FinishedRun, tmp_path: Path):
    assert export(finished.path / "final", "diffusers", "--output", tmp_path / "out") == 0
    assert {"pytorch_lora_weights.safetensors", "export.json"} <= set(listing(tmp_path / "out"))
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.title"] == "run"


def test_a_checkpoint_is_exported_as_it_was_then(finished: FinishedRun, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run, ignore=shutil.ignore_patterns("export"))
    denoiser = finished.trainable()
    weights = {name: value + 1 for name, value in denoiser.trainable_parameters().items()}
    step = write_checkpoint(run / "checkpoints", Place(7), Snapshot({"trainable": weights}, {}))
    assert export(step, "kohya") == 0
    tensors = load_file(run / "export" / "run-step-7-lora.safetensors")
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default.weight"
    assert torch.equal(tensors[key], weights[name])


@pytest.mark.parametrize("form", ["diffusers", "single-file"])
def test_all_weights_of_a_full_run(full: FinishedRun, form: str, tmp_path: Path):
    path = tmp_path / ("out.safetensors" if form == "single-file" else "out")
    assert export(full.path, form, "--output", path) == 0
    if form == "single-file":
        pipeline = StableDiffusionPipeline.from_single_file(
            str(path), config=str(full.base), local_files_only=True
        )
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(path)
    assert difference(full.pictures, full.before) > 10
    assert difference(full.pictures_of(pipeline), full.pictures) < 2


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_a_full_run_has_no_lora(full: FinishedRun, form: str, capsys: pytest.CaptureFixture[str]):
    assert export(full.path, form) == 2
    said = capsys.readouterr().err
    assert "this run trained all weights" in said
    assert "--format single-file" in said


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert export(path, "kohya") == 2
        assert "is not a run" in capsys.readouterr().err


def test_a_run_without_a_result_names_its_newest_checkpoint(
    finished: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.yaml").write_text((finished.path / "config.yaml").read_text())
    assert export(tmp_path, "kohya") == 5
    assert "has no result yet" in capsys.readouterr().err
    write_checkpoint(tmp_path / "checkpoints", Place(3), Snapshot({}, {}))
    assert export(tmp_path, "kohya") == 5
    assert str(tmp_path / "checkpoints" / "step-3") in capsys.readouterr().err


def test_an_export_is_replaced_only_on_request_and_anything_else_never(
    finished: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file, folder = tmp_path / "out.safetensors", tmp_path / "out"
    save_file({"mine": torch.zeros(1)}, file)
    folder.mkdir()
    (folder / "mine").touch()
    places = (("kohya", file), ("peft", folder))
    for form, path in places:
        assert export(finished.path, form, "--output", path, "--overwrite") == 2
        assert "is no export" in capsys.readouterr().err
    save_file({"mine": torch.zeros(1)}, file, metadata={"diffalign.version": "0"})
    (folder / "export.json").touch()
    for form, path in places:
        assert export(finished.path, form, "--output", path) == 2
        assert "add --overwrite" in capsys.readouterr().err
    assert list(load_file(file)) == ["mine"]
    for form, path in places:
        assert export(finished.path, form, "--output", path, "--overwrite") == 0
    assert "mine" not in [*load_file(file), *listing(folder)]
    assert listing(tmp_path) == ["out", "out.safetensors"]


def test_a_file_is_named_safetensors(
    finished: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert export(finished.path, "kohya", "--output", tmp_path / "out.ckpt") == 2
    assert "out.ckpt is not named .safetensors" in capsys.readouterr().err


@pytest.fixture
def a_full_disk() -> Iterator[None]:
    """No file can be larger than 8 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("a_full_disk")
@pytest.mark.parametrize("form", ["kohya", "diffusers", "merged", "single-file"])
def test_a_full_disk_is_one_screen_and_the_earlier_export_stays(
    finished: FinishedRun, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / ("out.safetensors" if form in ("kohya", "single-file") else "out")
    if path.suffix:
        save_file({"mine": torch.zeros(1)}, path, metadata={"diffalign.version": "0"})
    else:
        path.mkdir()
        (path / "export.json").touch()
    assert export(finished.path, form, "--output", path, "--overwrite") == 8
    said = capsys.readouterr().err
    assert said.startswith("error: cannot write the export")
    assert str(path) in said
    assert "free some space" in said
    assert listing(tmp_path) == [path.name]
    assert listing(path) == ["export.json"] if path.is_dir() else list(load_file(path)) == ["mine"]


def test_a_weight_too_large_for_float16_leaves_nothing_behind(
    finished: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run, ignore=shutil.ignore_patterns("export"))
    file = run / "final" / "pytorch_lora_weights.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(1e5)  # float16 ends at 65504
    save_file(tensors, file, metadata=header)
    assert export(run, "kohya", "--dtype", "float16") == 4
    assert "use --dtype bfloat16" in capsys.readouterr().err
    assert listing(run / "export") == []
    assert export(run, "kohya", "--dtype", "bfloat16") == 0
