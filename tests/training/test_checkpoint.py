from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.errors import CheckpointError, StorageError
from diffalign.training.checkpoint import Snapshot, list_checkpoints, read_checkpoint, write_checkpoint


def snapshot(value: float = 1.0) -> Snapshot:
    return Snapshot({"trainable": {"w": torch.full((3, 2), value)}}, {"iteration": 7, "nested": [1, "a"]})


def test_a_checkpoint_round_trips(tmp_path):
    path = write_checkpoint(tmp_path, 7, snapshot(2.5), keep_last=2)
    read = read_checkpoint(path)
    assert torch.equal(read.tensors["trainable"]["w"], torch.full((3, 2), 2.5))
    assert read.state == {"iteration": 7, "nested": [1, "a"]}


def test_only_the_newest_are_kept_and_order_is_numeric(tmp_path):
    for iteration in (2, 10, 9):
        write_checkpoint(tmp_path, iteration, snapshot(), keep_last=10)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-2", "step-9", "step-10"]
    write_checkpoint(tmp_path, 11, snapshot(), keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-10", "step-11"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = write_checkpoint(tmp_path, 1, snapshot(), keep_last=2)
    file = path / "trainable.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1  # safetensors itself would load this
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-4])
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"trainable\.safetensors|cannot read"):
        read_checkpoint(path)


def test_a_failed_write_leaves_older_checkpoints_and_no_half_one(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, snapshot(), keep_last=1)

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffalign.training.checkpoint.save_file", full_disk)
    with pytest.raises(StorageError, match="iteration 2"):
        write_checkpoint(tmp_path, 2, snapshot(), keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    read_checkpoint(tmp_path / "step-1")


def test_an_interrupted_write_is_not_listed(tmp_path):
    path = write_checkpoint(tmp_path, 1, snapshot(), keep_last=2)
    path.rename(tmp_path / ".step-2.partial")
    (tmp_path / "step-3").mkdir()  # no manifest
    assert list_checkpoints(tmp_path) == []


def test_state_that_is_not_finite_is_refused(tmp_path: Path):
    bad = Snapshot({}, {"x": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        write_checkpoint(tmp_path, 1, bad, keep_last=1)
