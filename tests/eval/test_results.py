"""From scores to means, differences and win rates of every pair."""

from __future__ import annotations

import json

import pytest
from diffalign_eval.results import summarise
from diffalign_eval.statistics import Interval

PROMPTS = ["a", "a", "b", "b"]


def test_every_two_checkpoints_are_compared_in_the_order_given():
    result = summarise("r", {"base": [0.0] * 4, "one": [1.0] * 4, "two": [3.0] * 4}, PROMPTS)
    assert [(pair.before, pair.after) for pair in result.pairs] == [
        ("base", "one"),
        ("base", "two"),
        ("one", "two"),
    ]
    assert [pair.difference.mean for pair in result.pairs] == [1.0, 3.0, 2.0]
    assert result.baseline == "base"
    assert result.against_baseline("two").difference == Interval(3.0, 3.0, 3.0, 4)


def test_the_prompts_are_the_clusters():
    prompts = ["a"] * 8 + ["b"] * 8  # two prompts, so only the means 0, 1/2 and 1 can be drawn
    result = summarise("r", {"base": [0.0] * 16, "tuned": [0.0] * 8 + [1.0] * 8}, prompts)
    assert result.means["tuned"] == Interval(0.5, 0.0, 1.0, 16)
    assert result.pairs[0].difference == Interval(0.5, 0.0, 1.0, 16)
    assert (result.pairs[0].win_rate.low, result.pairs[0].win_rate.high) == (0.5, 1.0)  # all ties or all wins


def test_where_lower_is_better_a_fall_wins_and_the_difference_keeps_its_sign():
    pair = summarise("r", {"base": [2.0] * 4, "tuned": [1.0] * 4}, PROMPTS, higher_is_better=False).pairs[0]
    assert pair.difference.mean == -1.0
    assert (pair.win_rate.win, pair.win_rate.loss) == (4, 0)


def test_only_scores_of_0_and_1_are_a_share():
    assert summarise("r", {"a": [0.0, 1.0], "b": [1.0, 1.0]}, [0, 1]).is_share
    assert not summarise("r", {"a": [0.0, 1.0], "b": [0.5, 1.0]}, [0, 1]).is_share


def test_one_picture_is_strict_json_with_null_for_the_missing_bounds():
    text = json.dumps(summarise("r", {"a": [0.2], "b": [0.4]}, [0]).to_json(), allow_nan=False)
    assert json.loads(text)["pairs"][0]["difference"] == {"mean": 0.2, "low": None, "high": None, "n": 1}


def test_scores_of_different_number_are_refused():
    with pytest.raises(ValueError, match="before has 2 values and after 1"):
        summarise("r", {"a": [0.0, 1.0], "b": [1.0]}, [0, 1])
    with pytest.raises(ValueError, match="at least one checkpoint"):
        summarise("r", {}, [])


def test_the_baseline_has_no_pair_with_itself():
    with pytest.raises(KeyError):
        summarise("r", {"a": [0.0, 1.0], "b": [1.0, 1.0]}, [0, 1]).against_baseline("a")
