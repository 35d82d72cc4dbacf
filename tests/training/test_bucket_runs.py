"""SFT and DPO on pictures of three shapes: in buckets, stopped and resumed, by one process and by two."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from families import load, one_step, tiny_sdxl
from PIL import Image
from safetensors.torch import load_file
from together import together

from diffalign.algorithms import kto, preference, sft
from diffalign.algorithms.base import Context
from diffalign.config import RUNS, Run
from diffalign.config_file import dump_config, load_config
from diffalign.errors import ConfigError
from diffalign.training.changes import check_changes
from diffalign.training.run import align

SIZES = [[16, 16], [24, 16], [16, 24]]
SHAPES = [(40, 40), (60, 40), (32, 48)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten captioned and labelled pictures of three shapes, and nine pairs, of one shape or of two."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    for i in range(10):
        height, width = SHAPES[i % 3]
        picture = Image.effect_noise((width, height), 20 + 8 * i).convert("RGB")
        picture.save(folder / "pictures" / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "text": f"picture {i}", "label": i % 2 == 0} for i in range(10)]
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = [
        {"prompt": f"prompt {i}", "chosen": f"pictures/{i}.png", "rejected": f"pictures/{(i * 2) % 10}.png"}
        for i in range(1, 10)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def make(data: Path, model: Path, name: str, **changes: object) -> Run:
    path = "pairs.jsonl" if name == "dpo" else "pictures"
    algorithm: dict[str, object] = {"name": name, "batch_size": 2, "gradient_accumulation": 2}
    config: dict[str, object] = {
        "model": {"path": str(model), "lora": {"rank": 2}},
        "algorithm": algorithm,
        "data": {"path": str(data / path), "buckets": SIZES},
        "training": {"iterations": 4, "checkpoint_every": 2, "device": "cpu", "learning_rate": 1e-3},
    }
    if name == "dpo":
        algorithm |= {"validation_every": 2, "validation_timesteps": 2}
        config["data"]["validation_fraction"] = 0.3
    return RUNS[name].model_validate({**config, **changes})


def without_time(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_resumed_run_equals_an_uninterrupted_one(data, tiny_pipeline_dir, tmp_path, name, capsys):
    config = make(data, tiny_pipeline_dir, name)
    straight, run = tmp_path / "straight", tmp_path / "cut"
    counts = align(config, straight)["counts"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "of 3 sizes (height x width): " in shown
    assert counts["captions"] == (10 if name == "sft" else 0)  # 16 of them are drawn
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints" / "step-4")
    shutil.rmtree(run / "final")
    (run / "summary.json").unlink()
    assert align(config, run, resume="must")["counts"] == counts
    assert without_time(run) == without_time(straight)
    file = "final/pytorch_lora_weights.safetensors"
    resumed, expected = load_file(run / file), load_file(straight / file)
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    if name == "dpo":
        assert without_time(run)[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)


def batches(module, config: Run, denoiser, context: Context, iterations: int) -> list:
    data = module.open_data(config, None)
    algorithm = module.build(config, data, denoiser, None, context)
    return [batch for step in range(iterations) for batch in next(iter(algorithm.updates(step)))]


@pytest.mark.parametrize(("module", "name"), [(sft, "sft"), (preference, "dpo"), (kto, "kto")])
def test_two_processes_see_the_batches_of_one(data, tiny_pipeline_dir, make_denoiser, module, name):
    denoiser = make_denoiser()
    alone = batches(module, make(data, tiny_pipeline_dir, name), denoiser, Context(seed=3), 3)
    config = make(data, tiny_pipeline_dir, name)
    half = config.model_copy(
        update={"algorithm": config.algorithm.model_copy(update={"gradient_accumulation": 1})}
    )
    shared = together(2, lambda context: batches(module, half, denoiser, context, 3), seed=3)
    latents = "x0_w" if name == "dpo" else "x0"
    for number, batch in enumerate(alone):
        other = shared[number % 2][number // 2]
        for field in (latents, "noise", "t", "sizes"):
            assert torch.equal(getattr(other, field), getattr(batch, field))
    shapes = {tuple(getattr(batch, latents).shape[2:]) for batch in alone}
    assert shapes == {(8, 8), (12, 8), (8, 12)}


def test_the_length_of_a_batch_of_one_size_stays_at_a_resume():
    def written(buckets: object, size: int) -> str:
        algorithm = {"name": "sft", "batch_size": size, "gradient_accumulation": 4 // size}
        return dump_config(
            RUNS["sft"].model_validate({"algorithm": algorithm, "data": {"path": "p", "buckets": buckets}})
        )

    def changed(buckets: object) -> list[str]:
        return check_changes(written(buckets, 2), written(buckets, 4), processes=(1, 1), allow=False)

    assert "changed: algorithm.batch_size from 2 to 4" in changed(None)
    with pytest.raises(ConfigError, match="not the one that the run was started with") as caught:
        changed([[16, 16]])
    assert "algorithm.batch_size: 4" in caught.value.why


@pytest.mark.parametrize("cached", [True, False])
def test_both_pictures_of_a_pair_have_the_size_of_the_preferred_one(
    data, tiny_pipeline_dir, make_denoiser, cached
):
    config = make(data, tiny_pipeline_dir, "dpo")
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"cache_latents": cached, "validation_fraction": 0.0})}
    )
    denoiser = make_denoiser()
    pairs = preference.open_data(config, None).train
    for batch in batches(preference, config, denoiser, Context(seed=3), 3):
        assert batch.x0_w.shape == batch.x0_l.shape == batch.noise.shape
        for place, index in enumerate(batch.indices):
            size = pairs.buckets.size(index)
            winner, loser = pairs.load(index, size)
            expected = denoiser.encode_images(torch.stack([winner, loser])).detach()
            assert torch.allclose(batch.x0_w[place], expected[0], atol=1e-5)
            assert torch.allclose(batch.x0_l[place], expected[1], atol=1e-5)
            told = pairs.buckets.told(index)
            assert torch.equal(batch.sizes[[place, place + len(batch.indices)]], told)


@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_sdxl_trains_on_buckets_and_is_told_what_each_picture_was(data, tmp_path, name):
    folder = tmp_path / "sdxl"
    tiny_sdxl().save_pretrained(folder)
    denoiser, told = load(folder), []
    forward = denoiser._forward
    denoiser._forward = lambda x, t, given: (told.append((x, given.extra["sizes"])), forward(x, t, given))[1]
    config = make(data, folder, name, training={"iterations": 1, "device": "cpu", "learning_rate": 1e-3})
    if name == "dpo":
        silent = config.algorithm.model_copy(update={"validation_every": 0})
        config = config.model_copy(update={"algorithm": silent})
    _, metrics = one_step(config, denoiser)
    if name == "dpo":
        assert abs(metrics["train/loss"] - math.log(2)) < 1e-6
    for x, sizes in told:
        assert sizes.shape == (len(x), 6)
        for height, width, top, left, *target in sizes.tolist():
            assert (height, width) in SHAPES
            assert target == [2 * x.shape[2], 2 * x.shape[3]]
            scale = max(target[0] / height, target[1] / width)
            assert top == pytest.approx((height * scale - target[0]) / 2, abs=1)
            assert left == pytest.approx((width * scale - target[1]) / 2, abs=1)


def test_buckets_that_the_model_cannot_take_are_named(data, tiny_pipeline_dir, make_denoiser):
    config = make(data, tiny_pipeline_dir, "sft")
    odd = config.data.model_copy(update={"buckets": [(16, 16), (25, 16)]})
    with pytest.raises(ConfigError, match=r"data.buckets: 25 x 16 is not a multiple of 2"):
        batches(sft, config.model_copy(update={"data": odd}), make_denoiser(), Context(), 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("algorithm: {name: ddpo}\ndata: {path: x, buckets: auto}", "data.buckets is not an option of ddpo"),
        (
            "algorithm: {name: sft}\ndata: {path: x, buckets: auto}",
            "makes sizes of the area of model.resolution",
        ),
        (
            "algorithm: {name: dpo}\ndata: {path: x, buckets: auto}",
            "makes sizes of the area of model.resolution",
        ),
        (
            "algorithm: {name: kto}\ndata: {path: x, buckets: auto}",
            "makes sizes of the area of model.resolution",
        ),
        (
            "algorithm: {name: sft}\ndata: {path: x, buckets: [[8, 0]]}",
            "data.buckets is wrong: it is auto, or a",
        ),
        (
            "algorithm: {name: sft}\ndata: {path: x, buckets: wide}",
            "data.buckets is wrong: it is auto, or a list",
        ),
        (
            "algorithm: {name: sft}\ndata: {path: x, buckets: []}",
            "data.buckets is wrong: it is auto, or a list",
        ),
        ("algorithm: {name: dpo}\ndata: {path: x, buckets: [[8, 8], [8, 8]]}", "a size is listed twice"),
        (
            "algorithm: {name: sft}\ndata: {path: x}\nmodel: {resolution: [8, 8, 8]}",
            "model.resolution is wrong",
        ),
        ("algorithm: {name: sft}\ndata: {path: x}\nmodel: {resolution: yes}", "model.resolution is wrong"),
        (
            "algorithm: {name: sft, prior: {path: y}}\ndata: {path: x, buckets: [[8, 8]]}",
            "data.buckets: a batch has one size",
        ),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert message in caught.value.render()
    assert f"{file}:" in caught.value.render()
