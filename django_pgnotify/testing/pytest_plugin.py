"""Fixtures for pytest: ``pgnotify_events``, ``pgnotify_bus``, ``pgnotify_listener`` and
``pgnotify_registry``. Django is imported only when one of them is used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ..registry import Registry
    from .bus import InMemoryBus
    from .capture import CapturedEvents
    from .listener import RunningListener


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Behind the last test: nothing of ours is to keep the test database from being dropped."""
    loops = sys.modules.get("django_pgnotify.layers.loops")
    if nextitem is None and loops is not None:
        loops.stop_all()


@pytest.fixture
def pgnotify_events() -> Iterator[CapturedEvents]:
    """The events that the test publishes (see ``capture_events``)."""
    from .capture import capture_events

    with capture_events() as captured:
        yield captured


@pytest.fixture
def pgnotify_bus() -> Iterator[InMemoryBus]:
    """An ``InMemoryBus`` that delivers what the test publishes."""
    from .bus import InMemoryBus

    with InMemoryBus() as bus:
        yield bus


@pytest.fixture
def pgnotify_listener(transactional_db: None) -> Iterator[Callable[..., RunningListener]]:
    """A function that starts a real listener; arguments are those of ``running_listener``."""
    from .listener import running_listener

    with ExitStack() as stack:

        def start(*args: Any, **kwargs: Any) -> RunningListener:
            return stack.enter_context(running_listener(*args, **kwargs))

        yield start


@pytest.fixture
def pgnotify_registry() -> Iterator[Registry]:
    """The registry without receivers, for the length of a test; models publish as before."""
    from ..registry import registry

    with registry.isolated() as isolated:
        yield isolated
