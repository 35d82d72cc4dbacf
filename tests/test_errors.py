from __future__ import annotations

import inspect

import pytest

from diffalign import errors
from diffalign.errors import ConfigError, DataError, DiffalignError, NumericsError

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, DiffalignError)]


def test_an_error_renders_as_what_where_why_next():
    error = DataError("cannot read cat.png", where="train.jsonl:7", why="truncated file", hint="re-export it")
    assert error.render() == (
        "error: cannot read cat.png\n  where: train.jsonl:7\n  why:   truncated file\n  next:  re-export it"
    )


def test_parts_that_are_not_given_leave_no_line():
    assert NumericsError("loss is nan").render() == "error: loss is nan"


def test_later_lines_of_a_part_are_indented_under_the_first():
    assert DataError("x", hint="one\ntwo").render() == "error: x\n  next:  one\n         two"


def test_all_config_problems_are_on_the_screen_one_a_line():
    error = ConfigError("wrong", problems=["a.yaml:1: x", "a.yaml:2: y"], hint="diffalign config show ddpo")
    assert error.render() == ("error: a.yaml:1: x\nerror: a.yaml:2: y\n  next:  diffalign config show ddpo")


def test_a_config_error_without_problems_renders_like_any_other():
    assert ConfigError("no run file x", hint="y").render() == "error: no run file x\n  next:  y"


def test_str_is_the_screen_without_its_prefix():
    assert str(DataError("x", why="y")) == "x\n  why:   y"


def test_every_class_has_its_own_exit_code_and_none_means_success():
    codes = [cls.exit_code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConfigError", 2),
        ("DataError", 3),
        ("NumericsError", 4),
        ("CheckpointError", 5),
        ("RewardError", 6),
        ("DeviceError", 7),
        ("StorageError", 8),
        ("ProcessError", 9),
        ("DoesNotFit", 10),
    ],
)
def test_exit_codes_are_part_of_the_interface(name, code):
    assert getattr(errors, name).exit_code == code
