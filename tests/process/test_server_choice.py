"""`pytest --pg=...` as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import Process, python

USAGE_ERROR = 4


def pytest_with(*arguments: str, **env: str | None) -> Process:
    # "-p no:..." keeps it from writing beside the run that started it.
    environ = {"DATABASE_URL": None, "DJANGO_SETTINGS_MODULE": None, **env}
    command = ("-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", *arguments)
    with python(*command, "tests/unit/test_harness.py", env=environ) as process:
        process.wait()
    return process


def test_a_container_without_docker_is_refused_with_the_cause(tmp_path: Path) -> None:
    pytest.importorskip("testcontainers")
    process = pytest_with("--pg=container:17", DOCKER_HOST=f"unix://{tmp_path}/nobody.sock")
    assert process.returncode == USAGE_ERROR, process.report()
    assert "postgres:17 did not start" in process.stderr
    assert "No such file" in process.stderr
    assert "INTERNALERROR" not in process.stderr


def test_settings_that_were_named_before_there_was_a_server_are_refused() -> None:
    process = pytest_with(DJANGO_SETTINGS_MODULE="example_project.settings")
    assert process.returncode == USAGE_ERROR, process.report()
    assert "DJANGO_SETTINGS_MODULE='example_project.settings'" in process.stderr


def test_the_option_wins_over_database_url() -> None:
    process = pytest_with("--pg=embedded:9", DATABASE_URL="postgresql://nobody@127.0.0.1:9/x")
    assert process.returncode == USAGE_ERROR, process.report()
    assert "--pg=embedded:9" in process.stderr


def test_database_url_wins_over_the_embedded_server() -> None:
    process = pytest_with(DATABASE_URL="postgresql://user:s3cret@127.0.0.1:9/x")
    assert process.returncode == USAGE_ERROR, process.report()
    assert "cannot be reached" in process.stderr
    assert "s3cret" not in process.stderr + process.stdout
