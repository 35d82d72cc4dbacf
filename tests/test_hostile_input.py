"""Files that nobody meant well: the answer is data or a DiffalignError, soon, and nothing is written.

The short version of each test runs a few dozen cases; the long ones (`pytest -m slow tests/test_hostile_input.py`)
10,000 in all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from diffalign.config import ImagesConfig, PairsConfig
from diffalign.config_file import dump_config, load_config
from diffalign.data.images import CaptionedImages
from diffalign.data.preferences import PreferencePairs
from diffalign.data.prompts import load_prompts
from diffalign.errors import CheckpointError, DiffalignError
from diffalign.images import FORMATS, open_image
from diffalign.layout import LORA_FILE
from diffalign.models.loading import load_for_inference
from diffalign.rewards import load_reward
from diffalign.scoring.sources import open_pictures
from diffalign.training.checkpoint import (
    MANIFEST,
    Place,
    Snapshot,
    _manifest,
    read_checkpoint,
    write_checkpoint,
)

SECONDS = 10
"""A case that takes longer hangs."""
WATCHED = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree"}
WATCHED |= {"os.system", "subprocess.Popen", "socket.connect", "os.exec", "os.truncate", "os.chmod"}


class _Guard:
    """Sees every file that is opened for writing, and every process or connection that is started (PEP 578)."""

    def __init__(self) -> None:
        self.active = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active or event not in WATCHED:
            return
        if event == "open" and not _writes(arguments[1], arguments[2]):
            return
        self.seen.append(f"{event} {arguments[0]!r}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.seen.clear()
        self.active = True
        try:
            yield
        finally:
            self.active = False
        assert self.seen == []


def _writes(mode: object, flags: object) -> bool:
    if isinstance(mode, str):
        return any(sign in mode for sign in "wax+")
    return isinstance(flags, int) and flags & 3 != 0


GUARD = _Guard()


@contextmanager
def _deadline() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"a case took more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def fuzz(
    cases: int, strategy: st.SearchStrategy[Any], prepare: Callable[[Any], Callable[[], object]]
) -> None:
    """Runs what `prepare` makes of each of `cases` drawn values; anything but a result or a DiffalignError fails."""
    refused = 0

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value: Any) -> None:
        nonlocal refused
        target = prepare(value)
        try:
            with _deadline(), GUARD.watching():
                target()
        except DiffalignError as error:
            refused += 1
            error.render()

    run()
    assert refused, "no case was refused: the cases are too tame to say anything"


def versions(short: int, long: int) -> Any:
    """The same test with few cases, and with many (slow)."""
    return pytest.mark.parametrize(
        "cases", [pytest.param(short, id="short"), pytest.param(long, id="long", marks=pytest.mark.slow)]
    )


# --- what hostile files are made of --------------------------------------------------------------------------

NASTY = st.sampled_from(
    [
        "../x.png",
        "/etc/passwd",
        "a\0b",
        "x" * 5000,
        "\ud800",
        "${HOME}",
        "~root",
        "%s%n",
        "",
        " ",
        "-1",
        "1e999",
        "nan",
        "!!python/object/apply:os.system [id]",
        "*a",
        "&a [*a]",
        "<<: *x",
        "file.py:f",
        "9" * 5000,
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    NASTY,
    st.integers(2**60, 2**70),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged(draw: Any, seeds: st.SearchStrategy[bytes]) -> bytes:
    """A good file with some bytes changed, put in, taken out, doubled or cut off."""
    data = bytearray(draw(seeds))
    for _ in range(draw(st.integers(1, 6))):
        # Headers are where the interesting bytes are: half of the changes go to the first 64.
        end = min(len(data), 64) if draw(st.booleans()) else len(data)
        at = draw(st.integers(0, max(0, end)))
        match draw(st.sampled_from(["set", "flip", "insert", "delete", "double", "cut"])):
            case "set":
                data[at : at + 4] = draw(st.binary(min_size=1, max_size=8))
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                data[at:at] = draw(st.binary(max_size=32))
            case "delete":
                del data[at : at + draw(st.integers(1, 32))]
            case "double":
                data[at:at] = data[at : at + 64]
            case "cut":
                del data[at:]
    return bytes(data)


# --- run files -----------------------------------------------------------------------------------------------

SHIPPED = ["tiny/sft", "tiny/dpo", "tiny/ddpo", "sd15/dpo"]
TREES = {name: yaml.safe_load(dump_config(load_config(name))) for name in SHIPPED}


def places(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [prefix, *(place for name, value in inside for place in places(value, (*prefix, name)))]


PLACES = {name: places(tree) for name, tree in TREES.items()}


@st.composite
def run_files(draw: Any) -> bytes:
    """A shipped run file with values, keys or bytes replaced."""
    name = draw(st.sampled_from(SHIPPED))
    tree = json.loads(json.dumps(TREES[name]))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(PLACES[name]))
        holder = tree
        for part in place[:-1]:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if place and isinstance(holder, dict):
            holder[draw(st.sampled_from([place[-1], str(draw(SCALARS))]))] = draw(VALUES)
    text = yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    return draw(damaged(st.just(text))) if draw(st.booleans()) else text


@versions(25, 2500)
def test_a_run_file_is_a_run_or_one_screen(cases, tmp_path):
    file = tmp_path / "run.yaml"

    def prepare(data: bytes) -> Callable[[], object]:
        file.write_bytes(data)
        return lambda: dump_config(load_config(file))

    fuzz(cases, run_files(), prepare)


@versions(30, 1000)
def test_an_override_is_taken_or_one_screen(cases):
    names = st.sampled_from([".".join(map(str, place)) for place in PLACES["tiny/ddpo"][1:]]) | st.text(
        max_size=12
    )
    tokens = st.lists(
        st.builds("--{}={}".format, names, st.text(max_size=20) | NASTY), min_size=1, max_size=3
    )
    fuzz(cases, tokens, lambda words: lambda: load_config("tiny/ddpo", words))


# --- lists of pictures, pairs and prompts --------------------------------------------------------------------

KEYS = [
    "file_name",
    "text",
    "caption",
    "prompt",
    "image",
    "chosen",
    "rejected",
    "jpg_0",
    "jpg_1",
    "label_0",
    "x",
]
NAMES = st.sampled_from(
    ["good.png", "bad.png", "empty.png", "missing.png", "sub", "link.png", "pipe.png", "loop"]
)
ROWS = st.dictionaries(st.sampled_from(KEYS), NAMES | NAMES | SCALARS, max_size=7)
LINES = st.lists(ROWS.map(json.dumps) | VALUES.map(json.dumps) | st.text(max_size=30) | NASTY, max_size=4)
TEXTS = LINES.map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))


def picture(format: str = "PNG", size: tuple[int, int] = (5, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Beside the data set: a picture that is not its own. In it: a good one, bad ones, and things that are none."""
    (tmp_path / "private.png").write_bytes(picture())
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    (folder / "good.png").write_bytes(picture())
    (folder / "bad.png").write_bytes(picture()[:60])
    (folder / "empty.png").touch()
    (folder / "linked").symlink_to("../private.png")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe.png")
    return folder


def read_captioned(folder: Path) -> None:
    pictures = CaptionedImages(ImagesConfig(path=str(folder)))
    for index in range(len(pictures)):
        pictures.load(index, 4)


def read_pairs(file: Path) -> None:
    pairs = PreferencePairs(PairsConfig(path=str(file), validation_fraction=0.0), "soft").train
    for index in range(len(pairs)):
        pairs.load(index, 4)


def read_scored(file: Path) -> None:
    pictures = open_pictures([str(file)])
    pictures.prompts(False)
    for index in range(len(pictures.files)):
        pictures.stamp(index)
        source = pictures.source(index)
        if isinstance(source, Path):
            source.is_relative_to(file.parent)
        open_image(source, "a row")


@versions(60, 2000)
def test_metadata_and_pairs_are_read_or_refused(cases, folder):
    def prepare(data: bytes) -> Callable[[], object]:
        for name in ("metadata.jsonl", "rows.jsonl"):
            (folder / name).write_bytes(data)
        readers = [
            lambda: read_captioned(folder),
            lambda: read_pairs(folder / "rows.jsonl"),
            lambda: read_scored(folder / "rows.jsonl"),
        ]
        return readers[len(data) % 3]

    fuzz(cases, TEXTS | damaged(TEXTS.filter(bool)), prepare)


@versions(30, 1000)
def test_prompt_files_are_read_or_refused(cases, tmp_path):
    columns = st.lists(
        st.text(max_size=8) | st.sampled_from(["prompt", "text", '"', ",", "\t", "\0"]), max_size=6
    )
    tables = st.lists(columns.map(",".join), max_size=5).map(
        lambda rows: "\n".join(rows).encode("utf-8", "replace")
    )
    endings = st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"])

    def prepare(case: tuple[str, bytes]) -> Callable[[], object]:
        file = tmp_path / f"prompts{case[0]}"
        file.write_bytes(case[1])
        return lambda: load_prompts(str(file))

    fuzz(cases, st.tuples(endings, TEXTS | tables | st.binary(max_size=60)), prepare)


# --- pictures, alone and in Parquet --------------------------------------------------------------------------

PICTURES = st.sampled_from(
    [picture(format, size) for format in FORMATS for size in ((5, 4), (1, 1), (40, 30))]
)


@versions(50, 2000)
def test_a_damaged_picture_is_opened_or_refused(cases):
    def prepare(data: bytes) -> Callable[[], object]:
        return lambda: open_image(data, "a picture")

    fuzz(cases, damaged(PICTURES), prepare)


@versions(15, 500)
def test_a_damaged_picture_in_parquet_is_opened_or_refused(cases, tmp_path):
    cells = st.lists(st.none() | st.binary(max_size=8) | damaged(PICTURES), min_size=1, max_size=3)

    def prepare(data: list[bytes | None]) -> Callable[[], object]:
        table = pa.table({"image": pa.array(data, pa.binary()), "text": ["x"] * len(data)})
        pq.write_table(table, tmp_path / "set.parquet")
        return lambda: read_captioned(tmp_path / "set.parquet")

    fuzz(cases, cells, prepare)


# --- safetensors ---------------------------------------------------------------------------------------------

GOOD = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.float16)}
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "", "x"])
        | SCALARS,
        "shape": st.lists(st.integers(0, 4) | st.integers(-1, 2**66), max_size=3) | SCALARS,
        "data_offsets": st.lists(st.integers(0, 40) | st.integers(-1, 2**66), max_size=3) | SCALARS,
    }
)


def safetensors_file(header: object, body: bytes, length: int | None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


WEIGHTS = st.one_of(
    damaged(st.just(save(GOOD))),
    st.builds(
        safetensors_file,
        st.dictionaries(
            st.sampled_from(["a", "b", "__metadata__", "", "a::b"]), ENTRIES | VALUES, max_size=3
        ),
        st.binary(max_size=40),
        st.none() | st.integers(0, 2**64 - 1),
    ),
)


@versions(40, 500)
def test_reward_weights_are_read_or_refused(cases, tmp_path):
    from diffalign_rewards.weights import read_tensors

    def prepare(data: bytes) -> Callable[[], object]:
        (tmp_path / "weights.safetensors").write_bytes(data)
        return lambda: read_tensors(tmp_path / "weights.safetensors")

    fuzz(cases, WEIGHTS, prepare)


@versions(30, 500)
def test_a_checkpoint_is_read_or_refused_even_where_its_hashes_are_right(cases, tmp_path):
    folder = write_checkpoint(tmp_path, Place(1), Snapshot({"trainable": GOOD}, {"iteration": 1}))
    states = st.sampled_from([b"{}", b"[1]", b"", b"\xff", b"[" * 5000, b"1" * 5000])
    listings = (
        st.none() | VALUES | st.dictionaries(st.sampled_from(["../x", "/dev/zero", "state.json"]), VALUES)
    )

    def prepare(case: tuple[bytes, bytes, object]) -> Callable[[], object]:
        weights, state, listing = case
        files = {"trainable.safetensors": weights, "state.json": state}
        for name, data in files.items():
            (folder / name).write_bytes(data)
        hashes = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        }
        (folder / MANIFEST).write_text(_manifest(hashes if listing is None else listing))
        return lambda: read_checkpoint(folder, rank=0)

    fuzz(cases, st.tuples(WEIGHTS, states, listings), prepare)


# --- one case of a kind --------------------------------------------------------------------------------------


def test_a_damaged_adapter_is_refused_and_no_pickle_is_tried_in_its_place(tiny_pipeline_dir, tmp_path):
    final = tmp_path / "final"
    final.mkdir()
    config = {"algorithm": {"name": "sft"}, "data": {"path": "x"}, "model": {"path": str(tiny_pipeline_dir)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (final / LORA_FILE).write_bytes(save(GOOD)[:40])
    torch.save({"a": torch.ones(1)}, final / "pytorch_lora_weights.bin")
    with pytest.raises(CheckpointError, match="LoRA weights cannot be read"):
        load_for_inference(str(tmp_path))


def test_a_checkpoint_cannot_name_the_modules_it_is_made_of(tiny_pipeline_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_pipeline_dir, copy)
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"] = ["antigravity", "DDIMScheduler"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"the scheduler of .* comes from a library"):
        load_for_inference(str(copy))
    assert "antigravity" not in sys.modules


def test_a_reward_comes_from_an_installed_package_or_a_file_that_the_user_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sneaky.py").write_text("raise SystemError('ran')\n")
    with pytest.raises(DiffalignError, match="no reward named sneaky"):
        load_reward("sneaky")
    assert "sneaky" not in sys.modules


def test_the_guard_sees_a_file_that_is_written(tmp_path):
    with pytest.raises(AssertionError), GUARD.watching():
        (tmp_path / "x").write_text("x")
    with pytest.raises(AssertionError), GUARD.watching():
        (tmp_path / "y").mkdir()
