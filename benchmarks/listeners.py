"""The listeners under test: each is a process of its own, with a recording that it writes to."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.databases import dsn
from benchmarks.recording import Recording
from tests.processes import Process


@dataclass(frozen=True, slots=True)
class Listener:
    process: Process
    recording: Recording


@contextmanager
def _started(arguments: list[str], ready: str, environ: Mapping[str, str]) -> Iterator[Listener]:
    with tempfile.TemporaryDirectory(prefix="pgnotify-bench-") as folder:
        recording = Recording(Path(folder) / "times")
        with Process([sys.executable, *arguments], env={**environ, **recording.environ}) as process:
            process.wait_for_line(ready)
            yield Listener(process, recording)


@contextmanager
def pglisten(
    alias: str, receiver: str = "sync", environ: Mapping[str, str] | None = None
) -> Iterator[Listener]:
    """``pglisten`` as it comes; ``receiver`` is one of the kinds in ``shop/receivers.py``."""
    with _started(
        ["-m", "django", "pglisten"],
        "^pglisten: ready",
        {"BENCHMARK_DATABASE": alias, "BENCHMARK_RECEIVER": receiver, **(environ or {})},
    ) as listener:
        yield listener


@contextmanager
def naive(alias: str) -> Iterator[Listener]:
    from benchmarks.shop.models import Naive, NaiveLoad
    from benchmarks.shop.naive import BURST

    channels = [BURST, Naive._meta.label_lower, NaiveLoad._meta.label_lower]
    with _started(
        ["-m", "benchmarks.peers.naive", dsn(alias), *channels], "^ready", {}
    ) as listener:
        yield listener
