"""What the caches of a node count, over all its processes and since the table was made.

Each process writes its own counts to a file in a folder beside the epoch table, and holds a lock on
it for as long as it lives, so that nobody has to guess from a process id whether it does. Whoever
adds them up takes the last counts of a process that has ended into the file ``ended``.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, where no table is shared, and so no counts are either
    fcntl = None  # type: ignore[assignment]

Counts = dict[str, dict[str, Any]]
"""By cache: numbers by name, and under ``tags`` numbers by name for each tag."""

GAUGES = ("entries", "processes")
"""Numbers that end with the process."""

MOST_TAGS = 200
OTHER_TAGS = "(others)"

_LATEST_FOR = 1.0
_LOCK_TRIES = 20
_LOCK_PAUSE = 0.002
_ENDED = "ended"
_SUFFIX = ".json"
_MODE = 0o700
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


class CountsFile:
    """The counts of this process, where the others of the node find them."""

    def __init__(self, table: str) -> None:
        self.table = table
        self._fd: int | None = None
        self._path: Path | None = None

    def write(self, counts: Counts) -> None:
        """Replace what this process has said before.

        Raises:
            OSError: there is no place for it.
        """
        if not self._is_there():
            self._make()
        assert self._fd is not None
        text = json.dumps(counts).encode()
        # The end of the text goes last: until then it is no JSON, and the reader looks again.
        os.pwrite(self._fd, text[:-1].ljust(len(text)), 0)
        os.ftruncate(self._fd, len(text))
        os.pwrite(self._fd, text[-1:], len(text) - 1)

    @property
    def is_removed(self) -> bool:
        """Whether somebody has taken away what was written."""
        return self._fd is not None and not self._is_there()

    def close(self) -> None:
        """Let go of it: the counts in it become those of a process that has ended."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _is_there(self) -> bool:
        if self._fd is None or self._path is None:
            return False
        try:
            return self._path.stat().st_ino == os.fstat(self._fd).st_ino
        except OSError:
            return False

    def _make(self) -> None:
        self.close()
        folder = _folder(self.table, make=True)
        assert folder is not None
        with _locked(folder):  # a file without a lock is one that is added up and removed
            path = folder / f"{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
            self._fd = os.open(path, _FLAGS | os.O_EXCL, 0o600)
            self._path = path
            fcntl.flock(self._fd, fcntl.LOCK_EX)


def node_counts(table: str) -> Counts:
    """The counts of all processes of the node, those that have ended included.

    Args:
        table: path of the node's epoch table.

    Raises:
        OSError: they cannot be read now.
    """
    folder = _folder(table, make=False)
    if folder is None:
        return {}
    total: Counts = {}
    with _locked(folder) as fd:
        ended = _read(fd) or {}
        gone: list[Path] = []
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            counts, alive = _look(path)
            if alive:
                for cache in counts.values():
                    cache["processes"] = 1
                add(total, counts)
            else:
                _without_gauges(counts)
                add(ended, counts)
                gone.append(path)
        if gone:
            _write(fd, ended)
            for path in gone:
                path.unlink(missing_ok=True)
        add(total, ended)
    return total


_latest: dict[str, tuple[float, Counts]] = {}


def latest_counts(table: str) -> Counts:
    """As :func:`node_counts`, a second old at most where they can be read, and never raising."""
    now = time.monotonic()
    read_at, counts = _latest.get(table, (float("-inf"), {}))
    if now - read_at > _LATEST_FOR:
        with suppress(OSError):
            counts = node_counts(table)
        _latest[table] = (now, counts)
    return counts


def add(total: Counts, more: Mapping[str, Mapping[str, Any]]) -> None:
    """Add ``more`` to ``total``, in place."""
    for cache, counts in more.items():
        into = total.setdefault(cache, {})
        for name, value in counts.items():
            if name != "tags":
                into[name] = into.get(name, 0) + value
                continue
            tags = into.setdefault("tags", {})
            for tag, numbers in value.items():
                full = tag not in tags and len(tags) >= MOST_TAGS
                of_tag = tags.setdefault(OTHER_TAGS if full else tag, {})
                for each, number in numbers.items():
                    of_tag[each] = of_tag.get(each, 0) + number


def busiest(tags: Mapping[str, Mapping[str, int]], most: int) -> dict[str, dict[str, int]]:
    """The tags with the most look-ups, these first."""
    ranked = sorted(tags.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    return {tag: dict(numbers) for tag, numbers in ranked[:most]}


def _without_gauges(counts: Counts) -> None:
    for cache in counts.values():
        for name in GAUGES:
            cache.pop(name, None)


def _folder(table: str, *, make: bool) -> Path | None:
    """Where the counts are, if it is a folder of ours."""
    folder = Path(f"{table}.counts")
    if make:
        with suppress(FileExistsError):
            folder.mkdir(mode=_MODE)
    try:
        status = folder.stat(follow_symlinks=False)
    except OSError:
        if make:
            raise
        return None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        if make:
            raise PermissionError(f"{str(folder)!r} is no folder of this user")
        return None
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """A descriptor of the file ``ended``, locked against everybody else."""
    fd = os.open(folder / _ENDED, _FLAGS, 0o600)
    try:
        # Not for as long as it takes: a process that is stopped may hold it.
        for tries_left in reversed(range(_LOCK_TRIES)):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not tries_left:
                    raise
                time.sleep(_LOCK_PAUSE)
        yield fd
    finally:
        os.close(fd)


def _look(path: Path) -> tuple[Counts, bool]:
    """What a process has written, and whether it lives."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return {}, False
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            alive = False
        except BlockingIOError:
            alive = True
        return _read(fd) or {}, alive
    finally:
        os.close(fd)


def _read(fd: int) -> Counts | None:
    """The counts in a file; None if there are none, or another process is writing them."""
    for _ in range(3):
        text = os.pread(fd, 1 << 22, 0)
        if not text:
            return None
        try:
            found: Counts = json.loads(text)
        except ValueError:
            continue
        return found if isinstance(found, dict) else None
    return None


def _write(fd: int, counts: Counts) -> None:
    text = json.dumps(counts).encode()
    os.pwrite(fd, text, 0)
    os.ftruncate(fd, len(text))
