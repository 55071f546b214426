"""What ``import django_pgnotify`` offers, and what it costs."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import django_pgnotify

ROOT = Path(__file__).parents[2]
FACADES = [
    "django_pgnotify",
    "django_pgnotify.caching",
    "django_pgnotify.layers",
    "django_pgnotify.streams",
    "django_pgnotify.testing",
]


@pytest.mark.parametrize("name", FACADES)
def test_all_equals_reality_and_is_sorted(name: str) -> None:
    module = importlib.import_module(name)
    real = [
        attribute
        for attribute, value in vars(module).items()
        if not attribute.startswith("_")
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", "").startswith("django_pgnotify")
    ]
    assert list(module.__all__) == sorted(real)


def test_the_contract_is_offered() -> None:
    contract = {
        "Topic", "Event", "publish", "apublish", "receiver", "notify_changes", "no_notify",
        "forward", "invalidates",
    }  # fmt: skip
    assert contract <= set(django_pgnotify.__all__)


def parameters(name: str) -> dict[str, object]:
    signature = inspect.signature(getattr(django_pgnotify, name))
    return {
        key: ... if parameter.default is parameter.empty else parameter.default
        for key, parameter in signature.parameters.items()
    }


@pytest.mark.parametrize("name", ["publish", "apublish"])
def test_publish_takes_what_the_contract_says(name: str) -> None:
    expected = {"topic": ..., "data": None, "key": None, "using": None, "delivery": None}
    assert parameters(name) == expected


def test_receiver_takes_what_the_contract_says() -> None:
    contract = {
        "source": ...,
        "actions": None,
        "every_node": False,
        "concurrency": 1,
        "retries": 0,
        "dispatch_uid": None,
        "on_gap": False,
    }
    assert contract.items() <= parameters("receiver").items()
    keyword_only = list(inspect.signature(django_pgnotify.receiver).parameters.values())[1:]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in keyword_only)


def test_notify_changes_takes_what_the_contract_says() -> None:
    assert {"fields", "topic", "actions", "delivery", "using"} <= set(parameters("notify_changes"))


def test_forward_and_invalidates_take_what_the_contract_says() -> None:
    assert {"source", "group", "type", "data", "actions", "layer"} <= set(parameters("forward"))
    assert {"source", "keys", "cache", "actions"} <= set(parameters("invalidates"))
    assert parameters("invalidates")["cache"] == "default"
    assert parameters("forward")["layer"] == "default"


@pytest.mark.parametrize("name", django_pgnotify.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(django_pgnotify, name))


def test_the_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", django_pgnotify.__version__)


def test_the_package_is_typed() -> None:
    assert Path(django_pgnotify.__file__).with_name("py.typed").exists()


def test_importing_it_needs_no_settings_and_no_optional_package() -> None:
    """A models.py and a settings.py import it before the apps are ready."""
    program = (
        "import sys, django_pgnotify\n"
        "print([name for name in ('channels', 'daphne', 'pytest') if name in sys.modules])"
    )
    clean = {key: value for key, value in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        env=clean | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
