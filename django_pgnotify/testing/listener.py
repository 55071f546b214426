"""``running_listener()``: a real listener with real receivers, in a thread of the test process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..conf import conf
from ..dispatching.service import Service
from ..events import Event
from ..exceptions import ListenError


class RunningListener:
    """A listener that runs, and what it has heard so far."""

    def __init__(self, using: str, topics: Sequence[str] | None) -> None:
        self.using = using
        self.topics = topics
        self.events: list[Event] = []
        self.service: Service | None = None
        self._changed = threading.Condition()
        self._times_ready = 0
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="running-listener")

    def start(self, timeout: float) -> None:
        self._thread.start()
        self.wait_until_ready(1, timeout)

    def stop(self, timeout: float) -> None:
        if self._loop is not None and self.service is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self.service.stop)
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"The listener did not stop within {timeout:g} s.")

    def wait_for(self, count: int, timeout: float = 10.0) -> list[Event]:
        """Return the events heard once there are ``count`` and their receivers have run.

        Raises:
            TimeoutError: fewer arrived within ``timeout`` seconds; the message says how many, and
                which topics are listened to.
            ListenError: the listener has ended by an error.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: len(self.events) >= count or self._failure is not None, timeout
            )
            arrived = len(self.events)
        self._raise_failure()
        if arrived < count:
            topics = ", ".join(sorted(self._require_service().topics)) or "none"
            raise TimeoutError(
                f"{arrived} of {count} event(s) arrived within {timeout:g} s; "
                f"topics listened to: {topics}."
            )
        self.settle(timeout)
        return list(self.events)

    def settle(self, timeout: float = 10.0) -> None:
        """Wait until every receiver has handled what it was given."""
        self._on_loop(self._require_service().dispatcher.settled(), timeout)

    def wait_until_ready(self, times: int = 1, timeout: float = 10.0) -> None:
        """Wait until the listener has been established ``times`` times."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._times_ready >= times or self._failure is not None, timeout
            )
        self._raise_failure()
        if not done:
            error = None if self.service is None else self.service.listener.health.last_error
            raise ListenError(f"Not established within {timeout:g} s: {error}")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise ListenError("The listener of the test failed.") from self._failure

    @property
    def backend_pid(self) -> int | None:
        """Pid of the listener's PostgreSQL backend, for tests that terminate it."""
        return self._require_service().listener.backend_pid

    def _require_service(self) -> Service:
        if self.service is None:
            raise ListenError("The listener of the test is not running.")
        return self.service

    def _on_loop(self, coroutine: Any, timeout: float) -> Any:
        if self._loop is None:
            raise ListenError("The listener of the test is not running.")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as exc:  # noqa: BLE001 - handed to the thread that waits
            with self._changed:
                self._failure = exc
                self._changed.notify_all()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.service = Service(
            self.using, topics=self.topics, observe=self._heard, on_ready=self._ready
        )
        await self.service.run()

    def _heard(self, events: Sequence[Event]) -> None:
        # Counted once they have been dispatched, so that settle() cannot come too early.
        asyncio.get_running_loop().call_soon(self._count, list(events))

    def _count(self, events: list[Event]) -> None:
        with self._changed:
            self.events += events
            self._changed.notify_all()

    def _ready(self) -> None:
        with self._changed:
            self._times_ready += 1
            self._changed.notify_all()


@contextmanager
def running_listener(
    topics: Sequence[str] | None = None, *, using: str | None = None, timeout: float = 10.0
) -> Iterator[RunningListener]:
    """Run a listener and the registered receivers in a thread, established when this yields.

    The test must commit for real: ``TransactionTestCase``, or
    ``@pytest.mark.django_db(transaction=True)``.

    Args:
        topics: only these; default all that have a receiver.
        using: database alias; default ``PGNOTIFY_LISTEN_DATABASE`` or ``PGNOTIFY_DATABASE``.
        timeout: seconds to wait for the start, and for the end.

    Raises:
        ListenError: not established in time; the message names the cause.
    """
    listener = RunningListener(using or conf.listen_database, topics)
    try:
        listener.start(timeout)
        yield listener
    finally:
        listener.stop(timeout)
