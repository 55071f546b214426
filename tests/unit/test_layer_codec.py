"""What the channel layer puts into a NOTIFY: every byte survives, in every encoding of a server."""

from __future__ import annotations

import base64
import builtins
import hashlib
from collections.abc import Sequence
from typing import Any

import msgpack
import pytest
from cryptography.fernet import Fernet, InvalidToken
from hypothesis import given, settings
from hypothesis import strategies as st

from django_pgnotify.exceptions import InvalidArgument, PgNotifyError
from django_pgnotify.layers import codec as module
from django_pgnotify.layers.codec import ADD, DIRECT, GROUP, WAKE, Codec, crypt_of, unpack
from django_pgnotify.wire import PAYLOAD_LIMIT

PLAIN = Codec()
SECRET = Codec(crypt_of(["a key"]))

names = st.text("abcXYZ019._-", min_size=1, max_size=100)
bodies = st.one_of(
    st.binary(max_size=300),
    st.binary(min_size=1500, max_size=4000),
    st.builds(
        lambda byte, size: byte * size, st.binary(min_size=1, max_size=1), st.integers(0, 7000)
    ),
)
entries = st.lists(st.tuples(st.sampled_from([GROUP, DIRECT]), names, bodies), max_size=30)


def packed(codec: Codec, parts: Sequence[tuple[int, str, Any]], *, utf8: bool) -> list[bytes]:
    """Those that fit, packed."""
    found = [codec.entry(*part) for part in parts]
    return [entry for entry in found if codec.fits(entry, utf8=utf8)]


def check(codec: Codec, ready: list[bytes], *, utf8: bool, first: int = 0) -> list[bytes]:
    """Frames of these entries, which say the same in the same order."""
    frames = codec.frames(ready, utf8=utf8, first=first)
    for frame in frames:
        assert len(frame) <= PAYLOAD_LIMIT
        assert "\x00" not in frame.decode("utf-8" if utf8 else "ascii")
    assert len(set(frames)) == len(frames), "equal ones would fold into one"
    opened = [entry for frame in frames for entry in codec.open(frame)]
    assert opened == [msgpack.unpackb(entry, use_list=False) for entry in ready]
    return frames


@settings(deadline=None, max_examples=150)
@given(entries, st.booleans(), st.integers(0, 300))
def test_entries_come_out_as_they_went_in(
    parts: list[tuple[int, str, bytes]], utf8: bool, first: int
) -> None:
    ready = packed(PLAIN, parts, utf8=utf8)
    if ready:
        check(PLAIN, ready, utf8=utf8, first=first)


@settings(deadline=None, max_examples=40)
@given(entries)
def test_encrypted_entries_come_out_as_they_went_in(parts: list[tuple[int, str, bytes]]) -> None:
    ready = packed(SECRET, parts, utf8=True)
    if ready:
        check(SECRET, ready, utf8=False)


@pytest.mark.parametrize("byte", [b"a", b"\x00", b"\x7f", b"\x80", b"\xff"])
@pytest.mark.parametrize("utf8", [True, False])
def test_the_largest_entry_that_fits_makes_a_payload_that_postgresql_accepts(
    byte: bytes, utf8: bool
) -> None:
    sizes = [
        size
        for size in range(5_000, 8_000)
        if PLAIN.fits(PLAIN.entry(GROUP, "room", byte * size), utf8=utf8)
    ]
    [frame] = check(PLAIN, [PLAIN.entry(GROUP, "room", byte * max(sizes))], utf8=utf8, first=70_000)
    assert len(frame) > PAYLOAD_LIMIT - 60, "no room is given away"
    assert sizes == list(range(5_000, max(sizes) + 1)), "and what is smaller fits as well"


def test_text_hardly_grows() -> None:
    message = PLAIN.message({"type": "chat.said", "text": "A line of text, as they are. " * 20})
    [frame] = PLAIN.frames([PLAIN.entry(GROUP, "room", message)], utf8=True)
    assert len(frame) < 1.05 * len(message)


def test_many_small_entries_share_a_frame() -> None:
    small = [PLAIN.entry(GROUP, "room", b"x" * 100) for _ in range(60)]
    assert len(PLAIN.frames(small, utf8=True)) == 1


def test_equal_entries_never_make_equal_frames() -> None:
    large = [PLAIN.entry(GROUP, "room", b"\xff" * 5_900) for _ in range(300)]
    check(PLAIN, large, utf8=True)
    check(PLAIN, large, utf8=False)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"x",
        b"u",
        b"b",
        b"b====",
        b"bAA==",
        b"e",
        b"u\xff",
        "u\u0101".encode(),
        b'{"pgnotify":1}',
    ],
)
def test_what_is_no_frame_is_refused(payload: bytes) -> None:
    with pytest.raises(Exception, match=r"\w"):
        PLAIN.open(payload)


@pytest.mark.parametrize(
    "entry",
    [
        (GROUP, "room", "text"),
        (GROUP, b"room", b""),
        (GROUP, "room", None),
        (GROUP, "room", True),
        (ADD, "room", b"bytes"),
        (WAKE, "x", 1),
        (99, "room", b""),
        (-1, "room", b""),
        (True, "room", b""),
        (GROUP, "room"),
        (GROUP, "room", b"", b""),
        7,
    ],
)
def test_what_is_no_entry_is_refused(entry: Any) -> None:
    payload = module._base64(msgpack.packb([0, entry]))
    with pytest.raises((ValueError, TypeError, KeyError)):
        PLAIN.open(payload)


def test_without_the_key_nothing_can_be_read_and_nothing_said() -> None:
    entry = SECRET.entry(GROUP, "room", SECRET.message({"type": "secret"}))
    [frame] = SECRET.frames([entry], utf8=True)
    assert b"room" not in frame
    assert b"secret" not in frame
    for stranger in (PLAIN, Codec(crypt_of(["another key"]))):
        [forged] = stranger.frames([entry], utf8=True)
        for codec, payload in ((stranger, frame), (SECRET, forged)):
            with pytest.raises((ValueError, InvalidToken)):
                codec.open(payload)


def test_the_first_key_encrypts_and_all_of_them_decrypt() -> None:
    old, both, new = (Codec(crypt_of(keys)) for keys in (["old"], ["new", "old"], [b"new"]))
    entry = old.entry(GROUP, "room", b"x")
    assert both.open(old.frames([entry], utf8=True)[0]) == [(GROUP, "room", b"x")]
    assert new.open(both.frames([entry], utf8=True)[0]) == [(GROUP, "room", b"x")]
    assert new.unseal(both.seal(b"stored")) == b"stored"
    assert PLAIN.unseal(PLAIN.seal(b"stored")) == b"stored"


def test_keys_are_those_of_channels_redis() -> None:
    """Its derivation: the SHA-256 of the key, in base64, is Fernet's key."""
    theirs = Fernet(base64.urlsafe_b64encode(hashlib.sha256(b"a key").digest()))
    assert theirs.decrypt(SECRET.seal(b"x")) == b"x"


@pytest.mark.parametrize("keys", ["text", b"bytes", [], [""], [7], [None], ["good", ""]])
def test_keys_that_cannot_work_are_refused_and_not_shown(keys: Any) -> None:
    with pytest.raises(InvalidArgument, match="symmetric_encryption_keys") as caught:
        crypt_of(keys)
    assert "good" not in str(caught.value)
    assert "text" not in str(caught.value).replace("a text", "")


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(PgNotifyError, match=r"django-pgnotify\[encryption\]"):
        crypt_of(["a key"])
    assert crypt_of(None) is None


@pytest.mark.parametrize("message", [None, "text", ["list"], b"bytes", 7])
def test_a_message_is_a_dict(message: Any) -> None:
    with pytest.raises(TypeError):
        PLAIN.message(message)
    with pytest.raises(ValueError, match="not a message"):
        unpack(msgpack.packb(message))


def test_a_message_that_cannot_be_packed_leaves_no_trace_in_the_next() -> None:
    with pytest.raises(TypeError):
        PLAIN.message({"type": "x", "first": "y" * 100, "bad": object()})
    assert unpack(PLAIN.message({"type": "x"})) == {"type": "x"}
