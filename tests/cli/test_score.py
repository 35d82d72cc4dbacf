"""`diffalign score`."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import tyro
from PIL import Image

from diffalign.cli import main
from diffalign.cli.score import Args, run
from diffalign.errors import ConfigError, DataError, DeviceError, DiffalignError, RewardError, StorageError
from diffalign.images import open_image
from diffalign.rewards import load_reward

NAMES = ["a.png", "b.jpg", "sub/c.png"]
MINE = """
def length(images, prompts): return [len(prompt) for prompt in prompts]
def brightness(images, prompts): return images.mean(dim=(1, 2, 3))
brightness.needs_prompt = False
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three noisy pictures of different sizes."""
    root = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for i, name in enumerate(NAMES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16 + 8 * i, 20, 3), np.uint8)).save(path)
    return root


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def call(*arguments: object) -> None:
    run(tyro.cli(Args, args=[str(argument) for argument in arguments]))


def command(*arguments: object) -> int:
    return main(["score", *map(str, arguments)])


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_table_has_a_row_for_every_reward(folder: Path, capsys: pytest.CaptureFixture[str]):
    call(folder, "--rewards", "jpeg_compressibility,jpeg_incompressibility")
    out = capsys.readouterr().out
    sizes = load_reward("jpeg_incompressibility")([open_image(folder / n, n) for n in NAMES], [""] * 3)
    row = next(line for line in out.splitlines() if "jpeg_incompressibility" in line)
    for number in (sizes.mean(), sizes.std(), sizes.min(), sizes.max()):
        assert f"{number.item():.4g}" in row
    highest, lowest = NAMES[int(sizes.argmax())], NAMES[int(sizes.argmin())]
    assert f"jpeg_incompressibility: highest {highest}; lowest {lowest}\n" in out
    assert "3 pictures in" in out


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_output_has_one_row_a_picture(folder: Path, tmp_path: Path, suffix: str):
    output = tmp_path / f"scores{suffix}"
    output.write_text("older")
    call(folder, "--rewards", "jpeg_compressibility", "--output", output)
    rows = lines(output) if suffix == ".jsonl" else pq.read_table(output).to_pylist()
    assert list(rows[0]) == ["file", "prompt", "jpeg_compressibility", "skipped"]
    assert [row["file"] for row in rows] == NAMES
    assert [row["prompt"] for row in rows] == [row["skipped"] for row in rows] == [None] * 3
    expected = load_reward("jpeg_compressibility")([open_image(folder / n, n) for n in NAMES], [""] * 3)
    torch.testing.assert_close(torch.tensor([row["jpeg_compressibility"] for row in rows]), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", output.name]


@pytest.mark.parametrize("source", ["file", "metadata", "sidecars", "jsonl", "parquet"])
def test_prompts_come_from_each_source(folder: Path, tmp_path: Path, mine: str, source: str):
    prompts = ["one", "three", "seventeen"]
    pictures: list[object] = [folder]
    if source == "file":
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        pictures += ["--prompts", tmp_path / "prompts.txt"]
    elif source == "metadata":
        rows = [{"file_name": n, "text": p} for n, p in zip(NAMES, prompts, strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in reversed(rows)))
    elif source == "sidecars":
        for name, prompt in zip(NAMES, prompts, strict=True):
            (folder / name).with_suffix(".txt").write_text(prompt)
    elif source == "jsonl":
        rows = [{"image": n, "prompt": p} for n, p in zip(NAMES, prompts, strict=True)]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        pictures = [folder / "rows.jsonl"]
    else:
        images = [{"bytes": (folder / name).read_bytes(), "path": name} for name in NAMES]
        pq.write_table(pa.table({"image": images, "prompt": prompts}), tmp_path / "rows.parquet")
        pictures = [tmp_path / "rows.parquet"]
    call(*pictures, "--rewards", f"{mine}:length,{mine}:brightness", "--output", tmp_path / "out.jsonl")
    rows = lines(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows] == prompts
    assert [row[f"{mine}:length"] for row in rows] == [3, 5, 9]
    assert all(0.4 < row[f"{mine}:brightness"] < 0.6 for row in rows)
    if source != "parquet":
        assert [row["file"] for row in rows] == NAMES


def test_options_reach_their_reward(folder: Path):
    with pytest.raises(RewardError, match="the aesthetic head does not exist") as error:
        call(folder, "--rewards", "aesthetic", "--options", "aesthetic.head=/no/such.safetensors")
    assert "/no/such.safetensors" in str(error.value)


def test_a_prompt_of_ten_thousand_characters_is_scored(folder: Path, tmp_path: Path):
    (tmp_path / "long.txt").write_text("\n".join(["a red star " * 1000, "a red star", "x" * 10_000]))
    options = ["--options", "clip.checkpoint=bundled:clip", "--prompts", tmp_path / "long.txt"]
    assert command(folder, "--rewards", "clip", *options, "--output", tmp_path / "o.parquet") == 0
    rows = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert [len(row["prompt"]) for row in rows] == [10_999, 10, 10_000]
    assert all(-1 <= row["clip"] <= 1 for row in rows)


def failure(kind: type[DiffalignError], match: str, *arguments: object) -> str:
    with pytest.raises(kind, match=match) as error:
        call(*arguments)
    return str(error.value)


def test_bad_input_is_named(folder: Path, tmp_path: Path, mine: str):
    jpeg = ["--rewards", "jpeg_compressibility"]
    failure(DataError, "no such file or folder", tmp_path / "absent", *jpeg)
    failure(DataError, "no file matches the pattern", tmp_path / "*.webp", *jpeg)
    (tmp_path / "empty").mkdir()
    failure(DataError, "no pictures in this folder", tmp_path / "empty", *jpeg)
    failure(RewardError, "did you mean jpeg_compressibility", folder, "--rewards", "jpeg_compresibility")
    failure(RewardError, "names no reward", folder, "--rewards", ",")
    failure(RewardError, "does not understand clip.x=1", folder, *jpeg, "--options", "clip.x=1")
    failure(RewardError, "x is not an option", folder, *jpeg, "--options", "jpeg_compressibility.x=1")
    failure(StorageError, "cannot write --output", folder, *jpeg, "--output", tmp_path / "no" / "out.jsonl")
    failure(StorageError, "is a folder", folder, *jpeg, "--output", tmp_path)
    failure(ConfigError, "must end in .parquet or .jsonl; got a.csv", folder, *jpeg, "--output", "a.csv")
    failure(ConfigError, "--sheet must end in .html", folder, *jpeg, "--sheet", tmp_path / "sheet")
    failure(ConfigError, "at least 1; got 0", folder, *jpeg, "--sheet-pictures", 0)
    failure(ConfigError, "pictures or --pairs", *jpeg)
    failure(ConfigError, "pictures or --pairs", folder, *jpeg, "--pairs", "pairs.jsonl")
    failure(ConfigError, "does not go with", *jpeg, "--pairs", "pairs.jsonl", "--prompts", "p.txt")
    failure(DataError, "without a caption|caption", folder, "--rewards", f"{mine}:length")
    (tmp_path / "two.txt").write_text("one\ntwo")
    failure(DataError, "2 prompts but 3 pictures", folder, *jpeg, "--prompts", tmp_path / "two.txt")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"url": "a.png"}')
    failure(DataError, r"no column any of image, [^$]*found: url", rows, *jpeg)
    failure(ConfigError, "would overwrite what is to be scored", rows, *jpeg, "--output", rows)
    if not torch.cuda.is_available():
        failure(DeviceError, "no GPU", folder, *jpeg, "--device", "cuda")


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def hostile_folder(root: Path) -> dict[str, float | None]:
    """Pictures of every awkward kind, and the brightness of each; None: cannot be read."""
    grey = Image.new("L", (40, 40), 51)  # 0.2
    turned = Image.Exif()
    turned[0x0112] = 6
    half = encode(Image.effect_noise((64, 64), 50), "PNG")
    palette = Image.new("P", (4, 4))  # transparent where it is not painted: white
    files: dict[str, tuple[bytes, float | None]] = {
        "animated.gif": (
            encode(grey, "GIF", save_all=True, append_images=[Image.new("L", (40, 40), 255)]),
            0.2,
        ),
        "bomb.bmp": (
            b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 30_000, 30_000, 1, 24, *[0] * 6),
            None,
        ),
        "cmyk.jpg": (encode(grey.convert("RGB").convert("CMYK"), "JPEG", quality=100), 0.2),
        "deep.png": (encode(Image.fromarray(np.full((4, 4), 51 * 257, np.uint16)), "PNG"), 0.2),
        "empty.png": (b"", None),
        "palette.png": (encode(palette, "PNG", transparency=0), 1.0),
        "truncated.png": (half[: len(half) // 2], None),
        "turned.jpg": (encode(grey, "JPEG", exif=turned), 0.2),
    }
    root.mkdir()
    for name, (data, _) in files.items():
        (root / name).write_bytes(data)
    return {name: brightness for name, (_, brightness) in files.items()}


def test_hostile_pictures_are_scored_or_skipped_with_their_reason(
    tmp_path: Path, mine: str, capsys: pytest.CaptureFixture[str]
):
    expected = hostile_folder(tmp_path / "hostile")
    output = tmp_path / "out.jsonl"
    assert command(tmp_path / "hostile", "--rewards", f"{mine}:brightness", "--output", output) == 0
    rows = {row["file"]: row for row in lines(output)}
    assert list(rows) == list(expected)
    for name, brightness in expected.items():
        assert rows[name][f"{mine}:brightness"] == (brightness and pytest.approx(brightness, abs=0.01)), name
        assert (rows[name]["skipped"] is None) == (brightness is not None), name
    assert "picture too large" in str(rows["bomb.bmp"]["skipped"])
    shown = capsys.readouterr()
    assert "5 of 8 pictures in" in shown.out
    assert "skipped 3 of 8 pictures:\n  bomb.bmp: picture too large: more pixels" in shown.err
    assert "  empty.png: unreadable picture: it is empty\n" in shown.err


def test_more_skipped_pictures_than_fit_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]):
    for i in range(12):
        (folder / f"x{i:02}.png").write_bytes(b"")
    assert command(folder, "--rewards", "jpeg_compressibility") == 0
    shown = capsys.readouterr().err
    assert "skipped 12 of 15 pictures:" in shown
    assert "x09.png" in shown
    assert "x10.png" not in shown
    assert "... and 2 more" in shown


def test_a_set_without_one_readable_picture_fails_and_an_older_result_survives(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out.jsonl"
    output.write_text("older\n")
    for name in NAMES:
        (folder / name).write_bytes(b"")
    assert command(folder, "--rewards", "jpeg_compressibility", "--output", output) == 3
    shown = capsys.readouterr().err
    assert "none of the 3 pictures can be read" in shown
    assert "b.jpg: unreadable picture: it is empty" in shown
    assert output.read_text() == "older\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "pictures"]


def test_the_sheet_shows_every_reward(folder: Path, tmp_path: Path, mine: str):
    (tmp_path / "prompts.txt").write_text("a <b>\nb\nc")
    sheet = tmp_path / "sheet.html"
    call(
        folder,
        *("--rewards", f"jpeg_compressibility,{mine}:length", "--prompts", tmp_path / "prompts.txt"),
        *("--sheet", sheet, "--sheet-pictures", 1),
    )
    page = sheet.read_text()
    assert "a &lt;b&gt;" in page
    assert "jpeg_compressibility: the best 1 of 3" in page
    assert "length: the worst 1 of 3" in page
    assert page.count("data:image/jpeg;base64,") == 4
