"""The listener of a process that has other things to do: one connection for all subscriptions."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import pytest

from django_pgnotify import publish
from django_pgnotify.listening.background import (
    BackgroundListener,
    Subscription,
    background_listener,
    stop_all,
)
from django_pgnotify.listening.connection import Notification
from tests.integration.recording import DEADLINE, backends_of_listeners, notify, query, terminate

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _stopped() -> Iterator[None]:
    yield
    stop_all()


class Heard:
    """What one subscription heard, to be waited for."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Any] = queue.Queue()

    def __call__(self, notifications: Sequence[Notification]) -> None:
        for notification in notifications:
            self._queue.put(notification.payload.decode())

    def gap(self, since: datetime | None, until: datetime, cause: str) -> None:
        self._queue.put("gap")

    def next(self) -> Any:
        return self._queue.get(timeout=DEADLINE)

    @property
    def empty(self) -> bool:
        return self._queue.empty()


def established(*subscriptions: Subscription) -> None:
    for subscription in subscriptions:
        subscription.established.result(DEADLINE)


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not met():
        assert time.monotonic() < deadline
        query("SELECT 1")


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The LISTENs and UNLISTENs of every listening connection of this process."""
    from django_pgnotify.listening.connection import ListenConnection

    said: list[str] = []
    original = ListenConnection._each

    async def each(
        self: ListenConnection, statement: str, channels: Sequence[str], timeout: float
    ) -> None:
        said.extend(statement.format(name) for name in channels if not name.startswith("pgnotify."))
        await original(self, statement, channels, timeout)

    monkeypatch.setattr(ListenConnection, "_each", each)
    return said


def test_many_subscriptions_share_one_connection() -> None:
    heard = [Heard() for _ in range(50)]
    background = background_listener("default")
    established(*[background.subscribe(f"c{n}", each) for n, each in enumerate(heard)])
    assert backends_of_listeners() == [background.backend_pid]
    for number in range(50):
        notify(f"c{number}", str(number))
    assert [each.next() for each in heard] == [str(number) for number in range(50)]
    assert background_listener("default") is background


def test_threads_that_ask_at_the_same_time_get_the_same_listener() -> None:
    barrier = threading.Barrier(8)
    found: list[BackgroundListener] = []

    def ask() -> None:
        barrier.wait(DEADLINE)
        found.append(background_listener("default"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


def test_a_channel_is_listened_to_once_and_left_with_its_last_subscriber(
    statements: list[str],
) -> None:
    background = background_listener("default")
    first, second, third = Heard(), Heard(), Heard()
    one = background.subscribe("a", first)
    two = background.subscribe("a", second)
    other = background.subscribe("b", third)
    established(one, two, other)
    assert sorted(statements) == ["LISTEN a", "LISTEN b"]
    one.close()
    notify("a", "for the second")
    assert second.next() == "for the second"
    assert first.empty
    assert sorted(statements) == ["LISTEN a", "LISTEN b"]
    two.close()
    wait_until(lambda: "UNLISTEN a" in statements)
    notify("a", "for nobody")
    notify("b", "for the third")
    assert third.next() == "for the third"
    assert second.empty


def test_closing_a_subscription_twice_is_harmless() -> None:
    background = background_listener("default")
    heard = Heard()
    gone, stays = background.subscribe("a", Heard()), background.subscribe("a", heard)
    established(gone, stays)
    gone.close()
    gone.close()
    notify("a", "still here")
    assert heard.next() == "still here"


def test_a_subscription_that_is_established_hears_the_very_next_frame() -> None:
    background = background_listener("default")
    for number in range(50):
        heard = Heard()
        established(background.subscribe(f"fresh{number}", heard))
        notify(f"fresh{number}", "at once")
        assert heard.next() == "at once"


def test_a_channel_that_was_left_is_established_again_only_after_a_new_listen(
    statements: list[str],
) -> None:
    background = background_listener("default")
    established(background.subscribe("stays", Heard()))
    for times in range(1, 31):
        heard = Heard()
        subscription = background.subscribe("again", heard)
        established(subscription)
        assert statements.count("LISTEN again") == times
        notify("again", "at once")
        assert heard.next() == "at once"
        subscription.close()
        wait_until(lambda times=times: statements.count("UNLISTEN again") == times)  # type: ignore[misc]


def test_a_channel_left_and_taken_again_at_once_is_still_heard() -> None:
    background = background_listener("default")
    established(background.subscribe("stays", Heard()))
    for _ in range(50):
        heard = Heard()
        subscription = background.subscribe("flapping", heard)
        established(subscription)
        notify("flapping", "at once")
        assert heard.next() == "at once"
        subscription.close()


def test_subscriptions_survive_a_lost_connection_and_hear_of_the_gap_first() -> None:
    background = background_listener("default")
    heard = Heard()
    established(background.subscribe("a", heard, heard.gap))
    first = background.backend_pid
    terminate(first)
    assert heard.next() == "gap"
    late = Heard()
    established(background.subscribe("b", late))
    notify("a", "after")
    assert heard.next() == "after"
    assert background.backend_pid not in (None, first)


def test_a_subscriber_that_raises_does_not_deafen_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    background = background_listener("default")
    heard = Heard()

    def broken(notifications: Sequence[Notification]) -> None:
        raise RuntimeError("as asked")

    established(background.subscribe("a", broken), background.subscribe("a", heard))
    notify("a", "one s3cr3t")
    notify("a", "two")
    assert [heard.next(), heard.next()] == ["one s3cr3t", "two"]
    assert "A subscriber of the background listener failed" in caplog.text
    assert "s3cr3t" not in caplog.text


def test_stop_ends_the_thread_and_the_connection_and_the_next_use_starts_anew() -> None:
    background = background_listener("default")
    established(background.subscribe("a", Heard()))
    stop_all()
    assert not background.alive
    wait_until(lambda: backends_of_listeners() == [])
    again = background_listener("default")
    assert again is not background
    heard = Heard()
    established(again.subscribe("a", heard))
    notify("a", "anew")
    assert heard.next() == "anew"


def test_stop_directly_after_start_ends_the_thread() -> None:
    for _ in range(20):
        background = background_listener("default")
        stop_all()
        assert not background.alive
    wait_until(lambda: backends_of_listeners() == [])


# -- fork -------------------------------------------------------------------------------------


def test_who_comes_while_a_listener_ends_is_told_so_or_given_another_one() -> None:
    inside, go_on = threading.Event(), threading.Event()
    ended: list[str] = []

    def wait_and_note() -> None:
        inside.set()
        assert go_on.wait(DEADLINE)
        ended.append("first")

    dying = background_listener("default")
    established(dying.subscribe("a", Heard(), on_end=wait_and_note))
    assert dying._loop is not None
    assert dying._listener is not None
    dying._loop.call_soon_threadsafe(dying._listener.stop)
    try:
        assert inside.wait(DEADLINE)
        late = dying.subscribe("a", Heard(), on_end=lambda: ended.append("late"))
        assert ended == ["late"]
        assert not late.alive
        heard = Heard()
        established(background_listener("default").subscribe("a", heard))
        notify("a", "heard")
        assert heard.next() == "heard"
    finally:
        go_on.set()
        dying._thread.join(DEADLINE)
    assert ended == ["late", "first"]


def in_child(work: Callable[[], object]) -> None:
    """Run ``work`` in a forked child, and fail if it fails there."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover - coverage is not collected in a child that leaves like this
        status = 1
        try:
            os.close(read)
            work()
            status = 0
        except BaseException as exc:  # noqa: BLE001 - told to the parent, which fails
            os.write(write, repr(exc).encode()[:4000])
        finally:
            os._exit(status)
    os.close(write)
    deadline = threading.Timer(DEADLINE * 2, os.kill, (pid, signal.SIGKILL))
    deadline.start()
    try:
        with os.fdopen(read) as pipe:
            said = pipe.read()
        _, status = os.waitpid(pid, 0)
    finally:
        deadline.cancel()
    assert os.waitstatus_to_exitcode(status) == 0, said or "it hung"


pytest_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest_fork
def test_a_forked_child_starts_a_listener_of_its_own_and_leaves_its_parents_alone() -> None:
    from django.db import connections

    heard = Heard()
    background = background_listener("default")
    established(background.subscribe("a", heard))
    backend = background.backend_pid
    connections.close_all()  # Django's own connection is not ours to make fork-safe

    def work() -> None:
        assert not background.alive
        own = background_listener("default")
        assert own is not background
        mine = Heard()
        established(own.subscribe("a", mine))
        assert own.backend_pid not in (None, backend)
        notify("a", "from the child")
        assert mine.next() == "from the child"
        publish("a", {"from": "the child"})
        assert "the child" in mine.next()
        stop_all()

    in_child(work)
    assert heard.next() == "from the child"
    assert "the child" in heard.next()
    notify("a", "from the parent")
    assert heard.next() == "from the parent"
    assert background.backend_pid == backend


@pytest_fork
def test_children_that_never_listen_do_not_end_the_parents_connection() -> None:
    from django.db import connections

    heard = Heard()
    background = background_listener("default")
    established(background.subscribe("a", heard, heard.gap))
    backend = background.backend_pid
    connections.close_all()
    import gc

    for _ in range(3):
        in_child(gc.collect)
    notify("a", "still here")
    assert heard.next() == "still here"
    assert background.backend_pid == backend


@pytest_fork
def test_a_child_that_closes_an_inherited_subscription_neither_hangs_nor_disturbs_the_parent() -> (
    None
):
    from django.db import connections

    heard = Heard()
    background = background_listener("default")
    subscription = background.subscribe("a", heard, heard.gap)
    established(subscription)
    connections.close_all()
    in_child(subscription.close)
    notify("a", "still here")
    assert heard.next() == "still here"
