"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from example_project.embedded import EmbeddedPostgres

PACKAGES = (
    *("django", "psycopg", "django-pgnotify", "msgspec", "django-pgpubsub"),
    *("channels", "channels-redis", "redis", "channels-postgres"),
)


def facts(server: EmbeddedPostgres) -> dict[str, str]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "CPU": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "WAL flush": _flush(server),
        "PostgreSQL": server.execute("SHOW server_version"),
        "Python": platform.python_version(),
        "redis-server": _redis(),
        **{package: _version(package) for package in PACKAGES},
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _redis() -> str:
    program = shutil.which("redis-server")
    if program is None:
        return "not installed"
    found = re.search(r"v=(\S+)", subprocess.check_output([program, "--version"], text=True))
    return found[1] if found else "unknown"


def _flush(server: EmbeddedPostgres) -> str:
    """How long fdatasync takes where the data is; pg_test_fsync would take a minute."""
    block, times = bytes(8192), []
    with tempfile.TemporaryFile(dir=server.data_dir) as file:
        for _ in range(200):
            file.seek(0)
            file.write(block)
            file.flush()
            begun = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begun)
    return f"{sorted(times)[len(times) // 2] * 1e6:.0f} µs (fdatasync of 8 kB, median)"
