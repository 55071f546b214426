"""The pytest plugin in a session of its own, as a project has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import database_environ, python

pytestmark = pytest.mark.django_db(transaction=True)

A_TEST = """
import pytest
from asgiref.sync import async_to_sync
from django_pgnotify.layers import PostgresChannelLayer

@pytest.mark.django_db(transaction=True)
def test_a_view_that_tells_a_group():
    async_to_sync(PostgresChannelLayer().group_send)("room", {"type": "told"})
"""


def test_a_layer_that_sync_code_has_used_does_not_hold_on_to_the_test_database(
    tmp_path: Path,
) -> None:
    (tmp_path / "test_room.py").write_text(A_TEST, encoding="utf-8")
    environ = {"DJANGO_SETTINGS_MODULE": "tests.settings", **database_environ()}
    options = [
        "-W",
        "error",
        "-p",
        "no:asyncio",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    ]
    with python("-m", "pytest", *options, str(tmp_path), env=environ) as session:
        assert session.wait() == 0, session.report()
    assert "1 passed" in session.stdout
