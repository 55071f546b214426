"""The channel layer: group membership in the process, messages through NOTIFY."""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import datetime
from typing import Any

import msgpack
from channels.exceptions import ChannelFull
from channels.layers import BaseChannelLayer

from ..conf import conf
from ..exceptions import ListenError, PgNotifyError
from ..listening.background import Subscription, background_listener, established
from ..listening.connection import Notification
from ..publishing.sender import check_alias
from ..stats import Stats
from ..wire import wire_channel
from .mailbox import Mailbox
from .sender import REFERENCE, sender

logger = logging.getLogger("django_pgnotify.layers")

_REFERENCE = re.compile(re.escape(REFERENCE) + r"([0-9]{1,18})", re.ASCII)
_GROUP, _CHANNEL, _ADD, _DISCARD, _FLUSH = "g", "c", "+", "-", "f"


class PostgresChannelLayer(BaseChannelLayer):  # type: ignore[misc]
    """A Channels layer over LISTEN/NOTIFY: ``group_send`` is one NOTIFY, however many listen.

    One background connection per process listens; another sends. A message too big for NOTIFY
    (about 5,900 bytes packed) is stored in a row and travels by reference.

    Args:
        using: database alias; default ``PGNOTIFY_DATABASE`` to send on and
            ``PGNOTIFY_LISTEN_DATABASE`` to listen on.
        prefix: several layers on one database need different ones.
        expiry: seconds after which a message that nobody read is dropped.
        group_expiry: seconds after which a membership that was not renewed ends.
        capacity: messages that may wait for one channel.
        channel_capacity: capacities by channel name pattern, as in Channels.
    """

    extensions = ["groups", "flush"]  # noqa: RUF012 - the name and type that Channels looks at

    def __init__(
        self,
        using: str | None = None,
        prefix: str = "channels",
        expiry: float = 60,
        group_expiry: float = 86400,
        capacity: int = 100,
        channel_capacity: dict[Any, int] | None = None,
    ) -> None:
        super().__init__(expiry=expiry, capacity=capacity, channel_capacity=channel_capacity)
        self.channel_capacity = self.compile_capacities(channel_capacity or {})
        self.group_expiry = group_expiry
        self.prefix = prefix
        self.stats = Stats()
        self._publish_alias = check_alias(using or conf.DATABASE)
        self._listen_alias = check_alias(using or conf.listen_database)
        self._wire = wire_channel(f"pgnotify.layer.{prefix}", conf.CHANNEL_PREFIX)
        self._lock = threading.RLock()
        self._reset()

    def _reset(self) -> None:
        """Begin anew: at first, and in a forked child, which has no part in its parent's groups."""
        self._pid = os.getpid()
        self._token = secrets.token_hex(8)
        self._mailboxes: dict[str, Mailbox] = {}
        self._groups: dict[str, dict[str, float]] = {}
        self._subscription: Subscription | None = None
        self._incoming: deque[str] = deque()
        self._fetching = False
        self._flushes: dict[str, Future[None]] = {}
        self._numbers = itertools.count()
        self._sweep_due = time.monotonic() + self.expiry

    # -- Channels API -------------------------------------------------------------------------

    async def new_channel(self, prefix: str = "specific.") -> str:
        """A name for a channel that only this process reads, once it can be heard."""
        await self._listening()
        return f"{prefix}{self._token}!{secrets.token_hex(8)}"

    async def send(self, channel: str, message: dict[str, Any]) -> None:
        """Send to one process-local channel, of this process or another.

        Raises:
            ChannelFull: the channel is ours and as many messages wait as it may hold.
            PublishError: PostgreSQL could not be told.
        """
        _require_dict(message)
        self.require_valid_channel_name(channel)
        self._require_local(channel)
        packed = msgpack.packb(message)
        if self._is_ours(channel):
            if not self._put(channel, packed):
                raise ChannelFull(channel)
        else:
            await self._notify(_CHANNEL, channel, packed)

    async def receive(self, channel: str) -> dict[str, Any]:
        """The next message of a channel of ours; waits for one."""
        self.require_valid_channel_name(channel)
        self._require_local(channel)
        await self._listening()
        if not self._is_ours(channel):
            raise PgNotifyError(
                f"Channel {channel!r} belongs to another process; receive() reads the names that "
                f"new_channel() gave in this one."
            )
        with self._lock:
            mailbox = self._mailbox(channel)
            mailbox.readers += 1
        try:
            message: dict[str, Any] = _unpack(await mailbox.get())
            return message
        finally:
            with self._lock:
                mailbox.readers -= 1
                if mailbox.abandoned and self._mailboxes.get(channel) is mailbox:
                    del self._mailboxes[channel]

    async def group_add(self, group: str, channel: str) -> None:
        """Join; every message that is sent to the group after this returns will arrive."""
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        self._require_local(channel)
        await self._listening()
        if self._is_ours(channel):
            self._join(group, channel)
        else:
            # Its process hears this before it hears anything that is sent to the group later.
            await self._notify(_ADD, group, channel.encode())

    async def group_discard(self, group: str, channel: str) -> None:
        """Leave; not to be a member is no error."""
        self.require_valid_group_name(group)
        self.require_valid_channel_name(channel)
        self._require_local(channel)
        if self._is_ours(channel):
            self._leave(group, channel)
        else:
            await self._notify(_DISCARD, group, channel.encode())

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        """Send to every channel in a group with one NOTIFY. Full channels miss it, and are counted.

        Raises:
            PublishError: PostgreSQL could not be told.
        """
        _require_dict(message)
        self.require_valid_group_name(group)
        await self._notify(_GROUP, group, msgpack.packb(message))

    async def flush(self) -> None:
        """Forget all groups and messages of before, in every process."""
        await self._listening()
        nonce, flushed = secrets.token_hex(8), Future[None]()
        self._flushes[nonce] = flushed
        try:
            await self._notify(_FLUSH, nonce, b"")
            # Until our own call is back, it could still take a group away that is joined now.
            await asyncio.wait_for(asyncio.wrap_future(flushed), conf.CONNECT_TIMEOUT)
        except TimeoutError:
            raise ListenError("The channel layer did not hear its own flush.") from None
        finally:
            self._flushes.pop(nonce, None)

    async def close(self) -> None:
        """Stop hearing; what the process shares with other layers goes on."""
        with self._lock:
            subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.close()

    # -- names and members ----------------------------------------------------------------------

    def _is_ours(self, channel: str) -> bool:
        self._check_fork()
        head = channel.partition("!")[0]
        return head.endswith(self._token)

    def _require_local(self, channel: str) -> None:
        if "!" not in channel:
            raise PgNotifyError(
                f"Channel {channel!r} is a normal channel, which PostgresChannelLayer does not "
                f"offer yet: it has groups and process-local channels (with a '!'). To hand work "
                f"to another process use publish() and @receiver."
            )

    def _check_fork(self) -> None:
        if self._pid != os.getpid():
            self._lock = threading.RLock()  # the parent may have held it
            self._reset()

    def _join(self, group: str, channel: str) -> None:
        with self._lock:
            self._groups.setdefault(group, {})[channel] = time.monotonic()

    def _leave(self, group: str, channel: str) -> None:
        with self._lock:
            members = self._groups.get(group, {})
            members.pop(channel, None)
            if not members:
                self._groups.pop(group, None)

    def _forget(self) -> None:
        with self._lock:
            self._groups.clear()
            for mailbox in self._mailboxes.values():
                mailbox.clear()

    def _mailbox(self, channel: str) -> Mailbox:
        with self._lock:
            mailbox = self._mailboxes.get(channel)
            if mailbox is None:
                mailbox = self._mailboxes[channel] = Mailbox(self.get_capacity(channel))
            return mailbox

    def _put(self, channel: str, packed: bytes) -> bool:
        with self._lock:  # or a reader that leaves could take the mailbox away meanwhile
            mailbox = self._mailbox(channel)
            if mailbox.put(packed, self.expiry):
                return True
            if mailbox.expire():
                self._leave_all(channel)
                return mailbox.put(packed, self.expiry)
        self.stats.add("dropped")
        return False

    def _leave_all(self, channel: str) -> None:
        """Nobody has read this channel for as long as messages are kept: it has no reader."""
        for group in list(self._groups):
            self._leave(group, channel)

    def _sweep(self, now: float) -> None:
        """Forget mailboxes whose reader is gone and whose messages have expired."""
        self._sweep_due = now + self.expiry
        for channel, mailbox in list(self._mailboxes.items()):
            if mailbox.expire():
                self._leave_all(channel)
            if mailbox.abandoned:
                del self._mailboxes[channel]

    # -- out ------------------------------------------------------------------------------------

    async def _notify(self, kind: str, name: str, body: bytes) -> None:
        self._check_fork()
        # Numbered, because PostgreSQL folds equal payloads of one transaction into one.
        packed = msgpack.packb((kind, name, body, next(self._numbers)))
        payload = base64.b64encode(packed).decode()
        await asyncio.wrap_future(sender(self._publish_alias).send(self._wire, payload))

    # -- in -------------------------------------------------------------------------------------

    async def _listening(self) -> None:
        """Return once whatever is sent from now on arrives here."""
        self._check_fork()
        with self._lock:
            if self._subscription is None or not self._subscription.alive:
                self._subscription = background_listener(self._listen_alias).subscribe(
                    self._wire, self._on_notifications, self._on_gap
                )
            subscription = self._subscription
        await established([subscription], conf.CONNECT_TIMEOUT)

    def _on_notifications(self, batch: Sequence[Notification]) -> None:
        with self._lock:
            self._incoming.extend(
                notification.payload.decode(errors="replace") for notification in batch
            )
            if not self._fetching:
                self._take_in()

    def _take_in(self) -> None:
        """Hand on what has come in, in order; what follows a stored message waits for it."""
        while self._incoming:
            payload = self._incoming.popleft()
            reference = _REFERENCE.fullmatch(payload)
            if reference is not None:
                self._fetching = True
                row = int(reference.group(1))
                sender(self._publish_alias).fetch(row).add_done_callback(self._fetched)
                return
            self._hand_on(payload)

    def _fetched(self, body: Future[str | None]) -> None:
        with self._lock:
            text = body.result()
            if text is None:
                self.stats.add("broken")
            else:
                self._hand_on(text)
            self._fetching = False
            self._take_in()

    def _hand_on(self, payload: str) -> None:
        try:
            kind, name, body, _ = msgpack.unpackb(base64.b64decode(payload, validate=True))
            if not isinstance(name, str) or not isinstance(body, bytes):
                raise ValueError("wrong types")
            if kind in (_GROUP, _CHANNEL) and not isinstance(_unpack(body), dict):
                raise ValueError("not a message")
            if kind not in (_GROUP, _CHANNEL, _ADD, _DISCARD, _FLUSH):
                raise ValueError("unknown kind")
        except Exception as exc:  # noqa: BLE001 - anybody may NOTIFY anything; msgpack raises many
            self.stats.add("broken")
            logger.warning("Skipped a message that is none of ours (%s)", type(exc).__name__)
            return
        now = time.monotonic()
        if kind == _GROUP:
            for channel, joined in list(self._groups.get(name, {}).items()):
                if now - joined > self.group_expiry:
                    self._leave(name, channel)
                else:
                    self._put(channel, body)
        elif kind == _FLUSH:
            self._forget()
            flushed = self._flushes.get(name)
            if flushed is not None and flushed.set_running_or_notify_cancel():
                flushed.set_result(None)
        elif kind == _CHANNEL:
            if self._is_ours(name):
                self._put(name, body)
        else:
            channel = body.decode(errors="replace")
            if self._is_ours(channel):
                (self._join if kind == _ADD else self._leave)(name, channel)
        if now >= self._sweep_due:
            self._sweep(now)

    def _on_gap(self, since: datetime | None, until: datetime, cause: str) -> None:
        self.stats.add("gaps")
        logger.warning(
            "The channel layer may have missed messages from %s to %s: %s", since, until, cause
        )


def _unpack(packed: bytes) -> Any:
    return msgpack.unpackb(packed, strict_map_key=False)


def _require_dict(message: object) -> None:
    if not isinstance(message, dict):
        raise TypeError(f"A channel layer message is a dict; got {message!r}.")
