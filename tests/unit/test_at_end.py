"""What a process does last. That the exit handlers run is for tests/process to see."""

from __future__ import annotations

import atexit
import sys
from types import ModuleType

import pytest
from django.dispatch import Signal

from django_pgnotify.at_end import at_end


def test_a_child_of_celerys_pool_does_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends by os._exit(), and tells of it by this signal only."""
    signals = ModuleType("celery.signals")
    shutdown = Signal()
    monkeypatch.setattr(signals, "worker_process_shutdown", shutdown, raising=False)
    monkeypatch.setitem(sys.modules, "celery", ModuleType("celery"))
    monkeypatch.setitem(sys.modules, "celery.signals", signals)
    done: list[bool] = []

    def last() -> None:
        done.append(True)

    at_end(last)
    atexit.unregister(last)
    shutdown.send(sender=None, pid=1, exitcode=0)
    assert done == [True]
