from __future__ import annotations

from pathlib import Path

import pytest

from diffalign import assets
from diffalign.errors import ConfigError, DataError


def _write(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a model folder, a prompt list and three run files."""
    for name in (
        "pyproject.toml",
        "assets/tiny-sd/model_index.json",
        "assets/tiny-sd/unet/config.json",
        "assets/prompts/shapes_train.txt",
        "assets/pairs.parquet",
        "configs/tiny/ddpo.yaml",
        "configs/tiny/dpo.yaml",
        "configs/sd15/sft.yaml",
    ):
        _write(tmp_path / name)
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path / "diffalign")
    return tmp_path


def test_a_bundled_name_is_a_file_or_a_folder(checkout):
    assert assets.resolve("bundled:pairs.parquet") == checkout / "assets/pairs.parquet"
    assert assets.resolve("bundled:tiny-sd") == checkout / "assets/tiny-sd"
    assert assets.resolve("bundled:prompts/shapes_train.txt") == checkout / "assets/prompts/shapes_train.txt"


def test_other_paths_are_kept_whether_they_exist_or_not(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert assets.resolve("~/pictures") == Path("/home/ada/pictures")
    assert assets.resolve("owner/model") == Path("owner/model")


def test_a_missing_bundled_name_lists_what_there_is_and_suggests(checkout):
    with pytest.raises(DataError) as caught:
        assets.resolve("bundled:pair.parquet")
    assert caught.value.render() == (
        "error: bundled:pair.parquet is not among the bundled files\n"
        f"  where: {checkout / 'assets'}\n"
        "  why:   there are bundled:pairs.parquet, bundled:prompts/shapes_train.txt, bundled:tiny-sd\n"
        "  next:  did you mean bundled:pairs.parquet?"
    )


@pytest.mark.parametrize(
    "name", ["bundled:", "bundled:../pyproject.toml", "bundled:/etc/passwd", "bundled:x"]
)
def test_a_bundled_name_never_leaves_the_assets(checkout, name):
    with pytest.raises(DataError, match="not among the bundled files"):
        assets.resolve(name)


def test_without_any_assets_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path / "diffalign")
    with pytest.raises(DataError, match="empty or missing"):
        assets.resolve("bundled:tiny-sd")


def test_an_installed_package_uses_its_own_copies(tmp_path, monkeypatch):
    _write(tmp_path / "diffalign/_bundled/assets/clip/x.json")
    _write(tmp_path / "diffalign/_bundled/configs/tiny/sft.yaml")
    _write(tmp_path / "assets/clip/x.json")  # someone else's folder: there is no pyproject.toml beside it
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path / "diffalign")
    assert assets.resolve("bundled:clip") == tmp_path / "diffalign/_bundled/assets/clip"
    assert list(assets.list_configs()) == ["tiny/sft"]


def test_configs_are_listed_by_name(checkout):
    assert list(assets.list_configs()) == ["sd15/sft", "tiny/ddpo", "tiny/dpo"]


@pytest.mark.parametrize(
    "name", ["tiny/ddpo", "tiny/ddpo.yaml", "configs/tiny/ddpo.yaml", "configs/tiny/ddpo"]
)
def test_a_shipped_config_is_found_from_anywhere(checkout, tmp_path, monkeypatch, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert assets.find_config(name) == checkout / "configs/tiny/ddpo.yaml"


def test_a_file_of_the_user_comes_before_a_shipped_name(checkout, tmp_path, monkeypatch):
    _write(tmp_path / "work/tiny/ddpo.yaml")
    monkeypatch.chdir(tmp_path / "work")
    assert assets.find_config("tiny/ddpo.yaml") == Path("tiny/ddpo.yaml")


def test_an_unknown_config_suggests_the_closest(checkout):
    with pytest.raises(ConfigError) as caught:
        assets.find_config("tiny/ddop")
    assert caught.value.render() == (
        "error: no run file tiny/ddop\n"
        "  why:   there is no such file, and no shipped config of that name\n"
        "  next:  did you mean tiny/ddpo? diffalign config list shows the shipped ones"
    )


def test_a_folder_is_not_a_config(checkout):
    with pytest.raises(ConfigError, match="is a folder, not a run file"):
        assets.find_config(str(checkout))
