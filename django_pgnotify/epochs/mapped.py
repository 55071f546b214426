"""The file of an epoch table: made by whoever comes first, checked by everybody, mapped.

All of it happens under ``flock``, which the kernel lifts when its holder dies, whatever it had come
to. Nothing here ever shortens a file: to touch a mapped page that is gone would kill the process.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from ..exceptions import InvalidEpochTable
from .clock import WRITERS, boot_id, node_clock, wall_clock

HEADER_WORDS = 512
"""64-bit words before the first slot: a page."""

FORMAT = 1
_MAGIC = int.from_bytes(b"pgnepoch", "little")

# Words of the header.
MAGIC, VERSION, SLOTS, TABLE_ID, BOOT_ID, OWNER, WRITER, GLOBAL, HEARTBEAT, LATEST = range(10)

IS_SUPPORTED = fcntl is not None
"""Whether processes can share a table here; where not, each has its own."""

MODE = 0o600
LOCK_TIMEOUT = 3.0
"""Seconds to wait for another process that is making the file."""

_LOCK_PAUSE = 0.01


class Mapping(NamedTuple):
    """The words of a mapped file, and what it is known by."""

    words: memoryview
    identity: tuple[int, int, int]
    """Device, inode and size."""


def size_of(slots: int) -> int:
    """Bytes of a table."""
    return (HEADER_WORDS + slots) * 8


def identity_of(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_size


def map_file(path: str, slots: int, owner: int) -> Mapping:
    """Map the table at ``path``, made if there is none, begun anew if it is of another boot.

    Args:
        owner: 64 bits that stand for what the table is about; another owner's is refused.

    Raises:
        InvalidEpochTable: it cannot be made or mapped, or is not what it should be.
    """
    try:
        return _map_file(path, slots, owner)
    except OSError as exc:
        raise InvalidEpochTable(
            f"Epoch table {path!r}: {exc.strerror or exc}; it takes {size_of(slots)} bytes."
        ) from exc


def _map_file(path: str, slots: int, owner: int) -> Mapping:
    with _locked(path) as fd:
        if os.fstat(fd).st_size == 0:
            _reserve(fd, size_of(slots))
        status = os.fstat(fd)
        if status.st_size < HEADER_WORDS * 8 or status.st_size % 8:
            raise _invalid(path, f"it has {status.st_size} bytes, which no table has")
        words = memoryview(mmap.mmap(fd, status.st_size)).cast("Q")
        try:
            _check_header(path, words, slots, owner)
        except InvalidEpochTable:
            _unmap(words)
            raise
        return Mapping(words, identity_of(status))


def _reserve(fd: int, size: int) -> None:
    """Have the file be so many zero bytes.

    That they are promised is not enough: on a full file system an access would kill the process.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
        return
    written = 0
    while written < size:  # macOS
        written += os.pwrite(fd, bytes(size - written), written)


def claim_writer(path: str, identity: tuple[int, int, int], words: memoryview) -> int:
    """A number for this process to end its stamps with, that no recent one had."""
    try:
        with _locked(path) as fd:
            if identity_of(os.fstat(fd)) == identity:
                words[WRITER] += 1
                return int(words[WRITER]) % WRITERS
    except (InvalidEpochTable, OSError):
        pass  # taken away meanwhile, as whoever looks will find
    return secrets.randbelow(WRITERS)


@contextmanager
def _locked(path: str) -> Iterator[int]:
    """A descriptor of the file at ``path``, locked against other processes."""
    give_up_at = time.monotonic() + LOCK_TIMEOUT
    while True:
        fd = _open(path)
        try:
            _check_file(path, os.fstat(fd))
            _lock(path, fd, give_up_at)
            if os.fstat(fd).st_nlink:
                yield fd
                return
        finally:
            # By name: a mapping, or a child forked meanwhile, has the same open file still.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)
        # Removed between open and lock: what is there now is what others will map.


def _open(path: str) -> int:
    if not IS_SUPPORTED:
        raise InvalidEpochTable(
            f"Epoch table {path!r}: this platform has no flock; set PGNOTIFY_EPOCH_TABLE = None."
        )
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags, MODE)
    except OSError as exc:
        if exc.errno == errno.ENOENT:
            raise InvalidEpochTable(
                f"Epoch table {path!r} cannot be made: the folder {os.path.dirname(path)!r} does "
                f"not exist. Make it, as the user whom all processes of the node run as, or name "
                f"another file in PGNOTIFY_EPOCH_TABLE."
            ) from exc
        why = exc.strerror or str(exc)
        if exc.errno == errno.ELOOP:
            why = "it is a symbolic link"
        elif exc.errno in (errno.EACCES, errno.EPERM):
            why = f"{why}: it is another user's, or its folder is not ours to write to"
        raise InvalidEpochTable(
            f"Epoch table {path!r} cannot be opened: {why}. All processes of a node that share "
            f"the table run as one user; name a file of theirs in PGNOTIFY_EPOCH_TABLE."
        ) from exc


def _lock(path: str, fd: int, give_up_at: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                raise InvalidEpochTable(
                    f"Epoch table {path!r} has been locked by another process for "
                    f"{LOCK_TIMEOUT:g} s; is one stopped while it makes the file?"
                ) from None
            time.sleep(_LOCK_PAUSE)


def _check_file(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _invalid(path, "it is no regular file")
    if status.st_uid != os.geteuid():
        raise _invalid(path, f"it belongs to user {status.st_uid}, and we are {os.geteuid()}")
    if status.st_mode & 0o022:
        mode = stat.S_IMODE(status.st_mode)
        raise _invalid(path, f"others may write to it (mode {mode:04o}, not {MODE:04o})")


def _check_header(path: str, words: memoryview, slots: int, owner: int) -> None:
    """Fill in the header of a new file, or raise InvalidEpochTable unless it is this table's."""
    if words[MAGIC] == 0 and not any(words[:HEADER_WORDS]):
        _begin(words, owner)
    if words[MAGIC] != _MAGIC:
        raise _invalid(path, "it does not begin as one")
    if words[VERSION] != FORMAT:
        raise _invalid(path, f"it is of format {words[VERSION]}, and this version has {FORMAT}")
    if size_of(words[SLOTS]) != words.nbytes:
        raise _invalid(
            path,
            f"it has {words.nbytes} bytes, and {words[SLOTS]} slots take {size_of(words[SLOTS])}",
        )
    if words[SLOTS] != slots:
        raise _invalid(path, f"it has {words[SLOTS]} slots, and PGNOTIFY_EPOCH_SLOTS says {slots}")
    if words[OWNER] != owner:
        raise _invalid(path, "it is that of another database or PGNOTIFY_CHANNEL_PREFIX")
    # Not every system has a boot id; a heartbeat that is still to come is one of before, too.
    if words[BOOT_ID] != boot_id() or words[HEARTBEAT] > node_clock():
        _begin(words, owner)


def _begin(words: memoryview, owner: int) -> None:
    words[HEARTBEAT] = 0
    words[TABLE_ID] = secrets.randbits(64)
    words[WRITER] += 1
    words[GLOBAL] = words[LATEST] = wall_clock() * WRITERS + words[WRITER] % WRITERS
    words[BOOT_ID] = boot_id()
    words[VERSION] = FORMAT
    words[SLOTS] = words.nbytes // 8 - HEADER_WORDS
    words[OWNER] = owner
    words[MAGIC] = _MAGIC  # last: what has it is whole


def _invalid(path: str, why: str) -> InvalidEpochTable:
    return InvalidEpochTable(
        f"{path!r} is no epoch table to use: {why}. Remove it when no process uses it, or name "
        f"another file in PGNOTIFY_EPOCH_TABLE."
    )


def _unmap(words: memoryview) -> None:
    mapped = words.obj
    words.release()
    if isinstance(mapped, mmap.mmap):
        mapped.close()
