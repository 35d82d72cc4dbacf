"""The layers of docs/design.md, held by the code: who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGURATION = ["config", "config_yaml", "config_messages", "config_file", "config_help"]
LAYERS = [
    [
        "errors",
        "redaction",
        *CONFIGURATION,
        "assets",
        "seeding",
        "images",
        "result_folder",
        "layout",
        "origins",
        "model_card",
        "hub",
    ],
    ["schedule", "timesteps", "transitions", "losses", "advantages"],
    ["models"],
    ["trajectory", "backpropagation", "sampling", "picture_folder", "data", "rewards", "scoring"],
    ["test_time"],
    ["algorithms"],
    ["training"],
    ["exporting"],
    ["estimate"],
    ["preference_page"],
    ["cli", "__main__"],
]
"""Left never imports right; modules of one layer may import each other."""
DATA = "diffalign.losses.pair_table."
"""Plain data without imports of its own, which the configuration may read too: a run file is checked against it."""
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
TORCH_ONLY = LAYERS[1]
REWARDS_MAY_IMPORT = (
    "rewards",
    "errors",
    "images",
    "assets",
    "data.shapes_verifier",
    "data.geneval",
    "data.prompt_sets",
)
HEAVY = ["torch", "diffusers", "transformers", "open_clip", "accelerate", "peft", "numpy", "PIL", "pyarrow"]


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of all imported modules, lazy ones inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(folder: str, package: str) -> list[tuple[str, Path]]:
    """(dotted name below the package, file) of all Python files."""
    base = ROOT / folder
    files = sorted(base.rglob("*.py"))
    assert files, f"no Python files in {folder}"
    return [(".".join(file.relative_to(base).with_suffix("").parts), file) for file in files]


def imported_by(file: Path) -> list[str]:
    return list(imports(ast.parse(file.read_text(encoding="utf-8")), str(file)))


CORE = [(name, file) for name, file in modules("diffalign", "diffalign") if name != "__init__"]


@pytest.mark.parametrize(("name", "file"), CORE, ids=[name for name, _ in CORE])
def test_left_never_imports_right(name, file):
    layer = name.split(".")[0]
    assert layer in RANK, f"{layer} has no layer yet: give it one in LAYERS and in docs/design.md"
    for target in imported_by(file):
        if target.startswith("diffalign.") and not target.startswith(DATA):
            other = target.split(".")[1]
            assert other in RANK or other == "__version__", f"{name} imports {target}, which has no layer"
            assert RANK.get(other, 0) <= RANK[layer], f"{name} ({layer}) imports {target}, to its right"


@pytest.mark.parametrize(("name", "file"), CORE, ids=[name for name, _ in CORE])
def test_the_core_reaches_rewards_and_evaluation_by_name_only(name, file):
    reached = [t for t in imported_by(file) if t.split(".")[0] in ("diffalign_rewards", "diffalign_eval")]
    assert not reached, f"{name} imports {reached}"


PURE = [(name, file) for name, file in CORE if name.split(".")[0] in TORCH_ONLY]


@pytest.mark.parametrize(("name", "file"), PURE, ids=[name for name, _ in PURE])
def test_the_mathematics_imports_torch_and_nothing_heavier(name, file):
    allowed = set(sys.stdlib_module_names) | {"torch", "diffalign"}
    others = [target for target in imported_by(file) if target.split(".")[0] not in allowed]
    assert not others, f"{name} imports {others}"


REWARDS = modules("reward_models/diffalign_rewards", "diffalign_rewards")


@pytest.mark.parametrize(("name", "file"), REWARDS, ids=[name for name, _ in REWARDS])
def test_reward_models_stand_on_the_reward_contract_only(name, file):
    for target in imported_by(file):
        inside = target.removeprefix("diffalign.")
        if target.startswith("diffalign."):
            allowed = any(inside == part or inside.startswith(part + ".") for part in REWARDS_MAY_IMPORT)
            assert allowed, f"diffalign_rewards.{name} imports {target}"
        assert not target.startswith("diffalign_eval"), f"diffalign_rewards.{name} imports {target}"


def test_the_walk_sees_lazy_and_plain_imports():
    source = "import a.b\nfrom c import d\ndef f():\n    from e.f import g\n"
    assert list(imports(ast.parse(source), "x")) == ["a.b", "c.d", "e.f.g"]


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `code`."""
    paths = [str(ROOT), str(ROOT / "reward_models"), str(ROOT / "eval")]
    finished = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('LOADED', *sys.modules)"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    last = finished.stdout.splitlines()[-1]
    assert last.startswith("LOADED")
    return {module.split(".")[0] for module in last.split()}


def test_importing_diffalign_loads_nothing_heavy():
    found = loaded("import diffalign\nassert diffalign.__version__")
    assert not found & {*HEAVY, "pydantic", "yaml", "tyro", "rich"}


def test_help_loads_nothing_heavy():
    found = loaded("from diffalign.cli import main\nassert main(['--help']) == 0")
    assert not found & {*HEAVY, "pydantic", "yaml", "tyro", "rich"}


def test_the_help_of_score_loads_nothing_heavy():
    found = loaded("from diffalign.cli import main\nassert main(['score', '--help']) == 0")
    assert not found & {*HEAVY, "pydantic", "yaml", "jinja2"}


def test_validating_a_config_loads_no_torch():
    found = loaded("from diffalign.cli import main\nassert main(['config', 'validate', 'sd15/dpo']) == 0")
    assert "pydantic" in found
    assert not found & {*HEAVY, "rich"}


def test_every_public_name_is_where_the_package_says():
    import diffalign

    for module in set(diffalign._LAZY.values()):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists() or (
            ROOT / module.replace(".", "/")
        ).is_dir()
    assert sorted(diffalign.__all__) == sorted(["__version__", *diffalign._LAZY])
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = diffalign.nothing
