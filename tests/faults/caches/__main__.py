"""The processes of a check: ``python -m tests.faults.caches writer|reader|forking ...``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import django


def write(number: str, node: str, seed: str, folder: str, first: str, last: str) -> None:
    from tests.faults.caches.writer import Writer

    rows = range(int(first), int(last))
    writer = Writer(int(number), int(node), seed, Path(folder), rows)
    signal.signal(signal.SIGTERM, lambda *_: writer.stopping.set())
    print("writing", flush=True)
    writer.run()
    print("kinds", *(f"{kind}={count}" for kind, count in writer.kinds.items()), flush=True)


def read(name: str, seed: str, folder: str) -> None:
    from tests.faults.caches.reader import read_here
    from tests.faults.caches.ways import ways

    read_here(name, seed, Path(folder), ways())


def fork(name: str, seed: str, folder: str, count: str) -> None:
    from tests.faults.caches.reader import fork_readers
    from tests.faults.caches.ways import ways

    fork_readers(int(count), name, seed, Path(folder), ways())


if __name__ == "__main__":
    programs: dict[str, Callable[..., None]] = {"writer": write, "reader": read, "forking": fork}
    django.setup()
    programs[sys.argv[1]](*sys.argv[2:])
