"""Where pairs are trained on, and what is measured there."""

from __future__ import annotations

import pytest
import torch

from diffalign.algorithms.pairs import TimestepBins, draw_timesteps
from diffalign.config.preference import DPOConfig
from diffalign.seeding import generator

TOTAL = 1000


def drawn(how: str, positions: list[int], update: int = 8) -> list[int]:
    draws = [generator(3, "dpo", position) for position in positions]
    return draw_timesteps(how, draws, positions, update, TOTAL, 3).tolist()


def test_every_update_has_one_pair_in_each_part_of_the_schedule():
    for update in range(5):
        t = drawn("stratified", list(range(8 * update, 8 * update + 8)))
        assert sorted(8 * value // TOTAL for value in t) == list(range(8))
    assert drawn("stratified", list(range(8))) != drawn("stratified", list(range(8, 16)))


def test_antithetic_timesteps_are_mirror_images():
    t = drawn("antithetic", list(range(10)))
    assert [a + b for a, b in zip(t[::2], t[1::2], strict=True)] == [TOTAL - 1] * 5
    assert len(set(t)) > 5


@pytest.mark.parametrize("how", ["uniform", "stratified", "antithetic"])
def test_a_timestep_depends_on_its_position_only(how):
    whole = drawn(how, list(range(8)))
    assert [drawn(how, [position])[0] for position in range(8)] == whole
    assert drawn(how, [4, 5, 6, 7]) == whole[4:]  # the second of two processes


@pytest.mark.parametrize("how", ["uniform", "stratified", "antithetic"])
def test_all_timesteps_are_as_likely(how):
    t = torch.tensor(drawn(how, list(range(4000))))
    assert 0 <= int(t.min()) < 10
    assert TOTAL - 10 <= int(t.max()) < TOTAL
    # uniform on 0..999: mean 499.5, standard deviation 288.7 (stratified and antithetic means spread less)
    assert abs(float(t.double().mean()) - 499.5) < 4 * 288.7 / 4000**0.5


@pytest.mark.parametrize(
    ("part", "timesteps"),
    [
        ((0.0, 1.0), range(1000)),
        ((0.0, 0.75), range(250, 1000)),  # 0 is the noise: the least noisy quarter is left out
        ((0.5, 0.6), range(400, 500)),
        ((0.9999, 1.0), range(1)),
    ],
)
def test_a_range_counts_from_the_noise(part, timesteps):
    assert DPOConfig(timestep_range=part).trained_timesteps(1000) == timesteps


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="the first must be below the second"):
        DPOConfig(timestep_range=(0.5, 0.5))


def test_an_update_larger_than_the_schedule_is_spread_over_it():
    t = drawn("stratified", list(range(2048)), update=2048)
    counts = torch.tensor(t).bincount(minlength=TOTAL)
    assert int(counts.min()) >= 1  # a timestep is 2.048 strata wide
    assert int(counts.max()) <= 4


def test_figures_by_timestep_are_means_over_samples_not_over_batches():
    bins = TimestepBins(("drift", "accuracy"))
    bins.begin(0)
    bins.add(torch.tensor([0, 10, 999]), TOTAL, torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 0.0, 1.0]))
    bins.add(torch.tensor([249, 250]), TOTAL, torch.tensor([6.0, 4.0]), torch.tensor([1.0, 0.5]))
    assert bins.means() == pytest.approx(
        {
            "train/drift/0": 3.0,  # (1 + 2 + 6) / 3
            "train/drift/1": 4.0,
            "train/drift/3": 5.0,  # and no figure for part 2, which nothing was drawn from
            "train/accuracy/0": 2 / 3,
            "train/accuracy/1": 0.5,
            "train/accuracy/3": 1.0,
        }
    )


def test_figures_begin_anew_with_an_iteration_and_leave_out_what_is_not_finite():
    bins = TimestepBins(("drift",))
    bins.begin(0)
    bins.add(torch.tensor([0, 1]), TOTAL, torch.tensor([float("nan"), 2.0]))
    assert bins.means() == {"train/drift/0": 2.0}
    bins.begin(0)
    assert bins.means() == {"train/drift/0": 2.0}
    bins.begin(1)
    assert bins.means() == {}


def test_a_cut_iteration_is_taken_up_where_it_was():
    straight, cut, resumed = (TimestepBins(("drift",)) for _ in range(3))
    first, second = (torch.tensor([0]), torch.tensor([1.0])), (torch.tensor([5]), torch.tensor([4.0]))
    for bins in (straight, cut):
        bins.begin(7)
        assert bins.unfinished(7) is None
        bins.add(first[0], TOTAL, first[1])
    straight.add(second[0], TOTAL, second[1])
    sums = cut.unfinished(7)
    assert sums is not None
    assert cut.unfinished(8) is None
    resumed.take_up(7, sums)
    resumed.begin(7)
    resumed.add(second[0], TOTAL, second[1])
    assert resumed.means() == straight.means() == {"train/drift/0": 2.5}
