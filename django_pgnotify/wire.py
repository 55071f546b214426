"""What travels through PostgreSQL: wire channels, frames and the events inside them.

A frame is one NOTIFY payload, UTF-8 JSON that any language can read::

    {"pgnotify":1,"source":"web1:4711","events":[{"id":"…","action":"updated",…},…]}

With signing there is a ``"sig"`` right behind the version; it covers the wire channel and every
character behind itself. A payload that does not begin as a frame is foreign: one value.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from .events import Action
from .exceptions import FrameError
from .strict_json import MAX_DEPTH, Encoder, NestedTooDeeply, dumps, loads, text_of

PAYLOAD_LIMIT = 7999
"""Bytes in a NOTIFY payload: PostgreSQL refuses 8000 (NOTIFY_PAYLOAD_MAX_LENGTH, async.c)."""

CHANNEL_LIMIT = 63
"""Bytes in a channel name (NAMEDATALEN - 1). LISTEN would cut a longer one without a word."""

VERSION = 1

_FRAME_START = re.compile(r'\s*\{\s*"pgnotify"\s*:')
_SIGNED_START = re.compile(r'\{"pgnotify":1,"sig":"([^"\\]*)",')
_DIGEST_SIZE = 16

Sign = Callable[[str], str]
Verify = Callable[[str, str], bool]


def wire_channel(topic: str, prefix: str = "") -> str:
    """The PostgreSQL channel of a topic: prefix and name, hashed where that exceeds 63 bytes."""
    name = prefix + topic
    encoded = name.encode()
    if len(encoded) <= CHANNEL_LIMIT:
        return name
    digest = digest_of(name)
    head = encoded[: CHANNEL_LIMIT - len(digest) - 1].decode(errors="ignore")
    return f"{head}~{digest}"


def digest_of(text: str) -> str:
    """32 hexadecimal digits that stand for ``text`` (BLAKE2b, 128 bits)."""
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_SIZE).hexdigest()


# -- one event ------------------------------------------------------------------------------


class Outgoing(NamedTuple):
    """An event ready to leave: its JSON text, with what packing must know of it."""

    topic: str
    key: str | None
    body: str
    size: int


def encode_event(
    topic: str,
    action: Action,
    *,
    data: Any,
    at: float,
    encoder: Encoder,
    event_id: str,
    model: str | None = None,
    pk: Any = None,
    key: str | None = None,
    changed: Iterable[str] | None = None,
) -> Outgoing:
    """Encode one event.

    Args:
        at: when it was published, in seconds since the epoch.

    Raises:
        EventDataError: ``data`` or ``pk`` cannot be carried; the message names the path in it.
    """
    try:
        # Member by member: a dict made only to be encoded would double what an event costs.
        text = encoder.quick
        values = "{}" if data == {} else text(data)
        about = ""
        if model is not None:
            about = f',"model":{text_of(model)},"pk":{pk if type(pk) is int else text(pk)}'
        if key is not None:
            about += f',"key":{text_of(key)}'
        if changed is not None:
            about += f',"changed":{text(list(changed))}'
        if data is not None:
            about += f',"data":{values}'
        body = f'{{"id":"{event_id}","action":"{action}","at":{at!r}{about}}}'
        if values.count("[") + values.count("{") <= MAX_DEPTH:
            return Outgoing(topic, key, body, len(body) if body.isascii() else len(body.encode()))
    except (TypeError, ValueError, RecursionError):
        pass  # the slow way knows what is wrong, or how to carry it
    fields: dict[str, Any] = {"id": event_id, "action": action, "at": at}
    if model is not None:
        fields |= {"model": model, "pk": pk}
    optional = {"key": key, "changed": None if changed is None else list(changed), "data": data}
    fields |= {name: value for name, value in optional.items() if value is not None}
    body = dumps(fields, encoder.to_plain)
    return Outgoing(topic, key, body, byte_length(body))


def reference_to(event: Outgoing, row: int) -> Outgoing:
    """The event that stands for ``event``, which is stored in ``row`` because it is too big."""
    body = dumps({"ref": row, "digest": digest_of(event.body)}, _nothing_else)
    return Outgoing(event.topic, event.key, body, len(body))


def byte_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _nothing_else(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} is not JSON")


_SIZE = attrgetter("size")


# -- frames out -----------------------------------------------------------------------------


class FramePacker:
    """Packs events into as few frames as fit.

    Args:
        source: ``node:pid`` of the publisher.
        prefix: ``PGNOTIFY_CHANNEL_PREFIX``.
        sign: returns the signature of a text; None sends unsigned frames.
    """

    def __init__(self, source: str, prefix: str = "", sign: Sign | None = None) -> None:
        self._prefix = prefix
        self._sign = sign
        self._head = f'"source":{json.dumps(source)},"events":['
        overhead = len('{"pgnotify":1,') + len(self._head) + len("]}")
        if sign is not None:
            overhead += len(f'"sig":"{sign("")}",')
        self.room = PAYLOAD_LIMIT - overhead
        """Bytes that all the events of one frame may take, with the commas between them."""

    def fits(self, event: Outgoing) -> bool:
        return event.size <= self.room

    def fit(self, events: Iterable[Outgoing]) -> bool:
        """Whether each of them fits."""
        return max(map(_SIZE, events), default=0) <= self.room

    def pack(self, events: Sequence[Outgoing]) -> list[tuple[str, str]]:
        """Frames as (wire channel, payload), in the order in which they must be sent.

        Events of one topic keep their order, and so do events with the same explicit key on
        different topics. Each event must fit (:meth:`fits`).
        """
        if len({event.topic for event in events}) == 1:
            return self._pack_topic(events)
        done: list[tuple[str, str]] = []
        opened: dict[str, list[Outgoing]] = {}
        topic_of_key: dict[str, str] = {}
        for event in events:
            topic, key = event.topic, event.key
            if key is not None and topic_of_key.setdefault(key, topic) != topic:
                # Were the two topics packed apart, this one could overtake the earlier event.
                for together in opened.values():
                    done += self._pack_topic(together)
                opened, topic_of_key = {}, {key: topic}
            opened.setdefault(topic, []).append(event)
        for together in opened.values():
            done += self._pack_topic(together)
        return done

    def _pack_topic(self, events: Sequence[Outgoing]) -> list[tuple[str, str]]:
        """Frames of events of one topic, each filled before the next is begun."""
        topic = events[0].topic
        done: list[tuple[str, str]] = []
        bodies: list[str] = []
        left = self.room
        for _, _, body, size in events:
            if size > left:
                done.append(self._frame(topic, bodies))
                bodies, left = [], self.room
            bodies.append(body)
            left -= size + 1
        done.append(self._frame(topic, bodies))
        return done

    def _frame(self, topic: str, bodies: Sequence[str]) -> tuple[str, str]:
        channel = wire_channel(topic, self._prefix)
        rest = f"{self._head}{','.join(bodies)}]}}"
        if self._sign is None:
            return channel, f'{{"pgnotify":1,{rest}'
        return channel, f'{{"pgnotify":1,"sig":"{self._sign(f"{channel}:{rest}")}",{rest}'


# -- frames in ------------------------------------------------------------------------------


class Frame(NamedTuple):
    """A decoded payload: events still as JSON objects, or the one value of a foreign payload."""

    source: str | None
    events: list[Any]
    foreign: bool = False


def decode_frame(payload: str, channel: str = "", verify: Verify | None = None) -> Frame:
    """Decode one payload.

    Args:
        channel: wire channel it arrived on, which a signature covers.
        verify: tells whether a signature belongs to a text; None accepts unsigned payloads.

    Raises:
        FrameError: it begins as a frame and is none, or lacks the signature asked for. The
            message never quotes the payload.
    """
    if not _FRAME_START.match(payload):
        if verify is not None:
            raise FrameError("unsigned: not a frame, and PGNOTIFY_SIGNING is on")
        return Frame(None, [_foreign_value(payload)], foreign=True)
    if verify is not None:
        signed = _SIGNED_START.match(payload)
        if signed is None:
            raise FrameError("unsigned, and PGNOTIFY_SIGNING is on")
        if not verify(f"{channel}:{payload[signed.end() :]}", signed.group(1)):
            raise FrameError("the signature does not belong to this frame")
    try:
        frame = loads(payload)
    except ValueError as exc:
        raise FrameError(str(exc)) from None
    if frame["pgnotify"] != VERSION or isinstance(frame["pgnotify"], bool):
        raise FrameError(f"its version is not {VERSION}")
    events, source = frame.get("events"), frame.get("source")
    if not isinstance(events, list):
        raise FrameError("it has no list of events")
    if source is not None and not isinstance(source, str):
        raise FrameError("its source is not text")
    return Frame(source, events)


def _foreign_value(payload: str) -> Any:
    try:
        return loads(payload)
    except NestedTooDeeply as exc:
        raise FrameError(str(exc)) from None
    except ValueError:
        return payload


class Reference(NamedTuple):
    """Where an event that was too big to ride is stored, and what its text must hash to."""

    row: int
    digest: str | None


def reference_in(raw: Any) -> Reference | None:
    """The reference that an event of a frame is, None if it is an event of its own."""
    return reference_of(raw) if isinstance(raw, dict) and "ref" in raw else None


def reference_of(raw: dict[str, Any]) -> Reference:
    """The reference that ``raw``, which has a ``"ref"``, stands for; FrameError if it is none."""
    row, digest = raw["ref"], raw.get("digest")
    if not isinstance(row, int) or isinstance(row, bool) or not isinstance(digest, str | None):
        raise FrameError("a reference to a stored event is malformed")
    return Reference(row, digest)


def stored_body(body: str, digest: str | None) -> Any:
    """The event in a stored row, still a JSON object.

    Raises:
        FrameError: the row does not hold what the reference promised.
    """
    if digest is not None and digest_of(body) != digest:
        raise FrameError("a stored event is not the one that was referred to")
    try:
        return loads(body)
    except ValueError as exc:
        raise FrameError(f"a stored event is {exc}") from None
