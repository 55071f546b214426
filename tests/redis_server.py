"""A redis-server of one's own, for what is tested or measured beside the channel layer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from example_project.embedded import free_port
from tests.processes import Process

MISSING = "no redis-server here (Debian: redis-server)"


def available() -> bool:
    return shutil.which("redis-server") is not None


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
    options = {"port": port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "daemonize": "no"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with Process([program, *arguments]) as process:
        process.wait_for_line("Ready to accept connections")
        yield f"redis://127.0.0.1:{port}/0"
