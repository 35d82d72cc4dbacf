from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from diffalign import __version__
from diffalign.cli import COMMANDS, main, split_overrides


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Registers a command `try` whose `run` has the given body."""

    def register(body: str) -> None:
        (tmp_path / "try_command.py").write_text(
            '"""Try it.\n\nexamples:\n  diffalign try --size 3\n"""\n'
            "from dataclasses import dataclass\n"
            "@dataclass(frozen=True)\n"
            "class Args:\n"
            "    size: int = 1\n"
            '    """How many."""\n'
            "def run(args):\n" + textwrap.indent(textwrap.dedent(body), "    ")
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(__import__("sys").modules, "try_command", raising=False)
        monkeypatch.setitem(COMMANDS, "try", ("try_command", "a command for this test"))

    return register


def test_help_lists_every_command_with_its_purpose(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", shown, re.M)
    assert "examples:" in shown
    assert len(shown.splitlines()) <= 30


def test_no_command_shows_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffalign {__version__}\n"


def test_an_unknown_command_suggests_one(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        "error: trian is not a command of diffalign\n"
        f"  why:   there are {', '.join(COMMANDS)}\n"
        "  next:  did you mean diffalign train?\n"
    )


def test_a_command_gets_its_arguments(command, capsys):
    command("print(args.size * 2)")
    assert main(["try", "--size", "21"]) == 0
    assert capsys.readouterr().out == "42\n"


def test_a_commands_help_has_its_description_and_examples(command, capsys):
    command("pass")
    assert main(["try", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Try it." in shown
    assert "  diffalign try --size 3" in shown
    assert "How many." in shown


def test_a_wrong_argument_is_one_screen_and_exit_code_2(command, capsys):
    command("pass")
    assert main(["try", "--size", "many"]) == 2
    shown = capsys.readouterr()
    assert "--size" in shown.err + shown.out
    assert len((shown.err + shown.out).splitlines()) < 24


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
    ],
)
def test_a_users_mistake_is_one_screen_with_its_exit_code(command, capsys, name, code):
    command(f"from diffalign.errors import {name}\nraise {name}('x is wrong', where='here', hint='do y')")
    assert main(["try"]) == code
    assert capsys.readouterr().err == "error: x is wrong\n  where: here\n  next:  do y\n"


def test_the_cause_of_a_failed_reward_goes_to_a_log(command, capsys):
    command(
        """
        from diffalign.errors import RewardError
        try:
            {}["missing"]
        except KeyError as error:
            raise RewardError("my_reward failed") from error
        """
    )
    assert main(["try"]) == 6
    shown = capsys.readouterr().err
    assert shown.startswith("error: my_reward failed\n  log:   ")
    log = Path(shown.split("log:")[1].strip())
    assert "KeyError: 'missing'" in log.read_text()
    log.unlink()


def test_a_bug_shows_a_short_screen_and_keeps_the_traceback(command, capsys):
    command("1 / 0")
    assert main(["try"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("internal error: ZeroDivisionError: division by zero\n")
    assert "Traceback" not in shown
    log = Path(shown.split("report it with")[1].strip())
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


@pytest.mark.parametrize(
    "error",
    [
        "__import__('torch').OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')",
        'RuntimeError("[enforce fail] DefaultCPUAllocator: can\'t allocate memory: you tried 9 bytes")',
        "MemoryError()",
    ],
)
def test_out_of_memory_says_what_to_lower(command, capsys, error):
    command(f"raise {error}")
    assert main(["try"]) == 7
    shown = capsys.readouterr().err
    assert shown.startswith("error: out of memory\n")
    for option in ("train_batch_size", "gradient_checkpointing", "mixed_precision", "--batch-size"):
        assert option in shown
    Path(shown.split("log:")[1].strip()).unlink()


@pytest.mark.parametrize(
    ("number", "what"), [("ENOSPC", "no space left on the disk"), ("EACCES", "permission denied")]
)
def test_a_disk_that_is_full_or_closed_is_a_storage_error(command, capsys, number, what):
    command(f"import errno\nraise OSError(errno.{number}, 'x', '/runs/a')")
    assert main(["try"]) == 8
    assert capsys.readouterr().err.startswith(f"error: {what}\n  where: /runs/a\n  next:  ")


def test_an_interrupt_exits_with_130_and_no_traceback(command, capsys):
    command("raise KeyboardInterrupt")
    assert main(["try"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_overrides_are_told_from_the_commands_own_words():
    words = ["--sampler.eta", "0.5", "my.yaml", "--output-dir", "runs/x", "--seed=3", "--model.lora", "null"]
    assert split_overrides([*words, "--resume"]) == (
        ["my.yaml", "--output-dir", "runs/x", "--resume"],
        ["--sampler.eta", "0.5", "--seed=3", "--model.lora", "null"],
    )


def test_an_override_without_a_value_does_not_take_the_next_option():
    assert split_overrides(["--training.compile", "--resume"]) == (["--resume"], ["--training.compile"])
