"""The examples of the documentation run, in the order of their page, on a real database."""

from __future__ import annotations

import ast
import io
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import cache
from django.dispatch import Signal

from django_pgnotify import signals
from django_pgnotify.listening.background import stop_all
from django_pgnotify.registry import registry
from tests.snippets import ROOT, Snippet, snippets
from tests.testapp import models

pytestmark = pytest.mark.django_db(transaction=True)

MARKED = [snippet for snippet in snippets() if snippet.instruction in {"run", "test"}]
PLUGIN = "django_pgnotify.testing.pytest_plugin"
PAGES = sorted({snippet.path for snippet in MARKED})


def examples_in(snippet: Snippet) -> list[str]:
    """Names of the test functions and classes of a block."""
    return [
        node.name
        for node in ast.parse(snippet.text).body
        if isinstance(node, ast.ClassDef)
        or (isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))
    ]


TESTS = [
    pytest.param(snippet, name, id=f"{snippet.place}-{name}")
    for snippet in MARKED
    if snippet.instruction == "test"
    for name in examples_in(snippet)
]


@pytest.fixture(autouse=True)
def shop(monkeypatch: pytest.MonkeyPatch, settings: Any, tmp_path: Path) -> Iterator[None]:
    """The shop that the examples import from, and nothing registered before or after them."""
    settings.PGNOTIFY_EPOCH_TABLE = tmp_path / "epochs"
    settings.PGNOTIFY_MAX_STALENESS = None  # nobody listens; the examples are the only writers
    package = types.ModuleType("shop")
    package.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shop", package)
    monkeypatch.setitem(sys.modules, "shop.models", models)
    monkeypatch.setitem(sys.modules, "shop.permissions", types.ModuleType("shop.permissions"))
    for value in vars(signals).values():
        if isinstance(value, Signal):
            monkeypatch.setattr(value, "receivers", [])
            value.sender_receivers_cache.clear()
    cache.clear()
    with registry.isolated():
        yield
    cache.clear()
    stop_all()  # what subscribe() has started


def run(snippet: Snippet, namespace: dict[str, Any]) -> None:
    code = compile(snippet.source, str(snippet.path), "exec", dont_inherit=True)
    exec(code, namespace)  # noqa: S102 - our own pages
    # A page is one namespace: what it has its reader write there can be imported from there.
    vars(sys.modules["shop.permissions"]).update(namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_a_page_run_from_top_to_bottom(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "shop.receivers"}
    for snippet in MARKED:
        if snippet.path == page:
            run(snippet, namespace)
    assert len(namespace) > 2


@pytest.mark.parametrize(("snippet", "name"), TESTS)
def test_an_example_of_a_test_passes(
    snippet: Snippet, name: str, request: pytest.FixtureRequest
) -> None:
    namespace: dict[str, Any] = {"__name__": "shop.receivers"}
    for other in MARKED:
        if other.path == snippet.path and other.instruction == "run":
            run(other, namespace)
    run(snippet, namespace)
    example = namespace[name]
    if isinstance(example, type):
        assert issubclass(example, unittest.TestCase)
        run_test_case(example)
    else:
        run_function(example, request)


def run_test_case(case: type[unittest.TestCase]) -> None:
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    assert suite.countTestCases()
    output = io.StringIO()
    result = unittest.TextTestRunner(stream=output).run(suite)
    assert result.wasSuccessful(), output.getvalue()


def run_function(function: Callable[..., None], request: pytest.FixtureRequest) -> None:
    plugins = request.config.pluginmanager
    if not any(map(plugins.hasplugin, ("django_pgnotify", PLUGIN))):
        pytest.skip(f"django-pgnotify is not installed: add -p {PLUGIN}")
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    function(**{name: request.getfixturevalue(name) for name in names})


def test_there_is_an_example_of_every_helper_for_tests() -> None:
    from django_pgnotify import testing

    text = "".join(snippet.text for snippet in MARKED if snippet.instruction == "test")
    helpers = {
        name for name in testing.__all__ if name not in {"CapturedEvents", "RunningListener"}
    }
    assert {name for name in helpers if name not in text} == set()
