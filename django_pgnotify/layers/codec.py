"""What the layer puts into a NOTIFY: frames of entries, packed by msgpack, as text.

A frame is an array of a number (equal payloads of one transaction would fold into one) and of
entries ``(kind, name, body)``. A NOTIFY carries text of the server's encoding without NUL, so the
packed bytes become, behind a letter that says which:

===== =============================================================================================
``u`` one character each, that of Latin-1, and NUL as U+0100. Where the server's encoding is UTF-8:
      text hardly grows, and no byte takes more than two.
``b`` base64: ASCII, so it passes through every encoding
``e`` a Fernet token, which is ASCII already
===== =============================================================================================
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgpack

from ..exceptions import InvalidArgument, PgNotifyError
from ..wire import PAYLOAD_LIMIT

GROUP, DIRECT, ADD, DONE, DISCARD, FLUSH, WAKE = range(7)
"""Kinds of entries: a message to a group, or to a channel (the body is the message, or the number
of the row that holds it); have a channel join a group (the body is the channel, a nonce, and the
token of who asks), that is done (the name is the nonce), have it leave, likewise; forget all; there
is a row for a normal channel."""

_LIMIT = PAYLOAD_LIMIT - 1 - 14
"""Bytes for entries: less the letter, and the array's head and number, of two bytes a byte."""
_RAW_LIMIT = PAYLOAD_LIMIT // 4 * 3 - 8
_SEALED_LIMIT = _RAW_LIMIT - 57 - 16  # version, time, IV and MAC of a token; padding to a block

_NUL = "\u0100"

_ALONE = msgpack.Packer().pack_array_header(2) + msgpack.packb(0)
"""The head of a frame of one entry, numbered 0."""


class Crypt(Protocol):
    def encrypt(self, data: bytes) -> bytes: ...
    def decrypt(self, token: bytes) -> bytes: ...


def crypt_of(keys: Iterable[str | bytes] | None) -> Crypt | None:
    """What encrypts with the first of ``keys`` and decrypts with any; None without keys.

    A key may be any text: its SHA-256 is what Fernet is given, as in channels_redis.

    Raises:
        InvalidArgument: ``keys`` is no list of texts, or has none.
        PgNotifyError: the library ``cryptography`` is missing.
    """
    if keys is None:
        return None
    chosen = [] if isinstance(keys, (str, bytes)) else list(keys)
    if not chosen or not all(isinstance(key, (str, bytes)) and key for key in chosen):
        # Not the value: it is secret.
        raise InvalidArgument(
            "symmetric_encryption_keys= is a list of keys, each a text or bytes and not empty; "
            f"got {type(keys).__name__} with {len(chosen)} entries."
        )
    try:
        from cryptography.fernet import Fernet, MultiFernet
    except ImportError as exc:
        raise PgNotifyError(
            "symmetric_encryption_keys= needs the library cryptography: "
            "pip install 'django-pgnotify[encryption]'."
        ) from exc

    def fernet(key: str | bytes) -> Fernet:
        digest = hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
        return Fernet(base64.urlsafe_b64encode(digest))

    return MultiFernet([fernet(key) for key in chosen])


class Codec:
    """Packs entries into payloads, and takes them out again.

    Args:
        crypt: encrypts every frame and every stored message; None leaves them readable.
    """

    def __init__(self, crypt: Crypt | None = None) -> None:
        self._crypt = crypt
        self._pack = msgpack.Packer(autoreset=True).pack

    def message(self, message: dict[str, Any]) -> bytes:
        """A message packed, or a TypeError."""
        if not isinstance(message, dict):
            raise TypeError(f"A channel layer message is a dict; got {message!r}.")
        packed: bytes = self._pack(message)
        return packed

    def entry(self, kind: int, name: str, body: bytes | int | str) -> bytes:
        packed: bytes = self._pack((kind, name, body))
        return packed

    def fits(self, entry: bytes, *, utf8: bool) -> bool:
        """Whether a frame can hold this packed entry."""
        if self._crypt is not None:
            return len(entry) <= _SEALED_LIMIT
        return len(entry) <= _RAW_LIMIT or (utf8 and _cost(entry) <= _LIMIT)

    def frames(self, entries: Sequence[bytes], *, utf8: bool, first: int = 0) -> list[bytes]:
        """Packed entries as payloads, in order; each entry must fit.

        Args:
            first: number of the first frame; those of one statement must differ.
        """
        if self._crypt is not None:
            return [
                b"e" + self._crypt.encrypt(_array(part, number))
                for number, part in enumerate(_parts(entries, len, _SEALED_LIMIT), first)
            ]
        if not utf8:
            return [
                _base64(_array(part, number))
                for number, part in enumerate(_parts(entries, len, _RAW_LIMIT), first)
            ]
        if len(entries) == 1 and 2 * len(entries[0]) <= _LIMIT and not first:
            return [_utf8(_ALONE + entries[0])]  # as nearly always
        if 2 * sum(map(len, entries)) <= _LIMIT:  # no need to look closer
            return [_utf8(_array(entries, first))]
        payloads = []
        for number, part in enumerate(_parts(entries, _cost, _LIMIT), first):
            payload = _utf8(_array(part, number))
            if len(payload) > PAYLOAD_LIMIT:  # one entry alone, of bytes that take two each
                payload = _base64(_array(part, number))
            payloads.append(payload)
        return payloads

    def open(self, payload: bytes) -> list[tuple[int, str, Any]]:
        """The entries of a payload.

        Raises:
            Exception: it is none of ours; which one depends on what it is instead.
        """
        letter, rest = payload[:1], payload[1:]
        if self._crypt is not None:
            if letter != b"e":
                raise ValueError("not encrypted")
            packed = self._crypt.decrypt(rest)
        elif letter == b"u":
            packed = rest.decode().replace(_NUL, "\x00").encode("latin-1")
        elif letter == b"b":
            packed = binascii.a2b_base64(rest, strict_mode=True)
        else:
            raise ValueError("not a frame")
        entries: list[tuple[int, str, Any]]
        _, *entries = msgpack.unpackb(packed, use_list=False)
        for kind, name, body in entries:
            if type(kind) is not int or type(name) is not str or type(body) not in _BODIES[kind]:
                raise ValueError("not an entry")
        return entries

    def seal(self, body: bytes) -> bytes:
        """What a row holds of a packed message."""
        return body if self._crypt is None else self._crypt.encrypt(body)

    def unseal(self, stored: bytes) -> bytes:
        """The packed message that a row holds; raises whatever a wrong key leads to."""
        return stored if self._crypt is None else self._crypt.decrypt(stored)


_BODIES: dict[int, tuple[type, ...]] = {
    GROUP: (bytes, int),
    DIRECT: (bytes, int),
    ADD: (str,),
    DONE: (bytes,),
    DISCARD: (str,),
    FLUSH: (bytes,),
    WAKE: (bytes,),
}


def unpack(packed: bytes) -> dict[Any, Any]:
    """A message as it was before it was packed; raises whatever other bytes lead to."""
    message = msgpack.unpackb(packed, strict_map_key=False)
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


def _parts(entries: Sequence[bytes], cost: Any, limit: int) -> Iterable[list[bytes]]:
    part: list[bytes] = []
    size = 0
    for entry in entries:
        needs = cost(entry)
        if part and size + needs > limit:
            yield part
            part, size = [], 0
        part.append(entry)
        size += needs
    if part:
        yield part


def _array(entries: Sequence[bytes], number: int) -> bytes:
    head: bytes = msgpack.Packer().pack_array_header(len(entries) + 1)
    return b"".join((head, msgpack.packb(number), *entries))


def _cost(packed: bytes) -> int:
    """Bytes that these take in a payload."""
    return len(packed.decode("latin-1").encode()) + packed.count(0)


def _utf8(packed: bytes) -> bytes:
    return b"u" + packed.decode("latin-1").replace("\x00", _NUL).encode()


def _base64(packed: bytes) -> bytes:
    return b"b" + binascii.b2a_base64(packed, newline=False)
