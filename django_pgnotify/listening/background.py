"""The listener of a process that has other things to do: one per process and database.

It runs in a daemon thread with an event loop of its own, is started by the first subscription
and stopped at interpreter exit. A forked child starts its own: it never touches its parent's
connection, whose socket it inherited and must not read, write or close.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import datetime
from typing import Any

from ..conf import conf
from ..epochs.use import heartbeat_interval
from ..exceptions import ListenError
from .connection import Notification
from .listener import Listener, OnProven

logger = logging.getLogger("django_pgnotify.listening")

_EXIT_TIMEOUT = 5.0

OnNotifications = Callable[[Sequence[Notification]], None]
OnGap = Callable[[datetime | None, datetime, str], None]


class Subscription:
    """One subscriber's interest in one wire channel; :meth:`close` ends it.

    ``established`` is a future that is done once every later frame will arrive; a new one takes
    its place when the connection is lost.
    """

    def __init__(
        self,
        background: BackgroundListener,
        channel: str,
        on_notifications: OnNotifications,
        on_gap: OnGap | None,
        on_end: Callable[[], None] | None,
        on_proven: OnProven | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self.channel = channel
        self.on_notifications = on_notifications
        self.on_gap = on_gap
        self.on_end = on_end
        self.on_proven = on_proven
        self.on_lost = on_lost
        self.established: Future[None] = Future()
        self._background = background

    @property
    def using(self) -> str:
        return self._background.using

    @property
    def alive(self) -> bool:
        """Whether its listener still runs."""
        return self._background.alive

    def close(self) -> None:
        """End the subscription; the channel is left when nobody else listens to it."""
        self._background.remove(self)


class BackgroundListener:
    """See the module. Get one with :func:`background_listener`."""

    def __init__(self, using: str) -> None:
        self.using = using
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._subscriptions: dict[str, list[Subscription]] = {}
        self._wanted: frozenset[str] = frozenset()
        self._listened_to: frozenset[str] = frozenset()
        self._stopped = False
        self._ended = False
        """Whether nothing is heard any more, and all who were subscribed have been told, or are."""
        self._listener: Listener | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="pgnotify-listener", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def subscribe(
        self,
        channel: str,
        on_notifications: OnNotifications,
        on_gap: OnGap | None = None,
        on_end: Callable[[], None] | None = None,
        on_proven: OnProven | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> Subscription:
        """Hear what arrives on ``channel``. Callbacks run in the listener's thread: be quick."""
        subscription = Subscription(
            self, channel, on_notifications, on_gap, on_end, on_proven, on_lost
        )
        with self._lock:
            ended = self._ended
            if not ended:
                self._subscriptions.setdefault(channel, []).append(subscription)
                if channel in self._listened_to:
                    subscription.established.set_result(None)
        if not ended:
            self._update()
        elif on_end is not None:
            self._call(on_end)
        return subscription

    def remove(self, subscription: Subscription) -> None:
        if self.pid != os.getpid():
            return  # a forked child's copy: nobody listens for it here
        with self._lock:
            same = self._subscriptions.get(subscription.channel, [])
            if subscription in same:
                same.remove(subscription)
                if not same:
                    del self._subscriptions[subscription.channel]
        self._update()

    def stop(self, timeout: float = _EXIT_TIMEOUT) -> None:
        """Close the connection and end the thread, waiting for at most ``timeout`` seconds."""
        with self._lock:
            self._stopped = True
            loop, listener = self._loop, self._listener
        if loop is not None and listener is not None:
            with suppress(RuntimeError):  # it has just ended by itself
                loop.call_soon_threadsafe(listener.stop)
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        return self.pid == os.getpid() and self._thread.is_alive() and not self._ended

    @property
    def backend_pid(self) -> int | None:
        """Pid of the PostgreSQL backend, None while there is no connection."""
        return None if self._listener is None else self._listener.backend_pid

    def _update(self) -> None:
        loop, listener = self._loop, self._listener
        if loop is not None and listener is not None:
            with suppress(RuntimeError):  # the thread has ended; nothing more will be heard
                loop.call_soon_threadsafe(self._want, listener)

    def _want(self, listener: Listener) -> None:
        # Read here, on the loop: two updates then cannot overtake each other.
        with self._lock:
            channels = frozenset(self._subscriptions)
            # What is about to be left must not count as heard for whoever comes next.
            self._wanted = channels
            self._listened_to &= channels
        listener.want(channels)

    def _run(self) -> None:
        try:
            asyncio.run(self._listen())
        except Exception:
            logger.exception("The background listener on database %r ended", self.using)
        finally:
            with self._lock:
                self._ended = True
                everybody = [entry for same in self._subscriptions.values() for entry in same]
            for subscription in everybody:
                if subscription.on_end is not None:
                    self._call(subscription.on_end)

    async def _listen(self) -> None:
        with self._lock:
            channels = frozenset(self._subscriptions)
            if self._stopped:
                return
            self._listener = Listener(
                self.using,
                channels,
                self,
                on_proven=self._proven,
                # Where it keeps an epoch table, that is one of this process.
                heartbeat_interval=heartbeat_interval() if conf.EPOCH_TABLE is None else None,
            )
            self._loop = asyncio.get_running_loop()
        self._want(self._listener)  # what was subscribed to meanwhile
        await self._listener.run()

    # -- sink -----------------------------------------------------------------------------------

    def established(self, channels: frozenset[str]) -> None:
        with self._lock:
            self._listened_to = channels & self._wanted
            for channel in self._listened_to & self._subscriptions.keys():
                for subscription in self._subscriptions[channel]:
                    if not subscription.established.done():
                        subscription.established.set_result(None)

    def lost(self, cause: str, retry_in: float) -> None:
        with self._lock:
            self._listened_to = frozenset()
            for same in self._subscriptions.values():
                for subscription in same:
                    if subscription.established.done():
                        subscription.established = Future()
            everybody = [entry for same in self._subscriptions.values() for entry in same]
        for subscription in everybody:
            if subscription.on_lost is not None:
                self._call(subscription.on_lost)

    def status(self) -> dict[str, Any]:
        return {
            "node": conf.NODE,
            "pid": os.getpid(),
            "backend": self.backend_pid,
            "database": self.using,
            "role": "in process",
            "established": False,
            **({} if self._listener is None else self._listener.status()),
            "topics": sorted(self._listened_to),
        }

    def _proven(self, at: int, channels: frozenset[str]) -> None:
        with self._lock:
            everybody = [entry for same in self._subscriptions.values() for entry in same]
        for subscription in everybody:
            if subscription.on_proven is not None:
                self._call(subscription.on_proven, at, channels)

    def led(self, leader: bool) -> None:
        """Never: this listener does not compete."""

    def notified(self, notifications: Sequence[Notification]) -> None:
        by_channel: dict[str, list[Notification]] = {}
        for notification in notifications:
            by_channel.setdefault(notification.channel, []).append(notification)
        for channel, batch in by_channel.items():
            for subscription in self._subscribed(channel):
                self._call(subscription.on_notifications, batch)

    def gap(self, since: datetime | None, until: datetime, cause: str, *, for_leader: bool) -> None:
        with self._lock:
            everybody = [entry for same in self._subscriptions.values() for entry in same]
        for subscription in everybody:
            if subscription.on_gap is not None:
                self._call(subscription.on_gap, since, until, cause)

    def _subscribed(self, channel: str) -> list[Subscription]:
        with self._lock:
            return list(self._subscriptions.get(channel, ()))

    def _call(self, callback: Callable[..., None], *args: object) -> None:
        try:
            callback(*args)
        except Exception:
            # One subscriber's mistake must not deafen the others.
            logger.exception("A subscriber of the background listener failed")


def wait_until_established(subscriptions: Sequence[Subscription], timeout: float) -> None:
    """Return once every later frame of these will arrive.

    Raises:
        ListenError: that is not so within ``timeout`` seconds.
    """
    ends = time.monotonic() + timeout
    for subscription in subscriptions:
        try:
            subscription.established.result(max(0.0, ends - time.monotonic()))
        except TimeoutError:
            raise _not_established(subscription, timeout) from None


async def established(subscriptions: Sequence[Subscription], timeout: float) -> None:
    """As :func:`wait_until_established`, for async code."""
    for subscription in subscriptions:
        future = subscription.established
        if not future.done():
            try:
                async with asyncio.timeout(timeout):
                    # Shielded, because it is everybody's: our timeout must not cancel it.
                    await asyncio.shield(asyncio.wrap_future(future))
            except TimeoutError:
                raise _not_established(subscription, timeout) from None


def _not_established(subscription: Subscription, timeout: float) -> ListenError:
    return ListenError(
        f"Database {subscription.using!r} is not heard after {timeout:g} s; "
        f"'manage.py pglisten --check' tells why."
    )


_listeners: dict[str, BackgroundListener] = {}
_guard = threading.Lock()


def background_listener(
    using: str, subscribe: Callable[[BackgroundListener], None] | None = None
) -> BackgroundListener:
    """The listener of this process on alias ``using``, started if it is not running.

    Args:
        subscribe: subscribes to it, if possible before it starts, so that its first proof covers
            all of that.
    """
    with _guard:
        listener = _listeners.get(using)
        starts = listener is None or not listener.alive
        if listener is None or starts:
            listener = _listeners[using] = BackgroundListener(using)
        if subscribe is not None:
            subscribe(listener)
        if starts:
            listener.start()
        return listener


def stop_all() -> None:
    """Stop the background listeners of this process."""
    with _guard:
        stopping = [entry for entry in _listeners.values() if entry.pid == os.getpid()]
        _listeners.clear()
    for listener in stopping:
        listener.stop()


def _forget_in_child() -> None:
    global _guard
    _guard = threading.Lock()  # the parent may have held it
    # Kept alive on purpose: to collect the parent's connection would close its socket properly,
    # telling the server goodbye in the parent's name.
    _inherited.extend(_listeners.values())
    _listeners.clear()


_inherited: list[BackgroundListener] = []

atexit.register(stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
