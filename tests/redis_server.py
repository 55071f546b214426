"""A Redis for tests and benchmarks: Debian's ``redis-server``, on the loopback interface."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from example_project.embedded import HOST, free_port
from tests.processes import Process

MISSING = "no redis-server here (Debian: redis-server)"


def available() -> bool:
    return shutil.which("redis-server") is not None


def missing() -> str | None:
    """What a Redis cache lacks here; None where it can be used."""
    if not available():
        return MISSING
    if importlib.util.find_spec("redis") is None:
        return "the package redis is not installed"
    return None


@contextmanager
def redis_server() -> Iterator[str]:
    """Its URL; it keeps nothing on disk and ends with the block.

    Raises:
        FileNotFoundError: it is not installed.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise FileNotFoundError(MISSING)
    port = free_port()
    arguments = ["--port", str(port), "--bind", HOST, "--save", "", "--appendonly", "no"]
    with Process([program, *arguments]) as process:
        process.wait_for_line("Ready to accept connections")
        yield f"redis://{HOST}:{port}/0"
