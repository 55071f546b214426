"""Which event loop serves whom: the hub of each loop, and a loop of ours for those that pass.

``async_to_sync`` makes a loop for one call where no other is running. To connect for each would be
slow, and what such a loop joins would be gone with it; so these calls are served by one thread
with a loop that stays. Hubs of all other loops end with their loop.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import types
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from asgiref.sync import AsyncToSync

from ..exceptions import PublishError
from .hub import Hub

T = TypeVar("T")

_EXIT_TIMEOUT = 5.0
_GRACE = 0.5

Loop = asyncio.AbstractEventLoop

generation = 0
"""Counts the forks between the first process and this one: what is of another is not ours."""

_hubs: dict[Loop, dict[tuple[str, str], Hub]] = {}
_calls: dict[Loop, set[Future[Any]]] = {}
"""What other loops wait for, by the loop that is to do it."""
_inherited: list[object] = []
_guard = threading.Lock()

on_loop_closed: list[Callable[[Loop], None]] = []
"""Called when a loop that had a hub has been closed."""


def is_passing(loop: Loop) -> bool:
    """Whether ``async_to_sync`` made this loop, for one call."""
    return loop in getattr(AsyncToSync, "loop_thread_executors", ())


def hub_of(publish_alias: str, listen_alias: str) -> Hub:
    """The hub of the running loop for these databases, made if there is none."""
    loop = asyncio.get_running_loop()
    hubs = _hubs.get(loop)
    if hubs is None:
        hubs = _hubs[loop] = {}
        _close_with(loop)
    hub = hubs.get((publish_alias, listen_alias))
    if hub is None or hub.closed:
        hub = hubs[publish_alias, listen_alias] = Hub(publish_alias, listen_alias)
    return hub


def _close_with(loop: Loop) -> None:
    """Have the hubs of a loop close before it does."""
    close = loop.close

    def close_hubs_too(self: Loop) -> None:
        if not loop.is_running():
            _end(loop)
        close()
        _refuse_calls(loop)

    # As an attribute of this one loop: neither asyncio nor uvloop has a hook for its end.
    loop.close = types.MethodType(close_hubs_too, loop)  # type: ignore[method-assign]


def _end(loop: Loop) -> None:
    hubs = _hubs.pop(loop, None)
    if not hubs:
        return
    for hub in hubs.values():
        if not loop.is_closed():
            _finish(loop, hub)
        hub.close_at_once()
    for callback in on_loop_closed:
        callback(loop)


def _finish(loop: Loop, hub: Hub) -> None:
    """Have a loop that stands still close a hub."""

    def run() -> None:
        closing = hub.aclose()
        try:
            loop.run_until_complete(closing)
        except Exception:  # noqa: BLE001 - it is going away; what is open is closed without it
            closing.close()

    if asyncio._get_running_loop() is None:
        run()
    else:  # no other may run in this thread
        thread = threading.Thread(target=run, name="pgnotify-layer-close", daemon=True)
        thread.start()
        thread.join(_EXIT_TIMEOUT)


# -- the loop that stays ------------------------------------------------------------------------


class Home:
    """A thread with an event loop, for callers whose own loop will not be there any more."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        running = threading.Event()
        self.loop.call_soon(running.set)
        self._thread = threading.Thread(target=self._run, name="pgnotify-layer", daemon=True)
        self._thread.start()
        running.wait()  # else whoever is first may find a loop that does not run

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Send what waits, close the connections, and end the thread."""
        with suppress(RuntimeError):  # it has ended by itself
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_EXIT_TIMEOUT)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            with suppress(Exception):
                calls = [
                    task
                    for task in asyncio.all_tasks(self.loop)
                    if task.get_name() != "pgnotify-layer-listener"  # which its hub stops
                ]
                if calls:
                    # Those that send will be done in no time, those that receive never.
                    self.loop.run_until_complete(asyncio.wait(calls, timeout=_GRACE))
                for task in calls:
                    task.cancel()
            self.loop.close()
            _refuse_calls(self.loop)


_home: Home | None = None


def home_loop() -> Loop:
    """The loop that serves passing loops, started if it is not running.

    Raises:
        PublishError: the interpreter is ending.
    """
    global _home
    with _guard:
        if _home is None or not _home.alive:
            try:
                _home = Home()
            except RuntimeError as exc:
                raise PublishError(f"The channel layer has been stopped: {exc}") from exc
        return _home.loop


async def run_on(
    loop: Loop,
    function: Callable[..., Coroutine[Any, Any, T]],
    *args: Any,
    undo: Callable[[T], None] | None = None,
) -> T:
    """Run a coroutine function on another loop of this process.

    Args:
        undo: called there with a result that nobody waits for any more.

    Raises:
        PublishError: that loop does not run.
    """
    if not loop.is_running():
        raise _ended()
    future: Future[T] = Future()
    there: list[asyncio.Task[None]] = []

    async def work() -> None:
        try:
            result = await function(*args)
        except asyncio.CancelledError:
            future.cancel()
            raise
        except BaseException as exc:  # noqa: BLE001 - it is the caller's
            if future.set_running_or_notify_cancel():
                future.set_exception(exc)
            return
        if future.set_running_or_notify_cancel():
            future.set_result(result)
        elif undo is not None:
            undo(result)

    def start() -> None:
        there.append(loop.create_task(work(), name="pgnotify-layer-call"))

    def cancel() -> None:
        for task in there:
            task.cancel()

    # It may end at any moment: what it has not begun by then is refused when it is closed.
    calls = _calls.setdefault(loop, set())
    calls.add(future)
    try:
        loop.call_soon_threadsafe(start)
    except RuntimeError:
        _refuse_calls(loop)
        raise _ended() from None
    try:
        return await asyncio.shield(asyncio.wrap_future(future))
    except asyncio.CancelledError:
        if future.cancel():
            loop.call_soon_threadsafe(cancel)
        elif undo is not None and not future.cancelled() and future.exception() is None:
            loop.call_soon_threadsafe(undo, future.result())
        raise
    finally:
        calls.discard(future)


def _refuse_calls(loop: Loop) -> None:
    """Tell whoever waits for a loop that has been closed."""
    for future in list(_calls.pop(loop, ())):
        with suppress(InvalidStateError):  # it is done
            future.set_exception(_ended())


def _ended() -> PublishError:
    return PublishError("The channel belongs to an event loop that does not run any more.")


# -- the end, and forks -------------------------------------------------------------------------


def stop_all() -> None:
    """Close what loops that do not run any more have left open, and the loop of ours."""
    global _home
    with _guard:
        home, _home = _home, None
    if home is not None:
        home.stop()
    for loop in list(_hubs):
        if not loop.is_running():
            _end(loop)


def _forget_in_child() -> None:
    global _guard, _home, generation
    generation += 1
    _guard = threading.Lock()  # the parent may have held it
    # To collect them would close the parent's connections in its name.
    _inherited.extend([_home, dict(_hubs)])
    _hubs.clear()
    _calls.clear()
    _home = None


atexit.register(stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
