"""Compiles ``libpq.c`` where there is a C compiler and libpq with its headers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from benchmarks.frame import CannotRun

SOURCE = Path(__file__).with_suffix(".c")


def compiled(folder: Path) -> Path:
    """The program, in ``folder``."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise CannotRun("there is no C compiler (cc)")
    pg_config = shutil.which("pg_config")
    if pg_config is None:
        raise CannotRun("there is no pg_config, and so no headers of libpq (Debian: libpq-dev)")
    include, library = (
        subprocess.run([pg_config, what], check=True, capture_output=True, text=True).stdout.strip()
        for what in ("--includedir", "--libdir")
    )
    program = folder / "libpq"
    done = subprocess.run(
        [compiler, "-O2", f"-I{include}", str(SOURCE), f"-L{library}", "-lpq", "-o", str(program)],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise CannotRun(f"libpq.c does not compile: {done.stderr.strip().splitlines()[-1]}")
    return program
