from __future__ import annotations

import json

import pytest

from diffalign.assets import list_configs
from diffalign.cli import main
from diffalign.config import RUNS


def test_list_names_every_shipped_config_with_its_first_line(capsys):
    assert main(["config", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(list_configs())
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("algorithm", list(RUNS))
def test_show_of_a_method_prints_its_options(capsys, algorithm):
    assert main(["config", "show", algorithm]) == 0
    assert f"name: {algorithm}" in capsys.readouterr().out


def test_show_of_a_run_file_prints_it_resolved(capsys):
    assert main(["config", "show", "sd15/ddpo_clip", "--seed", "9"]) == 0
    shown = capsys.readouterr().out
    assert "\nseed: 9\n" in shown
    assert "  advantage_clip: 5.0\n" in shown


def test_validate_accepts_a_good_file_and_says_what_it_is(capsys):
    assert main(["config", "validate", "sd15/dpo"]) == 0
    assert capsys.readouterr().out == "sd15/dpo is a valid dpo run\n"


def test_validate_shows_every_mistake_and_fails(capsys):
    assert main(["config", "validate", "sd15/dpo", "--algorithm.beta", "-1", "--training.lr=1"]) == 2
    assert capsys.readouterr().err == (
        "error: command line: --training.lr is not an option of dpo\n"
        "       did you mean learning_rate?   (all options: diffalign config show dpo)\n"
        "error: command line: --algorithm.beta must be greater than 0; got -1\n"
    )


def test_schema_is_json(capsys):
    assert main(["config", "schema", "sft"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "SFTRun"
    assert main(["config", "schema"]) == 0
    assert "anyOf" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["show"], "error: config show needs a name"),
        (["validate"], "error: config validate needs a name"),
        (["show", "ddop"], "error: no run file ddop"),
        (["schema", "ddop"], "error: no algorithm ddop"),
        (["list", "--seed", "3"], "error: --seed: only a run file takes options"),
        (["show", "ddpo", "--seed", "3"], "error: --seed: only a run file takes options"),
    ],
)
def test_a_wrong_request_is_one_screen(capsys, words, expected):
    assert main(["config", *words]) == 2
    assert capsys.readouterr().err.startswith(expected)
