"""Processes under test: started, watched line by line, signalled, collected.

Nothing here sleeps. A wait ends when the line arrives, when the process ends,
or at its deadline, and a wait that fails shows everything the process said.

Output is read through pipes, as systemd and container runtimes read it:
a line that is not flushed is not seen, which is what a test should find out.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

ROOT = Path(__file__).resolve().parent.parent
#: Seconds a wait may take. Generous: it is spent only by a test that fails.
DEADLINE = 60.0


class Process:
    """A child process in a process group of its own; a context manager that ends it.

    ``env`` is added to this process's environment; a value of None removes the
    variable. ``stdout`` and ``stderr`` are kept apart and both are watched.
    """

    def __init__(
        self,
        args: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: str | os.PathLike[str] = ROOT,
        deadline: float = DEADLINE,
    ) -> None:
        self.args = [os.fspath(arg) for arg in args]
        self.deadline = deadline
        self._stdout: list[str] = []
        self._stderr: list[str] = []
        self._changed = threading.Condition()
        environ = dict(os.environ)
        for name, value in (env or {}).items():
            if value is None:
                environ.pop(name, None)
            else:
                environ[name] = value
        self._popen = subprocess.Popen(
            self.args,
            cwd=cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        self._reading = 2
        self._readers = [
            threading.Thread(target=self._read, args=(pipe, lines), daemon=True)
            for pipe, lines in (
                (self._popen.stdout, self._stdout),
                (self._popen.stderr, self._stderr),
            )
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def __repr__(self) -> str:
        return f"<Process {self.pid} {' '.join(self.args)}>"

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative after a signal; None while it runs."""
        return self._popen.poll()

    @property
    def stdout(self) -> str:
        """What it has written to stdout so far."""
        with self._changed:
            return "".join(self._stdout)

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        with self._changed:
            return "".join(self._stderr)

    def wait_for_line(
        self, pattern: str, *, timeout: float | None = None, count: int = 1
    ) -> re.Match[str]:
        """Wait for the ``count``-th line of stdout or stderr in which ``pattern`` is found.

        Lines that were there before the call count too. Raises AssertionError
        when the process ends without it, or when ``timeout`` seconds pass.
        """
        regex = re.compile(pattern)
        deadline = time.monotonic() + (self.deadline if timeout is None else timeout)
        with self._changed:
            while True:
                found = [
                    match
                    for lines in (self._stdout, self._stderr)
                    for line in lines
                    if (match := regex.search(line))
                ]
                if len(found) >= count:
                    return found[count - 1]
                left = deadline - time.monotonic()
                if self._reading == 0 or left <= 0:
                    break
                self._changed.wait(left)
        why = "ended" if self._reading == 0 else "ran on"
        raise AssertionError(f"{self!r} {why} without a line like {pattern!r}\n{self.report()}")

    def signal(self, number: signal.Signals) -> None:
        """Send ``number`` to the process itself, not to its group."""
        self._popen.send_signal(number)

    def terminate(self, *, timeout: float | None = None) -> int:
        """SIGTERM, then :meth:`wait`."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout=timeout)

    def interrupt(self, *, timeout: float | None = None) -> int:
        """SIGINT, then :meth:`wait`."""
        self.signal(signal.SIGINT)
        return self.wait(timeout=timeout)

    def wait(self, *, timeout: float | None = None) -> int:
        """Wait for its end and all of its output; its exit status."""
        limit = self.deadline if timeout is None else timeout
        try:
            status = self._popen.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self!r} still runs after {limit} s\n{self.report()}") from None
        self._join()
        return status

    def kill(self) -> None:
        """SIGKILL the whole group, children included, if anything is left of it."""
        # Neither means more than that nothing of the group is left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        self._join()

    def report(self) -> str:
        """Exit status and output, for a message that a person reads."""
        return (
            f"exit status: {self.returncode}\n--- stdout\n{self.stdout}--- stderr\n{self.stderr}---"
        )

    def _read(self, pipe: IO[str], lines: list[str]) -> None:
        with pipe:
            for line in pipe:
                with self._changed:
                    lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._reading -= 1
            self._changed.notify_all()

    def _join(self) -> None:
        for reader in self._readers:
            reader.join(self.deadline)


def python(*args: str, env: Mapping[str, str | None] | None = None) -> Process:
    """This interpreter with ``args``, in the repository."""
    return Process([sys.executable, *args], env=env)


def manage(*args: str, env: Mapping[str, str | None] | None = None) -> Process:
    """A management command under the tests' settings, on the test databases.

    ``manage("pglisten")`` listens where the running test writes. Extra ``env``
    goes on top, such as ``{"DATABASE_URL": proxy.url(...)}`` to put a proxy in
    between.
    """
    environ: dict[str, str | None] = {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "PGNOTIFY_TEST_RECEIVERS": "1",
        **database_environ(),
        **(env or {}),
    }
    return Process([sys.executable, "-m", "django", *args], env=environ)


def run(*args: str, env: Mapping[str, str | None] | None = None) -> Process:
    """:func:`manage`, waited for: look at ``returncode``, ``stdout`` and ``stderr``."""
    with manage(*args, env=env) as process:
        process.wait()
    return process


def database_environ() -> dict[str, str]:
    """The environment that leads a child to the *test* databases of this session."""
    from django.db import connections

    from tests.settings import DATABASE_VARIABLES, database_url

    return {
        variable: database_url(connections[alias].settings_dict)
        for alias, variable in DATABASE_VARIABLES.items()
    }
