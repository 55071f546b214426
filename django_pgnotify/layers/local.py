"""What one layer has on one event loop: who is in which group, and what waits for whom."""

from __future__ import annotations

import asyncio
import fnmatch
import itertools
import logging
import secrets
import time
from datetime import UTC, datetime
from typing import Any

from .codec import Codec, unpack
from .mailbox import Body, Mailbox
from .options import TOKEN_LENGTH, Options

logger = logging.getLogger("django_pgnotify.layers")

GAP_TYPE = "pgnotify.gap"


class Group:
    """Members' mailboxes, and when they joined or were last seen to read (monotonic).

    ``oldest`` is no later than any of these.

    Args:
        wants_gaps: whether its members are told of gaps.
    """

    __slots__ = ("boxes", "members", "oldest", "wants_gaps")

    def __init__(self, wants_gaps: bool) -> None:
        self.wants_gaps = wants_gaps
        self.boxes: dict[str, Mailbox] = {}
        self.members: dict[str, float] = {}
        self.oldest = time.monotonic()


class Local:
    """See the module. Used on its loop only, so it needs no lock.

    Args:
        options: those of the layer.
        codec: packs the messages that are made here.
    """

    def __init__(self, options: Options, codec: Codec) -> None:
        self.token = secrets.token_hex(TOKEN_LENGTH // 2)
        """What the names of our channels contain."""
        self.boxes: dict[str, Mailbox] = {}
        self.groups: dict[str, Group] = {}
        self._options = options
        self._stats = options.stats
        self._codec = codec
        self._numbers = itertools.count()
        self._for_all: dict[str, list[asyncio.Future[None]]] = {}
        self.sweep_due = time.monotonic() + options.expiry

    # -- channels -------------------------------------------------------------------------------

    def is_ours(self, channel: str) -> bool:
        return channel.partition("!")[0].endswith(self.token)

    def new_channel(self, prefix: str) -> str:
        return f"{prefix}{self.token}!{next(self._numbers):x}{secrets.token_hex(6)}"

    def put(self, channel: str, body: Body, now: float) -> bool:
        """Hand a message to a channel of ours; False if it is full."""
        box, message = self._box(channel), (now + self._options.expiry, body)
        if box.put(message):
            return True
        if expired := box.expire(now):
            box.missed += expired  # whoever reads next is told
            if box.put(message):
                return True
        self._stats.add("dropped")
        self._tell_once(box, "capacity")
        return False

    def _tell_once(self, box: Mailbox, cause: str) -> None:
        """Put in a gap in the place of all that is missed until something is put in or read."""
        if box.gap_groups and not (box.overflowed and box.messages):
            box.overflowed = True
            self._tell(box, gap_message(None, None, cause))

    def _tell(self, box: Mailbox, message: dict[str, Any]) -> None:
        """Put in a message of our own, whether there is room or not."""
        box.force((time.monotonic() + self._options.expiry, message))

    def _note_missed(self, box: Mailbox) -> bool:
        """Count what expired unread; returns whether the consumer is told of it."""
        missed, box.missed = box.missed, 0
        if missed:
            self._stats.add("expired", missed)
        return missed > 0 and box.gap_groups > 0

    def _box(self, channel: str) -> Mailbox:
        box = self.boxes.get(channel)
        if box is None:
            box = self.boxes[channel] = Mailbox(self._options.capacity_of(channel), channel)
            for waiter in self._for_all.get(_head(channel), ()):
                box.add_waiter(waiter)
        return box

    async def receive(self, channel: str) -> dict[str, Any]:
        """The next message of one channel; of all that begin so, where the name ends with ``!``."""
        if channel.endswith("!"):
            return await self._receive_any(channel)
        box = self.boxes.get(channel) or self._box(channel)
        box.readers += 1
        try:
            while True:
                if not box.messages:
                    waiter = box.waiter()
                    try:
                        await waiter
                    except BaseException:
                        box.pass_on(waiter)
                        raise
                body = box.pop()
                if box.missed and self._note_missed(box):
                    if body is not None:
                        box.put_back((time.monotonic() + self._options.expiry, body))
                    return gap_message(None, None, "expiry")
                if body is None:
                    continue
                if isinstance(body, dict):
                    return body.copy()
                try:
                    return unpack(body)
                except Exception:  # noqa: BLE001 - msgpack raises many
                    self.note_broken()
        finally:
            box.readers -= 1
            box.read_at = time.monotonic()
            if not box.groups and box.abandoned and self.boxes.get(channel) is box:
                del self.boxes[channel]

    async def _receive_any(self, head: str) -> dict[str, Any]:
        waiting = self._for_all.setdefault(head, [])
        try:
            while True:
                boxes = [box for channel, box in self.boxes.items() if _head(channel) == head]
                filled = [box for box in boxes if box.messages]
                if filled:
                    first = min(filled, key=Mailbox.first_expires)
                    body = first.pop()
                    first.read_at = time.monotonic()
                    if body is not None:
                        try:
                            return body.copy() if isinstance(body, dict) else unpack(body)
                        except Exception:  # noqa: BLE001 - msgpack raises many
                            self.note_broken()
                    continue
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                waiting.append(waiter)
                for box in boxes:
                    box.add_waiter(waiter)
                try:
                    await waiter
                except BaseException:
                    for box in self.boxes.values():
                        box.pass_on(waiter)
                    raise
                finally:
                    waiting.remove(waiter)
                    for box in self.boxes.values():
                        box.remove_waiter(waiter)
        finally:
            if not waiting:
                self._for_all.pop(head, None)

    def put_back(self, channel: str, message: dict[str, Any]) -> None:
        """Have a message that was received, and not read, be the next one again."""
        expires = time.monotonic() + self._options.expiry
        self._box(channel).put_back((expires, self._codec.message(message)))

    def note_broken(self) -> None:
        self._stats.add("broken")
        logger.warning("Skipped a message that is none, or is encrypted with another key")

    # -- groups ---------------------------------------------------------------------------------

    def join(self, name: str, channel: str) -> None:
        group = self.groups.get(name)
        if group is None:
            group = self.groups[name] = Group(self._wants_gaps(name))
        if channel not in group.members:
            box = group.boxes[channel] = self._box(channel)
            box.groups += 1
            box.gap_groups += group.wants_gaps
        group.members[channel] = time.monotonic()

    def leave(self, name: str, channel: str) -> None:
        group = self.groups.get(name)
        if group is None or group.members.pop(channel, None) is None:
            return
        box = group.boxes.pop(channel)
        box.groups -= 1
        box.gap_groups -= group.wants_gaps
        if box.abandoned:
            del self.boxes[channel]
        if not group.members:
            del self.groups[name]

    def deliver(self, name: str, body: bytes, now: float) -> None:
        """Hand a message to the members of a group that are here."""
        group = self.groups.get(name)
        if group is None:
            return
        if now - group.oldest > self._options.group_expiry:
            self._expire_members(name, group, now)
        message = (now + self._options.expiry, body if len(group.boxes) < 2 else _shareable(body))
        for box in [box for box in group.boxes.values() if not box.put(message)]:
            self.put(box.channel, body, now)  # it is full: look closer

    def forget(self) -> None:
        """Drop all groups and messages; whoever receives goes on waiting."""
        for name, group in list(self.groups.items()):
            for channel in list(group.members):
                self.leave(name, channel)
        for channel, box in list(self.boxes.items()):
            box.messages.clear()
            box.missed = 0
            if box.abandoned:
                del self.boxes[channel]

    def sweep(self, now: float) -> None:
        """Forget what has expired, and channels that nobody needs."""
        self.sweep_due = now + self._options.expiry
        for channel, box in list(self.boxes.items()):
            box.missed += box.expire(now)
            # Where something is left to be read, receive() tells: a message in front of it would
            # keep it from expiring.
            if not box.messages and self._note_missed(box):
                self._tell(box, gap_message(None, None, "expiry"))
            if box.abandoned:
                del self.boxes[channel]
        for name, group in list(self.groups.items()):
            if now - group.oldest > self._options.group_expiry:
                self._expire_members(name, group, now)

    def _expire_members(self, name: str, group: Group, now: float) -> None:
        for channel, joined in list(group.members.items()):
            box = group.boxes[channel]
            # Whoever reads is there, and must not go deaf: only what nobody reads is left over.
            read = box.readers or _head(channel) in self._for_all
            renewed = now if read else max(joined, box.read_at)
            group.members[channel] = renewed
            if now - renewed > self._options.group_expiry:
                self._stats.add("lapsed")
                if group.wants_gaps:
                    self._tell_once(box, "group_expiry")
                self.leave(name, channel)
        group.oldest = min(group.members.values(), default=now)

    # -- gaps -----------------------------------------------------------------------------------

    def note_gap(self, since: datetime | None, until: datetime, cause: str) -> None:
        """Tell the members of groups that they may have missed messages, if they want to know."""
        message = gap_message(since, until, cause)
        for box in list(self.boxes.values()):
            if box.gap_groups:
                self._tell(box, message)

    def note_missed(self, name: str, cause: str) -> None:
        """Tell the members of a group that they missed a message of it, if they want to know."""
        group = self.groups.get(name)
        for box in () if group is None else group.boxes.values():
            if box.gap_groups:
                self._tell(box, gap_message(None, None, cause))

    def note_left_out(self, name: str, *, group: bool) -> None:
        """Messages to a group, or to one channel, have been left out before they came here."""
        if group:
            boxes = list(self.groups[name].boxes.values()) if name in self.groups else []
        else:
            boxes = [self.boxes[name]] if name in self.boxes else []
        for box in boxes:
            self._tell_once(box, "capacity")

    def _wants_gaps(self, name: str) -> bool:
        """Whether the members of the group are told of gaps."""
        wanted = self._options.gap_messages
        if isinstance(wanted, bool):
            return wanted
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)


def gap_message(since: datetime | None, until: datetime | None, cause: str) -> dict[str, Any]:
    """What a consumer is told of messages that it may have missed."""
    return {
        "type": GAP_TYPE,
        "since": None if since is None else since.isoformat(),
        "until": (until or datetime.now(UTC)).isoformat(),
        "cause": cause,
    }


_SCALARS = frozenset({str, int, float, bool, bytes, type(None)})


def _shareable(body: bytes) -> Body:
    """The message itself, if a copy of the dict is a copy of all of it; else as it is."""
    try:
        message = unpack(body)
    except Exception:  # noqa: BLE001 - whoever receives it finds out, and counts
        return body
    return message if _SCALARS.issuperset(map(type, message.values())) else body


def _head(channel: str) -> str:
    """The part of a process-local channel's name up to and including its ``!``."""
    return channel[: channel.find("!") + 1]
