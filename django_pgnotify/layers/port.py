"""One layer on one event loop: between what it has there and the wire."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import zlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from ..exceptions import PgNotifyError
from . import codec as wire
from .codec import unpack
from .elsewhere import Elsewhere
from .hub import Hub
from .local import Local
from .options import Options
from .shared import SharedChannel

logger = logging.getLogger("django_pgnotify.layers")

_INCOMING_LIMIT = 64 * 1024 * 1024
"""Bytes of messages that may wait behind a stored one, which is fetched."""
_ENTRY_SIZE = 300
"""About what an entry takes in memory beside the bytes of its message."""


class Port:
    """See the module. Used on the loop of its hub only.

    Args:
        options: those of the layer.
        before_join: awaited before a channel joins a group.
    """

    def __init__(
        self, options: Options, hub: Hub, before_join: Callable[[], Awaitable[None]]
    ) -> None:
        self.hub = hub
        self.loop = hub.loop
        self.codec = wire.Codec(options.crypt)
        self.local = Local(options, self.codec)
        self.stats = options.stats
        self.shared: dict[str, SharedChannel] = {}
        self._options = options
        self._before_join = before_join
        self._base = options.wire
        self._direct = options.wire_of(self.local.token)
        self._shards = [options.wire_of(number) for number in range(options.shards)]
        self._used_shards: set[str] = set()
        self._awaited_shards: Counter[str] = Counter()
        self.attached = False
        """Whether the hub knows that we want to hear."""
        self._incoming: deque[tuple[int, str, Any]] = deque()
        self._incoming_size = 0
        self._left_out: set[tuple[int, str]] = set()
        """Kinds and names of messages for which there was no room behind a stored one."""
        self._fetching: asyncio.Task[None] | None = None
        self._flushed: deque[str] = deque(maxlen=100)
        self.elsewhere = Elsewhere(self, options)
        """The members of groups that are channels of others."""

    # -- hearing --------------------------------------------------------------------------------

    async def listen(self, name: str | None = None) -> None:
        """Return once whatever is sent to our channels, and to group ``name``, arrives."""
        channels = frozenset((self._base, self._direct))
        if name is not None:
            channels |= {self.shard(name)}
        known = name is None or self.shard(name) in self._used_shards
        if known and channels <= self.hub.heard:
            return
        if name is not None:
            self._used_shards.add(self.shard(name))
        self._want()
        await self.hub.until_heard(channels)

    @property
    def hears(self) -> bool:
        """Whether whatever is sent to our channels arrives."""
        return self._direct in self.hub.heard

    @contextmanager
    def _awaiting(self, name: str) -> Iterator[None]:
        """Keep the shard of what is about to be heard, and cannot be seen to need it yet."""
        shard = self.shard(name)
        self._awaited_shards[shard] += 1
        try:
            yield
        finally:
            self._awaited_shards[shard] -= 1

    async def join(self, group: str, channel: str) -> None:
        """Have a channel of ours join, once whatever is sent to the group arrives."""
        with self._awaiting(group):
            await self.listen(group)
            await self._before_join()
            self.local.join(group, channel)

    def attach(self) -> None:
        """Begin to listen, where need be, without waiting for it."""
        if not self.attached:
            self._want()

    def _want(self) -> None:
        self.attached = True
        self.hub.want(self, frozenset((self._base, self._direct, *self._used_shards)))

    def close(self) -> None:
        """Hear no more."""
        self.attached = False
        self.hub.want(self, frozenset())

    def shard(self, name: str) -> str:
        """The wire channel of a group or of a normal channel."""
        return self._shards[zlib.crc32(name.encode()) % len(self._shards)]

    def hear(self, payload: bytes) -> None:
        try:
            entries = self.codec.open(payload)
        except Exception as exc:  # noqa: BLE001 - anybody may NOTIFY anything; msgpack raises many
            self.stats.add("broken")
            logger.warning("Skipped a message that is none of ours (%s)", type(exc).__name__)
            return
        self.stats.add("received", len(entries))
        if self._fetching is not None:
            self._put_off(entries)
            return
        now = time.monotonic()
        for place, (kind, name, body) in enumerate(entries):
            if type(body) is int and self._concerns_us(kind, name):
                self._put_off(entries[place:])
                self._fetching = self.loop.create_task(self._fetch(), name="pgnotify-layer-fetch")
                break
            self._take_in(kind, name, body, now)
        self._sweep_if_due(now)

    def _put_off(self, entries: Sequence[tuple[int, str, Any]]) -> None:
        """Have what follows a stored message wait for it, in order, while there is room."""
        for entry in entries:
            kind, name, _ = entry
            if kind in (wire.GROUP, wire.DIRECT):
                if not self._concerns_us(kind, name):
                    continue
                if self._left_out or self._incoming_size > _INCOMING_LIMIT:
                    if not self._left_out:
                        logger.warning(
                            "Stored messages come faster than they are fetched: leaving out what "
                            "follows until those that wait (%d) are through",
                            len(self._incoming),
                        )
                    # And all that follows: those who are told of it must not get older ones after.
                    self._left_out.add((kind, name))
                    self.stats.add("dropped")
                    continue
            self._incoming_size += _size(entry)
            self._incoming.append(entry)

    async def _fetch(self) -> None:
        """Take in what has come, with the stored messages in their places."""
        try:
            while self._incoming:
                entry = kind, name, body = self._incoming.popleft()
                self._incoming_size -= _size(entry)
                if type(body) is int:
                    body = await self._stored(kind, name, body)
                if body is not None:
                    self._take_in(kind, name, body, time.monotonic())
        finally:
            self._fetching = None
        left_out, self._left_out = self._left_out, set()
        for kind, name in left_out:
            self.local.note_left_out(name, group=kind == wire.GROUP)

    async def _stored(self, kind: int, name: str, number: int) -> bytes | None:
        """A stored message; None, and a gap to the members of a group, if it cannot be had."""
        if not self._concerns_us(kind, name):
            return None
        cause = "a stored message could not be fetched"
        try:
            stored = await self.hub.rows.fetch(self._base, number)
            if stored is None:
                cause = "expiry"
                logger.warning("A stored message has expired, or never was")
            else:
                return self.codec.unseal(stored)
        except Exception as exc:  # noqa: BLE001 - the others must go on, whatever it was
            logger.error("A stored message could not be fetched: %s", type(exc).__name__)
        self.stats.add("broken")
        if kind == wire.GROUP:
            self.local.note_missed(name, cause)
        return None

    def _concerns_us(self, kind: int, name: str) -> bool:
        return name in self.local.groups if kind == wire.GROUP else self.local.is_ours(name)

    def _take_in(self, kind: int, name: str, body: Any, now: float) -> None:
        local = self.local
        if kind == wire.GROUP:
            local.deliver(name, body, now)
        elif kind == wire.DIRECT:
            if local.is_ours(name):
                local.put(name, body, now)
        elif kind == wire.WAKE:
            shared = self.shared.get(name)
            if shared is not None:
                shared.wake()
        elif kind == wire.FLUSH:
            if name not in self._flushed:
                self._flushed.append(name)
                local.forget()
        elif kind in (wire.ADD, wire.DISCARD):
            self.elsewhere.asked(kind, name, body)
        elif kind == wire.DONE:
            self.elsewhere.answered(name)

    # -- channels -------------------------------------------------------------------------------

    def new_channel(self, prefix: str) -> str:
        self._sweep_if_due(time.monotonic())
        return self.local.new_channel(prefix)

    def put(self, channel: str, body: bytes) -> bool:
        """Hand a message to a channel of ours; False if it is full."""
        return self.local.put(channel, body, time.monotonic())

    def deliver(self, group: str, body: bytes) -> None:
        """Hand a message to the members of a group that are here."""
        self.local.deliver(group, body, time.monotonic())

    def _sweep_if_due(self, now: float) -> None:
        if now < self.local.sweep_due:
            return
        self.local.sweep(now)
        # And leave the shards in which nobody is a member any more.
        used = {self.shard(name) for name in (*self.local.groups, *self.shared)}
        used.update(+self._awaited_shards)
        if used < self._used_shards and self.attached:
            self._used_shards = used
            self._want()

    # -- gaps -----------------------------------------------------------------------------------

    def note_gap(self, since: datetime | None, until: datetime, cause: str) -> None:
        """The listener may have missed messages: tell whoever wants to know."""
        self.stats.add("gaps")
        logger.warning(
            "The channel layer may have missed messages from %s to %s: %s", since, until, cause
        )
        for shared in self.shared.values():
            shared.wake()
        self.local.note_gap(since, until, cause)

    # -- out ------------------------------------------------------------------------------------

    def tell_group(self, group: str, body: bytes) -> asyncio.Future[None]:
        return self.hub.out.send(self, self.shard(group).encode(), wire.GROUP, group, body)

    async def tell_channel(self, channel: str, body: bytes) -> None:
        """Send to a channel of another loop or process."""
        there = self._options.wire_of_owner(channel)
        if there is not None:
            await self.hub.out.send(self, there, wire.DIRECT, channel, body)

    async def flush(self) -> None:
        """Forget all groups and messages of before, in every process."""
        await self.listen()
        nonce = secrets.token_hex(8)
        await self.hub.rows.flush(self._base)
        await self.hub.out.send(self, self._base.encode(), wire.FLUSH, nonce, b"")
        # Where it was sent on another connection than the one that listens it may not be back
        # yet, and must then not take away what comes from here on.
        self._take_in(wire.FLUSH, nonce, b"", 0.0)

    async def store(self, body: bytes | str) -> int:
        """Keep a message that is too large for a frame; returns the number of its row."""
        if isinstance(body, str):
            raise PgNotifyError("a channel's name is too long for a frame")
        return await self.hub.rows.store(self._base, self.codec.seal(body), self._options.expiry)

    # -- normal channels ------------------------------------------------------------------------

    def wake_up(self, channel: str) -> tuple[bytes, bytes]:
        """Wire channel and payload that tell receivers of a normal channel to look."""
        entry = self.codec.entry(wire.WAKE, channel, b"")
        return self.shard(channel).encode(), self.codec.frames([entry], utf8=False)[0]

    async def put_shared(self, channel: str, body: bytes) -> bool:
        """Add to a normal channel; False if it is full."""
        return await self.hub.rows.put(
            self._base,
            channel,
            self.codec.seal(body),
            self._options.expiry,
            self._options.capacity_of(channel),
            self.wake_up(channel),
        )

    async def receive_shared(self, channel: str) -> dict[str, Any]:
        with self._awaiting(channel):
            await self.listen(channel)
            shared = self.shared.get(channel)
            if shared is None:
                shared = self.shared[channel] = SharedChannel(
                    *(self._base, channel),
                    rows=lambda: self.hub.rows,
                    wake=self.wake_up(channel),
                    on_idle=lambda: self._forget_idle(channel),
                )
        try:
            while True:
                body = await shared.get()
                try:
                    return unpack(self.codec.unseal(body))
                except Exception:  # noqa: BLE001 - msgpack and Fernet raise many
                    self.local.note_broken()
        finally:
            self._forget_idle(channel)

    def _forget_idle(self, channel: str) -> None:
        """Drop what receives a normal channel, if nobody does any more."""
        shared = self.shared.get(channel)
        if shared is not None and shared.idle:
            del self.shared[channel]

    async def join_shared(self, group: str, channel: str) -> None:
        await self.hub.rows.join(self._base, group, channel, self._options.group_expiry)

    async def leave_shared(self, group: str, channel: str) -> None:
        await self.hub.rows.leave(self._base, group, channel)

    async def reach_normal_members(self, group: str, body: bytes | str) -> None:
        """Hand a group's message on to the normal channels in it; full ones miss it."""
        if isinstance(body, bytes):
            for channel in await self.hub.rows.members(self._base, group):
                if not await self.put_shared(channel, body):
                    self.stats.add("dropped")


def _size(entry: tuple[int, str, Any]) -> int:
    body = entry[2]
    return _ENTRY_SIZE + (0 if type(body) is int else len(body))
