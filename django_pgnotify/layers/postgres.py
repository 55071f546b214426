"""The channel layer: group membership in the process, messages through NOTIFY."""

from __future__ import annotations

import asyncio
import re
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Protocol

from channels.exceptions import ChannelFull, MessageTooLarge
from channels.layers import BaseChannelLayer

from ..conf import conf
from ..exceptions import InvalidArgument, PgNotifyError
from ..publishing.sender import check_alias
from ..stats import Stats
from . import loops
from .codec import ADD, DISCARD, Codec, crypt_of
from .feed import DirectFeed
from .loops import hub_of, is_passing, run_on
from .options import TOKEN_LENGTH, Options, patterns_of
from .port import Port

Message = dict[str, Any]


class Feed(Protocol):
    """What hands messages to the members in this process by itself."""

    async def listening(self) -> None:
        """Return once whatever is to be told from now on will be."""

    def close(self) -> None:
        """Tell no more."""


class PostgresChannelLayer(BaseChannelLayer):  # type: ignore[misc]
    """A Channels layer over LISTEN/NOTIFY: ``group_send`` is one NOTIFY, however many listen.

    Each event loop that uses it has one connection, which listens and sends, and another one for
    rows once it needs any: messages to normal channels (those without a ``!``) and messages too big
    for a NOTIFY (about 5,900 bytes packed) are rows, which expire.

    Args:
        using: database alias; default ``PGNOTIFY_LISTEN_DATABASE`` to listen on, and to send on
            while listening, and ``PGNOTIFY_DATABASE`` for rows and where nobody listens.
        prefix: several layers on one database need different ones.
        expiry: seconds after which a message that nobody read is dropped.
        group_expiry: seconds after which a membership ends that was not renewed, and whose channel
            nobody read.
        capacity: messages that may wait for one channel.
        channel_capacity: capacities by channel name pattern, as in Channels.
        shards: wire channels that groups are spread over. A process listens to those of its own
            groups only. All processes must have the same number.
        symmetric_encryption_keys: the first encrypts what is sent and stored, all of them decrypt.
            Needs the library ``cryptography``.
        gap_messages: tell the members of groups ``{"type": "pgnotify.gap", "since": ..., "until":
            ..., "cause": ...}`` when they may have missed messages; True, or a list of patterns of
            group names (``["board.*"]``).

    Raises:
        InvalidArgument: ``shards``, or the keys, cannot work.
        TypeError: ``gap_messages`` is neither a bool nor patterns.
        UnsupportedDatabase: the alias is not PostgreSQL, or is not there.
    """

    extensions = ["groups", "flush"]  # noqa: RUF012 - the name and type that Channels looks at
    ChannelFull = ChannelFull
    MessageTooLarge = MessageTooLarge
    """Never raised: what is too large for a frame becomes a row."""

    # As the specification has it: names of up to 100 characters, of ASCII, and nothing behind them.
    MAX_NAME_LENGTH = 101
    channel_name_regex = re.compile(r"[a-zA-Z0-9\-_.]+(![a-zA-Z0-9\-_.]*)?\Z")
    group_name_regex = re.compile(r"[a-zA-Z0-9\-_.]+\Z")
    invalid_name_error = (
        "{} name must be a valid unicode string with length <= 100 containing only ASCII "
        "alphanumerics, hyphens, underscores, or periods."
    )

    def __init__(
        self,
        using: str | None = None,
        prefix: str = "channels",
        expiry: float = 60,
        group_expiry: float = 86400,
        capacity: int = 100,
        channel_capacity: dict[Any, int] | None = None,
        shards: int = 8,
        symmetric_encryption_keys: Iterable[str | bytes] | None = None,
        gap_messages: bool | Iterable[str] = False,
    ) -> None:
        super().__init__(expiry=expiry, capacity=capacity, channel_capacity=channel_capacity)
        if isinstance(shards, bool) or not isinstance(shards, int) or not 1 <= shards <= 64:
            raise InvalidArgument(f"shards= is a whole number from 1 to 64; got {shards!r}.")
        self.channel_capacity = self.compile_capacities(channel_capacity or {})
        self.group_expiry = group_expiry
        self.prefix = prefix
        self.stats = Stats()
        self._options = Options(
            prefix=prefix,
            channel_prefix=conf.CHANNEL_PREFIX,
            expiry=expiry,
            group_expiry=group_expiry,
            capacity_of=self.get_capacity,
            shards=shards,
            gap_messages=patterns_of(gap_messages),
            crypt=crypt_of(symmetric_encryption_keys),
            stats=self.stats,
        )
        self.wire = self._options.wire
        self._publish_alias = check_alias(using or conf.DATABASE)
        self._listen_alias = check_alias(using or conf.listen_database)
        self.feed: Feed | None = DirectFeed(self, self._listen_alias)
        """Hears in this process what groups are to be told, and calls :meth:`deliver`."""
        self._reset()
        _layers.append(weakref.ref(self, _layers.remove))

    def _reset(self) -> None:
        """Begin anew: at first, and in a forked child, which has no part in its parent's groups."""
        self._ports: dict[asyncio.AbstractEventLoop, Port] = {}
        self._owners: dict[str, Port] = {}
        self._generation = loops.generation  # last: another thread may be looking

    # -- Channels API -------------------------------------------------------------------------

    async def new_channel(self, prefix: str = "specific.") -> str:
        """A name for a channel that only this event loop reads, once it can be heard."""
        port = self._port()
        if port is None:
            return await run_on(loops.home_loop(), self.new_channel, prefix)
        await port.listen()
        return port.new_channel(prefix)

    async def send(self, channel: str, message: Message) -> None:
        """Send to one channel.

        Raises:
            ChannelFull: as many messages wait for it as it may hold. Of process-local channels
                only the process they belong to knows; what comes from elsewhere is dropped there.
            PublishError: PostgreSQL could not be told.
        """
        self._check_channel(channel)
        port = self._port()
        if port is None:
            await run_on(loops.home_loop(), self.send, channel, message)
            return
        body = port.codec.message(message)
        if "!" not in channel:
            if not await port.put_shared(channel, body):
                raise ChannelFull(channel)
        elif port.local.is_ours(channel):
            if not port.put(channel, body):
                raise ChannelFull(channel)
        else:
            await port.tell_channel(channel, body)

    async def receive(self, channel: str) -> Message:
        """The next message of a channel; waits for one.

        Of a process-local channel (with a ``!``) it must be the process that made it. A message of
        a normal channel is received by one receiver, of all processes.

        Raises:
            PgNotifyError: the channel belongs to another process.
        """
        port = self._port()
        if port is not None and port.attached and channel in port.local.boxes:
            return await port.local.receive(channel)  # as nearly always
        self._check_channel(channel)
        if "!" not in channel:
            if port is None:
                return await run_on(
                    *(loops.home_loop(), self.receive, channel),
                    undo=lambda message: self._send_again(channel, message),
                )
            return await port.receive_shared(channel)
        owner = self._owner(channel)
        if owner is None:
            raise PgNotifyError(
                f"Channel {channel!r} belongs to another process, or to an event loop that has "
                f"ended; receive() reads the names that new_channel() gave in this one."
            )
        if owner is not port:
            return await run_on(
                *(owner.loop, self.receive, channel),
                undo=lambda message: owner.local.put_back(channel, message),
            )
        owner.attach()
        return await owner.local.receive(channel)

    async def group_add(self, group: str, channel: str) -> None:
        """Join; every message that is sent to the group after this returns will arrive.

        A channel of another process is added there. One that does not answer within
        ``PGNOTIFY_HEARTBEAT_TIMEOUT`` has ended, or is cut off: that is logged, and no error.
        """
        self._check_group(group)
        self._check_channel(channel)
        port = self._port()
        if port is None:
            await run_on(loops.home_loop(), self.group_add, group, channel)
        elif "!" not in channel:
            await port.join_shared(group, channel)
        elif port.local.is_ours(channel):
            await port.join(group, channel)
        else:
            await port.elsewhere.ask(ADD, group, channel)

    async def group_discard(self, group: str, channel: str) -> None:
        """Leave; not to be a member is no error.

        A channel of another process is discarded there, as :meth:`group_add` adds it.
        """
        self._check_group(group)
        self._check_channel(channel)
        port = self._port()
        if port is None:
            await run_on(loops.home_loop(), self.group_discard, group, channel)
        elif "!" not in channel:
            await port.leave_shared(group, channel)
        elif port.local.is_ours(channel):
            port.local.leave(group, channel)
        else:
            await port.elsewhere.ask(DISCARD, group, channel)

    async def group_send(self, group: str, message: Message) -> None:
        """Send to every channel in a group with one NOTIFY. Full channels miss it, and are counted.

        Raises:
            PublishError: PostgreSQL could not be told.
        """
        port = self._port()
        if port is None:
            self._check_group(group)
            await run_on(loops.home_loop(), self.group_send, group, message)
            return
        if group not in port.local.groups:
            self._check_group(group)
        await port.tell_group(group, port.codec.message(message))

    async def group_send_many(self, messages: Sequence[tuple[str, Message]]) -> None:
        """Send ``(group, message)`` pairs in few statements; in order within each group.

        Raises:
            PublishError: PostgreSQL could not be told of some of them.
        """
        for group, _ in messages:
            self._check_group(group)
        port = self._port()
        if port is None:
            await run_on(loops.home_loop(), self.group_send_many, messages)
            return
        bodies = [(group, port.codec.message(message)) for group, message in messages]
        await asyncio.gather(*(port.tell_group(group, body) for group, body in bodies))

    async def flush(self) -> None:
        """Forget all groups and messages of before, in every process."""
        port = self._port()
        if port is None:
            await run_on(loops.home_loop(), self.flush)
        else:
            await port.flush()

    async def close(self) -> None:
        """Stop hearing on this event loop; the next use begins again.

        The connections are closed where no other layer uses them.
        """
        port = self._port()
        if port is None:
            await run_on(loops.home_loop(), self.close)
            return
        port.close()
        if self.feed is not None and not any(other.attached for other in self._ports.values()):
            self.feed.close()
        if port.hub.idle:
            await port.hub.aclose()

    def has_members(self, group: str) -> bool:
        """Whether a process-local channel of this process is in a group. In any thread."""
        return any(group in port.local.groups for port in list(self._ports.values()))

    def deliver(self, group: str, message: Message) -> None:
        """Hand a message to the members of a group in this process, without a NOTIFY.

        For somebody who hears in each process what the members of the group are to be told. May
        be called in any thread.

        Raises:
            TypeError: the message, or the name, is none.
        """
        self._check_group(group)
        body = Codec().message(message)
        for port in list(self._ports.values()):
            with suppress(RuntimeError):  # its loop has been closed
                port.loop.call_soon_threadsafe(port.deliver, group, body)

    def note_gap(self, since: datetime | None, until: datetime, cause: str) -> None:
        """Tell the members of groups in this process, where they want to know (``gap_messages``).

        For whoever calls :meth:`deliver` and may have missed something. In any thread.
        """
        for port in list(self._ports.values()):
            with suppress(RuntimeError):  # its loop has been closed
                port.loop.call_soon_threadsafe(port.local.note_gap, since, until, cause)

    async def _feed_listening(self) -> None:
        if self.feed is not None:
            await self.feed.listening()

    # -- ports ----------------------------------------------------------------------------------

    def _port(self) -> Port | None:
        """The port on the running loop; None where the loop is there for one call only."""
        if self._generation != loops.generation:
            with loops._guard:
                if self._generation != loops.generation:
                    self._reset()
        loop = asyncio.get_running_loop()
        port = self._ports.get(loop)
        if port is None:
            if is_passing(loop):
                return None
            port = Port(
                self._options, hub_of(self._publish_alias, self._listen_alias), self._feed_listening
            )
            self._ports[loop] = port
            self._owners[port.local.token] = port
        elif port.hub.closed:
            port.hub = hub_of(self._publish_alias, self._listen_alias)
            port.attached = False
        return port

    def _owner(self, channel: str) -> Port | None:
        """The port of this process that a channel belongs to."""
        head = channel.partition("!")[0]
        return self._owners.get(head[-TOKEN_LENGTH:])

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        port = self._ports.pop(loop, None)
        if port is not None:
            self._owners.pop(port.local.token, None)

    def _send_again(self, channel: str, message: Message) -> None:
        """Put back what was received from a normal channel for a caller who had gone."""
        port = self._port()
        if port is not None:
            port.hub.out.spawn(self.send(channel, message), "pgnotify-layer-put-back")

    # -- names ----------------------------------------------------------------------------------

    def _check_group(self, group: str) -> None:
        self.require_valid_group_name(group)

    def _check_channel(self, channel: str) -> None:
        known = self._owner(channel) if type(channel) is str else None
        if known is None or channel not in known.local.boxes:
            self.require_valid_channel_name(channel)


# A list, and not a WeakSet, because one thread may make a layer while another one ends a loop.
_layers: list[weakref.ref[PostgresChannelLayer]] = []


def _forget(loop: asyncio.AbstractEventLoop) -> None:
    for ref in _layers.copy():
        if (layer := ref()) is not None:
            layer._forget(loop)


loops.on_loop_closed.append(_forget)
