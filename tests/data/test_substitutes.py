from __future__ import annotations

import pytest

from diffalign.data.substitutes import Substitutes
from diffalign.errors import DataError


def reader(bad: set[int], cause: Exception | None = None):
    def load(index: int) -> str:
        if index in bad:
            raise DataError("unreadable picture", where=f"{index}.png") from cause
        return f"picture {index}"

    return load


def test_another_item_stands_in_and_it_is_always_the_same():
    said: list[str] = []
    first, second = (Substitutes(reader({7}), 1000, seed=3, say=said.append) for _ in range(2))
    assert first.load(5) == "picture 5"
    other = first.load(7)
    assert other == second.load(7) == first.load(7) == f"picture {first.index(7)}" != "picture 7"
    assert first.index(5) == 5
    assert first.unreadable == 1
    assert len(said) == 2  # once for each reader, not for each use
    assert "1 of 1000" in said[0]


def test_only_those_it_may_be_exchanged_with_stand_in():
    items = Substitutes(reader({7}), 1000, 3, lambda text: None, among=lambda index: [6, 7, 8])
    assert items.load(7) in ("picture 6", "picture 8")
    alone = Substitutes(reader({7}), 1000, 3, lambda text: None, among=lambda index: [7])
    with pytest.raises(DataError, match=r"unreadable picture(?s:.)*7.png"):
        alone.load(7)


def test_the_substitute_depends_on_the_seed():
    chosen = set()
    for seed in range(5):
        items = Substitutes(reader({7}), 1000, seed, say=lambda text: None)
        items.load(7)
        chosen.add(items.index(7))
    assert len(chosen) > 1


def test_more_than_one_in_a_thousand_ends_the_run_and_lists_them():
    items = Substitutes(reader({1, 2, 3}), 2000, seed=0, say=lambda text: None)
    items.load(1)
    items.load(2)
    with pytest.raises(DataError, match="3 of 2000 pictures cannot be read") as caught:
        items.load(3)
    assert "1.png" in caught.value.where
    assert caught.value.exit_code == 3


def test_in_a_small_set_the_first_one_ends_the_run_with_its_own_words():
    with pytest.raises(DataError, match="unreadable picture"):
        Substitutes(reader({1}), 999, seed=0).load(1)


def test_a_picture_whose_storage_was_away_is_read_again(monkeypatch):
    monkeypatch.setattr("diffalign.data.substitutes.PAUSES", (0.0, 0.0))
    bad, calls = {4}, []

    def load(index: int) -> str:
        calls.append(index)
        if len(calls) > 1:
            bad.clear()
        return reader(bad, OSError(116, "Stale file handle"))(index)

    items = Substitutes(load, 10, seed=0)
    assert items.load(4) == "picture 4"
    assert items.unreadable == 0
