"""No shipped code runs what a file says: the syntax trees of all packages are walked, and planted violations found."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    file
    for folder in ("diffalign", "reward_models/diffalign_rewards", "eval/diffalign_eval", "assets", "configs")
    for file in (ROOT / folder).rglob("*.py")
)
CALLS = {"eval", "exec", "compile", "__import__"}
"""Built-in functions that run text."""
MODULES = {
    "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "runpy", "shelve",
    "tarfile", "zipfile",
}  # fmt: skip
"""Modules that run what they read, or unpack archives."""
ATTRIBUTES = {
    "torch": {"hub.load", "jit.load", "package.PackageImporter", "serialization.load"},
    "yaml": {"full_load", "full_load_all", "load", "load_all", "unsafe_load", "unsafe_load_all"}
    | {"CLoader", "FullLoader", "Loader", "UnsafeLoader"},
    "os": {"popen", "system"},
    "shutil": {"unpack_archive"},
    "pickle": {"Unpickler", "load", "loads"},
}
"""Per module, what must not be touched."""
METHODS = {"exec_module", "extract", "extractall", "read_pickle", "spec_from_file_location", "unpack_archive"}
EXCEPTIONS = {
    "rewards/registry.py: exec_module": "a reward function of the file that the user names",
    "rewards/registry.py: spec_from_file_location": "the same",
    "rewards/registry.py: import_module of a name that is computed": "a reward of an installed package",
    "diffalign/__init__.py: import_module of a name that is computed": "the table of public names",
    "cli/__init__.py: import_module of a name that is computed": "the table of commands",
    "algorithms/table.py: import_module of a name that is computed": "the methods of config.RUNS",
    "losses/pair_table.py: import_module of a name that is computed": "the table of pair losses",
    "models/families.py: import_module of a name that is computed": "the table of families; other names are refused",
    "cli/doctor.py: import_module of a name that is computed": "the table of libraries",
    "estimate/architecture.py: import_module of a name that is computed": "diffusers or transformers, nothing else",
}
"""Places where code is loaded on purpose: from installed packages, or from a file that the user names."""


@cache
def found_in(file: Path) -> list[str]:
    """`place: violation` for each in a file."""
    name = file.relative_to(ROOT).as_posix()
    return [f"{name}: {what}" for what in violations(file.read_text(encoding="utf-8"))]


def violations(source: str) -> Iterator[str]:
    """What in a module's source could run what a file says, one phrase each."""
    tree = ast.parse(source)
    only_caught = {id(node) for node in ast.walk(tree) if _is_pickle_error(node)}
    names_pickle_errors_only = all(
        id(node) in only_caught for node in ast.walk(tree) if _is_attribute_of(node, "pickle")
    )
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                for alias in aliases:
                    harmless = alias.name == "pickle" and alias.asname is None and names_pickle_errors_only
                    if alias.name.split(".")[0] in MODULES and not harmless:
                        yield f"import of {alias.name}"
            case ast.ImportFrom(module=module, names=aliases):
                top = (module or "").split(".")[0]
                if top in MODULES:
                    yield f"import from {module}"
                for alias in aliases:
                    if alias.name in ATTRIBUTES.get(top, ()) or (top == "torch" and alias.name == "load"):
                        yield f"{module}.{alias.name}"
            case ast.Attribute():
                yield from _attribute(node)
            case ast.Call():
                yield from _call(node)
            case ast.keyword(arg="trust_remote_code", value=value) if not _is(value, False):
                yield "trust_remote_code"
            case ast.keyword(arg="weights_only" | "use_safetensors" as name, value=value) if not _is(
                value, True
            ):
                yield name
            case ast.keyword(arg="allow_pickle" | "shell" as name, value=value) if not _is(value, False):
                yield name
            case ast.Constant(value="trust_remote_code"):
                yield "trust_remote_code as text"


def _attribute(node: ast.Attribute) -> Iterator[str]:
    path = ast.unparse(node)
    top, _, rest = path.partition(".")
    if rest in ATTRIBUTES.get(top, ()):
        yield path
    if node.attr in METHODS:
        yield node.attr


def _call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    keywords = {keyword.arg for keyword in node.keywords}
    if isinstance(node.func, ast.Name) and name in CALLS:
        yield f"{name}()"
    if name == "torch.load" and "weights_only" not in keywords:
        yield "torch.load without weights_only"
    if re.fullmatch(r"Auto[A-Z]\w*\.from_pretrained", name) and "trust_remote_code" not in keywords:
        yield f"{name} without trust_remote_code=False"
    if name.split(".")[-1] == "import_module" and not (node.args and isinstance(node.args[0], ast.Constant)):
        yield "import_module of a name that is computed"


def _is(value: ast.expr, wanted: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


def _is_attribute_of(node: ast.AST, module: str) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module


def _is_pickle_error(node: ast.AST) -> bool:
    return _is_attribute_of(node, "pickle") and getattr(node, "attr", "").endswith("Error")


def test_there_is_code_to_walk():
    walked = {file.relative_to(ROOT).as_posix() for file in SHIPPED}
    assert {"diffalign/cli/__init__.py", "eval/diffalign_eval/grid.py", "assets/build/vae.py"} <= walked
    assert len(walked) > 100


@pytest.mark.parametrize("file", SHIPPED, ids=[file.relative_to(ROOT).as_posix() for file in SHIPPED])
def test_shipped_code_runs_nothing_that_a_file_says(file):
    assert [place for place in found_in(file) if not any(place.endswith(known) for known in EXCEPTIONS)] == []


def test_every_exception_is_still_needed():
    found = [place for file in SHIPPED for place in found_in(file)]
    unused = [known for known in EXCEPTIONS if not any(place.endswith(known) for place in found)]
    assert unused == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(open('x', 'rb'))",
        "import pickle\nload = pickle.Unpickler",
        "import pickle as p\ntry:\n    pass\nexcept p.UnpicklingError:\n    pass",
        "from pickle import loads",
        "def f():\n    import dill",
        "import joblib",
        "eval(text)",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml\nclass Reader(yaml.UnsafeLoader): pass",
        "from yaml import unsafe_load",
        "import torch\ntorch.load(file)",
        "import torch\ntorch.load(file, weights_only=False)",
        "import torch\ntorch.load(file, weights_only=maybe)",
        "from torch import load",
        "torch.hub.load('owner/name', 'model')",
        "torch.jit.load(file)",
        "numpy.load(file, allow_pickle=True)",
        "pandas.read_pickle(file)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, **{'trust_remote_code': True}, trust_remote_code=False)",
        "AutoTokenizer.from_pretrained(x)",
        "Pipeline.from_pretrained(x, use_safetensors=False)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "import zipfile",
        "shutil.unpack_archive(file)",
        "archive.extractall(folder)",
        "importlib.import_module(name)",
        "spec.loader.exec_module(module)",
    ],
)
def test_a_planted_violation_is_found(source):
    assert list(violations(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()\nre.compile('x')\ntorch.compile(model)",
        "import torch\ntorch.load(file, map_location='cpu', weights_only=True)",
        "import pickle\ntry:\n    pass\nexcept pickle.UnpicklingError:\n    pass",
        "import yaml\nyaml.safe_load(text)\nclass Reader(yaml.SafeLoader): pass",
        "importlib.import_module('diffalign_eval.grid')",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=False)",
        "subprocess.run(['ls'])",
    ],
)
def test_ordinary_code_is_left_alone(source):
    assert list(violations(source)) == []
