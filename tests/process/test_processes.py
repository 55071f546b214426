"""The process helper: lines, deadlines, signals, and nothing that outlives a test."""

from __future__ import annotations

import signal

import psutil
import pytest

from tests.processes import Process, python, run

# Says "ready", answers SIGTERM and SIGINT with a line, and goes on at the first one.
POLITE = """
import signal, sys
polite = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, polite)
print("ready", flush=True)
print("to stderr", file=sys.stderr, flush=True)
for _ in range(2):
    print("asked", signal.Signals(signal.sigwait(polite)).name, flush=True)
sys.exit(3)
"""


def test_lines_signals_and_status() -> None:
    with python("-c", POLITE) as process:
        process.wait_for_line("^ready$")
        process.wait_for_line("^to stderr$")
        assert process.returncode is None
        process.signal(signal.SIGTERM)
        assert process.wait_for_line(r"asked (\w+)")[1] == "SIGTERM"
        assert process.interrupt() == 3
        assert process.wait_for_line(r"asked (\w+)", count=2)[1] == "SIGINT"
    assert process.stdout.splitlines() == ["ready", "asked SIGTERM", "asked SIGINT"]
    assert process.stderr == "to stderr\n"


def test_a_line_that_never_comes_fails_at_the_end_of_the_process_not_at_the_deadline() -> None:
    with (
        python("-c", "print('other'); raise SystemExit(4)") as process,
        pytest.raises(AssertionError, match="ended without a line") as caught,
    ):
        process.wait_for_line("ready", timeout=60)
    assert "other" in str(caught.value)


def test_a_line_that_never_comes_fails_at_the_deadline() -> None:
    with python("-c", POLITE) as process:
        process.wait_for_line("ready")
        with pytest.raises(AssertionError, match="ran on without a line"):
            process.wait_for_line("done", timeout=0.05)
        with pytest.raises(AssertionError, match="still runs after"):
            process.wait(timeout=0.05)


def test_leaving_the_block_ends_the_process_and_its_children() -> None:
    child = "import signal; print('child', flush=True); signal.pause()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with python("-c", parent) as process:
        process.wait_for_line("child")
        family = psutil.Process(process.pid).children()
        assert len(family) == 1
    assert process.returncode == -signal.SIGKILL
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert (len(gone), alive) == (1, [])


def test_a_variable_of_none_is_removed_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OF_THE_PARENT", "1")
    code = "import os; print(os.environ.get('OF_THE_PARENT'), os.environ['ADDED'])"
    with python("-c", code, env={"OF_THE_PARENT": None, "ADDED": "2"}) as process:
        assert process.wait() == 0
    assert process.stdout == "None 2\n"


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_management_command_runs_on_the_test_databases() -> None:
    from django.db import connections

    code = (
        "from django.db import connections as c\n"
        "for alias in ('default', 'other'):\n"
        "    with c[alias].cursor() as cursor:\n"
        "        cursor.execute('select current_database()')\n"
        "        print(alias, cursor.fetchone()[0])\n"
    )
    process = run("shell", "--no-imports", "-c", code)
    assert process.returncode == 0, process.report()
    assert process.stdout.splitlines() == [
        f"{alias} {connections[alias].settings_dict['NAME']}" for alias in ("default", "other")
    ]
    assert all("test_" in line for line in process.stdout.splitlines())


def test_a_command_that_is_not_there_says_so() -> None:
    with pytest.raises(FileNotFoundError):
        Process(["no-such-command-here"])
