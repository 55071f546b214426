"""A Redis for tests and benchmarks: Debian's ``redis-server``, on the loopback interface."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from example_project.embedded import HOST, free_port
from tests.processes import Process


def missing() -> str | None:
    """What a Redis cache lacks here; None where it can be used."""
    if shutil.which("redis-server") is None:
        return "there is no redis-server (Debian: redis-server)"
    if importlib.util.find_spec("redis") is None:
        return "the package redis is not installed"
    return None


@contextmanager
def redis_server() -> Iterator[str]:
    """Start one that keeps nothing on disk; its URL."""
    port = free_port()
    arguments = ["--port", str(port), "--bind", HOST, "--save", "", "--appendonly", "no"]
    with Process(["redis-server", *arguments]) as process:
        process.wait_for_line("Ready to accept connections")
        yield f"redis://{HOST}:{port}/0"
