"""Checkpoints of configuration files alone."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

from conftest import REPOSITORY


def load_architectures():
    """benchmarks/architectures, which is no installed package."""
    place = REPOSITORY / "benchmarks" / "architectures" / "__init__.py"
    spec = importlib.util.spec_from_file_location("architectures", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["architectures"] = module
    spec.loader.exec_module(module)
    return module


write_architecture = load_architectures().write_architecture


def configuration_of(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint's configuration files, without weights and tokenizers."""
    for file in folder.rglob("*config.json"):
        if "tokenizer" not in file.parent.name:
            (target / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / file.parent.name)
    shutil.copy(folder / "model_index.json", target)
    return target
