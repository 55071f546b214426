"""`make test-all` finds what is there, and says what it leaves out."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from tests import matrix
from tests.plugin import EMBEDDED_VERSIONS

THIS = ".".join(map(str, sys.version_info[:2]))


def test_this_interpreter_is_found() -> None:
    assert matrix.find_python(THIS) == sys.executable


def test_an_interpreter_that_is_nowhere_is_not_found() -> None:
    assert matrix.find_python("3.999") is None


def test_a_shim_that_refuses_to_run_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = tmp_path / "python3.999"
    shim.write_text("#!/bin/sh\necho 'not selected' >&2\nexit 127\n", encoding="utf-8")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert matrix.find_python("3.999") is None


def test_what_cannot_run_is_listed_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        matrix, "find_python", {"3.11": "/one/python3.11", "3.13": "/two/python3.13"}.get
    )
    assert matrix.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Python 3.11 · Django 5.2 /one/python3.11",
        # The first and the last before those between.
        "Python 3.13 · Django 6.1 /two/python3.13",
        "Python 3.13 · Django 5.2 /two/python3.13",
        "Python 3.13 · Django 6.0 /two/python3.13",
        "skipped Python 3.12: no such interpreter here",
        "skipped Python 3.11 · Django 6.0: Django 6.0 needs Python 3.12 or newer",
        "skipped Python 3.11 · Django 6.1: Django 6.1 needs Python 3.12 or newer",
    ]


def test_a_matrix_without_a_cell_is_not_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "find_python", lambda version: None)
    assert matrix.main([]) == 1


def test_an_environment_that_cannot_be_installed_fails_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def install(environment: matrix.Environment, interpreter: str) -> str:
        if environment.django == "6.0":
            raise matrix.InstallationError("no wheel")
        return "installed"

    def run_cell(
        environment: matrix.Environment, pg: str, cell: str, arguments: list[str]
    ) -> matrix.Outcome:
        return matrix.Outcome(cell, True, " ".join([pg, *arguments]))

    monkeypatch.setattr(matrix, "find_python", lambda version: sys.executable)
    monkeypatch.setattr(matrix, "install", install)
    monkeypatch.setattr(matrix, "run_cell", run_cell)
    assert matrix.main(["--python", "3.13", "--", "-k", "one"]) == 1
    summary = capsys.readouterr().out.partition("== summary\n")[2].splitlines()
    assert [" ".join(line.split()) for line in summary if line.startswith(("ok", "FAILED"))] == [
        "ok Python 3.13 · Django 5.2 · PostgreSQL 18 0 s 18 -k one",
        "ok Python 3.13 · Django 5.2 · PostgreSQL 16 0 s 16 -m not unit and not process -k one",
        "ok Python 3.13 · Django 6.1 · PostgreSQL 18 0 s 18 -k one",
        "ok Python 3.13 · Django 6.1 · PostgreSQL 16 0 s 16 -m not unit and not process -k one",
        "FAILED Python 3.13 · Django 6.0 0 s not installed",
    ]
    assert [line for line in summary if line.startswith("skipped")] == [
        f"skipped Python 3.13 · Django {django} · PostgreSQL 16: {lane}"
        for django in ("5.2", "6.1")
        for lane in (
            "unit (no server in it)",
            "process (slow: on the first and last pair, newest PostgreSQL)",
        )
    ]


@pytest.fixture
def nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "find_python", lambda version: sys.executable)
    monkeypatch.setattr(matrix, "install", lambda *given: "installed")
    monkeypatch.setattr(
        matrix,
        "run_cell",
        lambda environment, pg, cell, arguments: matrix.Outcome(cell, True, "passed"),
    )


def lines_of(capsys: pytest.CaptureFixture[str], verdict: str) -> list[str]:
    """What the summary says of cells, without the Python that is the same in all of them."""
    summary = capsys.readouterr().out.partition("== summary\n")[2].splitlines()
    beginning = f"{verdict} Python 3.13 · "
    lines = [" ".join(line.split()).removesuffix(" 0 s passed") for line in summary]
    return [line.removeprefix(beginning) for line in lines if line.startswith(beginning)]


@pytest.mark.usefixtures("nothing_fails")
def test_an_older_server_is_for_the_first_and_the_last_pair(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert matrix.main(["--python", "3.13"]) == 0
    assert lines_of(capsys, "ok") == [
        "Django 5.2 · PostgreSQL 18",
        "Django 5.2 · PostgreSQL 16",
        "Django 6.1 · PostgreSQL 18",
        "Django 6.1 · PostgreSQL 16",
        "Django 6.0 · PostgreSQL 18",
    ]


@pytest.mark.usefixtures("nothing_fails")
def test_what_has_been_tested_is_not_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main(["--python", "3.13", "--tested", "3.13", "5.2", "18"]) == 0
    assert "Django 5.2 · PostgreSQL 18: tested already" in lines_of(capsys, "skipped")


@pytest.mark.usefixtures("nothing_fails")
def test_past_its_budget_no_cell_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    minutes = iter(range(100))
    monkeypatch.setattr("tests.matrix.time.monotonic", lambda: 60.0 * next(minutes))
    assert matrix.main(["--python", "3.13", "--budget", "1.5"]) == 0
    late = [line for line in lines_of(capsys, "skipped") if "budget" in line]
    assert late == [
        f"Django {django} · PostgreSQL {pg}: the budget is spent"
        for django, pg in (("5.2", 16), ("6.1", 18), ("6.1", 16), ("6.0", 18))
    ]


def test_the_matrix_is_what_the_package_says_it_supports() -> None:
    project = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    classified = {
        line.removeprefix(prefix)
        for prefix in ("Framework :: Django :: ", "Programming Language :: Python :: ")
        for line in project["classifiers"]
        if line.startswith(prefix) and line[-1].isdigit()
    }
    assert classified == {*matrix.PYTHONS, *matrix.DJANGOS}
    assert tuple(map(str, EMBEDDED_VERSIONS)) == matrix.POSTGRESES
