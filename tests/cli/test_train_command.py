from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffalign.cli import main
from diffalign.cli.train import default_output_dir, words_of


def test_help_shows_examples_and_how_to_change_an_option(capsys):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "diffalign train tiny/ddpo" in shown
    assert "--rewards.0.weight 0.5" in shown
    assert "--output-dir" in shown


def test_a_wrong_option_stops_the_run_before_anything_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "sd15/ddpo_clip", "--sampler.eta", "0", "--seed", "x"]) == 2
    assert capsys.readouterr().err == (
        "error: command line: --seed must be a whole number; got x\n"
        "error: command line: --sampler.eta: eta = 0 makes every step deterministic, which has no "
        "log-probability and so no policy gradient; set sampler.eta to 1, or sampler.kind to ddpm\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_reward_without_gradient_is_refused_with_the_line_that_lists_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "algorithm: {name: refl}\n"
        "data: {path: 'bundled:prompts/shapes_train.txt'}\n"
        "model: {path: 'bundled:tiny-sd'}\n"
        "rewards: [{name: jpeg_compressibility}]\n"
        "sampler: {kind: ddim, eta: 0}\n"
    )
    assert main(["train", "mine.yaml", "--output-dir", "run"]) == 6
    shown = capsys.readouterr().err
    assert (
        "error: rewards: refl follows the gradient of the reward, and jpeg_compressibility has none" in shown
    )
    assert "where: mine.yaml:4" in shown
    assert not Path("run").exists()


def test_an_unknown_flag_of_the_command_suggests_one(capsys):
    assert main(["train", "sd15/sft", "--reume"]) == 2
    shown = capsys.readouterr()
    assert "--resume" in shown.err + shown.out


def test_a_missing_config_is_one_screen(capsys):
    assert main(["train", "nothing.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: no run file nothing.yaml\n")


def test_resume_needs_the_folder_to_resume_from(capsys):
    assert main(["train", "sd15/sft", "--resume"]) == 2
    assert capsys.readouterr().err.startswith("error: --resume needs --output-dir\n")


def test_the_default_folder_is_named_after_the_config_and_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("")
    stamp = r"\d{8}-\d{6}"
    assert re.fullmatch(rf"runs/tiny-ddpo-{stamp}", str(default_output_dir("tiny/ddpo")))
    assert re.fullmatch(rf"runs/tiny-ddpo-{stamp}", str(default_output_dir("configs/tiny/ddpo.yaml")))
    assert re.fullmatch(rf"runs/mine-{stamp}", str(default_output_dir(str(tmp_path / "mine.yaml"))))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["x.yaml", "--resume"], ["x.yaml", "--resume", "must"]),
        (["--resume", "x.yaml"], ["--resume", "must", "x.yaml"]),
        (["x.yaml", "--resume", "--output-dir", "d"], ["x.yaml", "--resume", "must", "--output-dir", "d"]),
        (["x.yaml", "--resume", "auto"], ["x.yaml", "--resume", "auto"]),
        (["x.yaml", "--resume", "never"], ["x.yaml", "--resume", "never"]),
    ],
)
def test_resume_alone_insists_on_a_run(words, expected):
    assert words_of(words) == expected


def test_resume_takes_the_folder_of_a_checkpoint(tmp_path, capsys):
    assert words_of(["x", "--resume", str(tmp_path)]) == ["x", "--resume", str(tmp_path)]
    assert main(["train", "tiny/sft", "--resume=" + str(tmp_path / "step-3")]) == 2
    assert capsys.readouterr().err.startswith("error: --resume: there is no checkpoint")


def test_an_error_found_in_the_data_names_the_line_that_chose_them(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("algorithm:\n  name: dpo\ndata:\n  path: bundled:prompts/shapes_train.txt\n")
    assert main(["train", str(file), "--output-dir", str(tmp_path / "run")]) == 3
    shown = capsys.readouterr().err
    assert f"where: bundled:prompts/shapes_train.txt ({file}:4: data.path)\n" in shown
    assert not (tmp_path / "run").exists()


def test_an_error_about_an_option_names_its_line(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "algorithm:\n  name: ddpo\n  timestep_range: [0.5, 0.501]\ndata: {path: bundled:prompts/shapes_train.txt}\n"
        "rewards: [{name: brightness}]\nsampler: {steps: 10}\n"
    )
    assert main(["train", str(file), "--output-dir", str(tmp_path / "run")]) == 2
    assert f"{file}:3" in capsys.readouterr().err
