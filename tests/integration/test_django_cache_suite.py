"""Django's own cache tests pass on NearCache, but for those listed with a reason.

They come from the source distribution of the installed Django, which pip fetches once for each
version; where it cannot, these tests are skipped, and say why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.django_cache.source import CannotFetch, fetch
from tests.processes import Process, database_environ, manage, python

pytestmark = pytest.mark.django_db

#: As in tests/django_cache/suites.py, which cannot be imported without Django's tests.
VARIANTS = ("near", "async", "in-process", "second-level", "users")
#: Seconds; the tests of one variant sleep for about twelve.
TIMEOUT = 150
SETTINGS = {"DJANGO_SETTINGS_MODULE": "tests.django_cache.settings"}


@pytest.fixture(scope="module")
def source() -> Path:
    try:
        return fetch()
    except CannotFetch as exc:
        pytest.skip(f"Django's own cache tests are not here: {exc}")


@pytest.fixture(scope="module")
def runs(
    source: Path, django_db_setup: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Process]]:
    """A run of each variant, all at once: Django's tests sleep until entries expire."""
    table = tmp_path_factory.mktemp("epochs") / "table"
    environ: dict[str, str | None] = {
        **SETTINGS,
        **database_environ(),
        "EPOCH_TABLE": str(table),
    }
    with ExitStack() as stack:
        listener = stack.enter_context(manage("pglisten", env=environ))
        listener.wait_for_line("^pglisten: ready")
        yield {
            variant: stack.enter_context(
                python("-m", "tests.django_cache.run", str(source), variant, env=environ)
            )
            for variant in VARIANTS
        }


def outcome(process: Process) -> dict[str, Any]:
    process.wait(timeout=TIMEOUT)
    lines = process.stdout.splitlines()
    assert lines, process.report()
    found: dict[str, Any] = json.loads(lines[-1])
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_djangos_own_cache_tests_pass(variant: str, runs: dict[str, Process]) -> None:
    came = outcome(runs[variant])
    assert came["failed"] == {}, "\n".join(came["failed"].values())
    assert len(came["again"]) <= 3, "too many for a machine that is merely slow"
    assert came["run"] >= 45
    assert len(came["skipped"]) <= came["run"] // 3


def test_a_cache_that_keeps_nothing_does_not_pass(source: Path) -> None:
    environ: dict[str, str | None] = {
        **SETTINGS,
        **database_environ(),
        "CACHE_BACKEND": "django.core.cache.backends.dummy.DummyCache",
    }
    names = ("test_simple", "test_add", "test_incr")
    program = ("-m", "tests.django_cache.run", str(source), "near", *names)
    with python(*program, env=environ) as process:
        came = outcome(process)
    assert process.returncode == 1
    assert {"NearCache.test_simple", "NearCache.test_add"} <= set(came["failed"])
