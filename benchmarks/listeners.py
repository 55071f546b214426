"""The listeners under test: each is a process of its own, with a recording that it writes to."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg

from benchmarks.databases import dsn
from benchmarks.frame import CannotRun
from benchmarks.peers import libpq as c
from benchmarks.recording import LostEvents, Recording
from tests.processes import Process


@dataclass(frozen=True, slots=True)
class Listener:
    process: Process
    recording: Recording
    ready_after: float
    """Seconds from its start until it listened."""

    def take(self, count: int) -> list[int]:
        """The times of the next ``count`` calls of its receivers, in ns; waits for them."""
        try:
            return self.recording.take(count)
        except LostEvents as exc:
            raise LostEvents(f"{exc}; {_last_words(self.process)}") from exc

    def rss(self) -> float:
        """Resident memory, in MB."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    def cpu_seconds(self) -> float:
        """CPU time that its threads have used so far; Linux counts it in ns here."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        if not tasks.exists():
            raise CannotRun("/proc is read, which Linux has")
        times = [int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()]
        return sum(times) / 1e9


Listen = Callable[[str], AbstractContextManager[Listener]]
"""Starts a listener on the database of an alias."""


@contextmanager
def pglisten(
    alias: str, receiver: str = "sync", environ: Mapping[str, str] | None = None
) -> Iterator[Listener]:
    """``pglisten`` as it comes; ``receiver`` is one of the kinds in ``shop/receivers.py``."""
    with _started(
        [sys.executable, "-m", "django", "pglisten"],
        lambda process: process.wait_for_line("^pglisten: ready"),
        {"BENCHMARK_DATABASE": alias, "BENCHMARK_RECEIVER": receiver, **(environ or {})},
    ) as listener:
        yield listener


FAST = {"BENCHMARK_FAST": "1"}
"""The environment in which ``pglisten`` finds the extra ``fast``."""


@contextmanager
def naive(alias: str, count: int = 1) -> Iterator[Listener]:
    """A psycopg ``notifies()`` loop that hears ``count`` topics too."""
    from benchmarks.shop.models import Naive, NaiveInside, NaiveLoad
    from benchmarks.shop.naive import topics

    labels = [model._meta.label_lower for model in (Naive, NaiveInside)]
    heard = ",".join([*topics(count), *labels])
    with _started(
        [
            sys.executable,
            "-m",
            "benchmarks.peers.naive",
            dsn(alias),
            heard,
            NaiveLoad._meta.label_lower,
        ],
        lambda process: process.wait_for_line("^ready"),
    ) as listener:
        yield listener


@contextmanager
def libpq(alias: str) -> Iterator[Listener]:
    """The same in C, without decoding; it hears of bursts alone."""
    from benchmarks.shop.naive import BURST

    with tempfile.TemporaryDirectory(prefix="pgnotify-bench-") as folder:
        program = c.compiled(Path(folder))
        with _started(
            [str(program), dsn(alias), BURST],
            lambda process: process.wait_for_line("^ready"),
            add_path=True,
        ) as listener:
            yield listener


@contextmanager
def pgpubsub(alias: str) -> Iterator[Listener]:
    """django-pgpubsub's own command: its worker alone, and silent about each notification."""
    from benchmarks.shop.settings import PUBSUB_INSTALLED

    if not PUBSUB_INSTALLED:
        raise CannotRun("django-pgpubsub is not installed (make bench installs it)")
    with _started(
        [sys.executable, "-m", "django", "listen", "--worker", "--loglevel=warning"],
        lambda process: _wait_for_session(process, alias),
        {"BENCHMARK_DATABASE": alias, "BENCHMARK_PEER": "pubsub"},
    ) as listener:
        yield listener


@contextmanager
def _started(
    arguments: Sequence[str],
    wait_until_ready: Callable[[Process], object],
    environ: Mapping[str, str] | None = None,
    add_path: bool = False,
) -> Iterator[Listener]:
    with tempfile.TemporaryDirectory(prefix="pgnotify-bench-") as folder:
        recording = Recording(Path(folder) / "times")
        extra = [str(recording.path)] if add_path else []
        begun = time.monotonic()
        with Process([*arguments, *extra], env={**(environ or {}), **recording.environ}) as process:
            try:
                wait_until_ready(process)
            except AssertionError:
                raise CannotRun(f"it does not start; {_last_words(process)}") from None
            yield Listener(process, recording, time.monotonic() - begun)


_LISTENS = (
    "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND state = 'idle' AND query = 'COMMIT'"
)


def _wait_for_session(process: Process, name: str, timeout: float = 30.0) -> None:
    """It says nothing when it listens: wait until the transaction that did so has ended."""
    deadline = time.monotonic() + timeout
    with psycopg.connect(dsn("postgres"), autocommit=True) as connection:
        while not connection.execute(_LISTENS, (name,)).fetchone():
            if process.returncode is not None or time.monotonic() > deadline:
                raise CannotRun(f"it does not listen; {_last_words(process)}")
            time.sleep(0.005)


def _last_words(process: Process) -> str:
    *_, last = process.stderr.strip().splitlines() or ["nothing"]
    return f"it says: {last}"
