"""Django's own test runner, with the docs' helpers and a ``forward()``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.processes import ROOT, database_environ, python

pytestmark = pytest.mark.django_db(transaction=True)

A_TEST = """
from django.test import TestCase
from django_pgnotify import forward, publish
from django_pgnotify.testing import InMemoryBus

class RoomTests(TestCase):
    def test_what_is_forwarded(self):
        forward("rooms", group="rooms", type="told")
        with InMemoryBus() as bus, self.captureOnCommitCallbacks(execute=True):
            publish("rooms", 1)
        self.assertEqual([event.data for event in bus.events], [1])
"""


def test_a_bus_whose_events_were_forwarded_lets_go_of_the_test_database(tmp_path: Path) -> None:
    (tmp_path / "test_rooms.py").write_text(A_TEST, encoding="utf-8")
    environ = {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        **database_environ(),
    }
    with python("-m", "django", "test", "--noinput", "test_rooms", env=environ) as runner:
        assert runner.wait() == 0, runner.report()
    assert "Ran 1 test" in runner.stderr
