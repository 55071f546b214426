"""Django's ``tests/cache``, out of the source distribution of the installed version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import django

from tests.processes import ROOT

#: Beside the environments of the matrix: ``make clean`` removes both.
FOLDER = ROOT / ".venvs" / "django-source"
#: Seconds; the distribution has eleven megabytes.
TIMEOUT = 240


class CannotFetch(Exception):
    """pip did not get the source distribution; the message ends with pip's last line."""


def fetch(version: str | None = None) -> Path:
    """A folder in which ``cache`` is Django's package of cache tests.

    Raises:
        CannotFetch: it is not here yet, and pip could not get it.
    """
    version = version or django.get_version()
    folder = FOLDER / version
    if not (folder / "cache" / "tests.py").exists():
        _download(version, folder)
    return folder


def _download(version: str, folder: Path) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix="download-") as scratch:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--no-binary", "django", "--dest", scratch, f"django=={version}",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command,
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise CannotFetch(f"pip took more than {TIMEOUT} s for Django {version}") from None
        archives = list(Path(scratch).glob("*.tar.gz"))
        if done.returncode or not archives:
            said = (done.stdout.splitlines() or ["nothing"])[-1]
            raise CannotFetch(f"pip did not get the source of Django {version}: {said[:300]}")
        unpacked = Path(scratch) / "unpacked"
        _unpack(archives[0], unpacked)
        try:
            os.rename(unpacked, folder)
        except OSError:
            # Another run was faster.
            if not (folder / "cache" / "tests.py").exists():
                raise


def _unpack(archive: Path, folder: Path) -> None:
    """Write ``tests/cache`` of the archive to ``folder/cache``, and the licence beside it."""
    with tarfile.open(archive) as members:
        for member in members:
            inside = PurePosixPath(member.name).parts[1:]
            if inside == ("LICENSE",):
                target = folder / "LICENSE"
            elif inside[:2] == ("tests", "cache") and len(inside) == 3:
                target = folder / "cache" / inside[2]
            else:
                continue
            content = members.extractfile(member)
            if content is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("wb") as copy:
                    shutil.copyfileobj(content, copy)
