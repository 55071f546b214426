"""import-linter checks the modules that the contract names; here: that it names them all."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import tomllib
from pathlib import Path

import django_pgnotify

ROOT = Path(__file__).resolve().parents[2]
PURE_LAYERS = 5  # the last ones: session and wire, events, exceptions


def layers() -> list[list[str]]:
    """The names of each layer, highest first."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [contract] = [
        contract
        for contract in config["tool"]["importlinter"]["contracts"]
        if contract["id"] == "layers"
    ]
    return [
        [name.strip(" ()") for name in layer.replace(":", "|").split("|")]
        for layer in contract["layers"]
    ]


def modules() -> set[str]:
    """Every module that holds more than a docstring, without the package's own name."""
    found = set()
    prefix = f"{django_pgnotify.__name__}."
    for module in pkgutil.walk_packages(django_pgnotify.__path__, prefix):
        spec = importlib.util.find_spec(module.name)
        assert spec is not None
        assert spec.origin is not None
        source = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        if len(source.body) > (ast.get_docstring(source) is not None):
            found.add(module.name.removeprefix(prefix))
    return found


def test_no_module_escapes_the_layers_contract() -> None:
    named = [name for layer in layers() for name in layer]
    escaped = {
        module
        for module in modules()
        if not any(module == name or module.startswith(f"{name}.") for name in named)
    }
    assert escaped == set(), "name them in pyproject.toml, [tool.importlinter]"


def test_the_pure_layers_are_the_ones_that_may_import_no_driver() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [contract] = [
        contract
        for contract in config["tool"]["importlinter"]["contracts"]
        if contract["id"] == "pure"
    ]
    pure = {f"django_pgnotify.{name}" for layer in layers()[-PURE_LAYERS:] for name in layer}
    assert set(contract["source_modules"]) == pure
