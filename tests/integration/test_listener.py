"""The listener against a real server whose connections are really broken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from django.db import connections
from pytest_django import Settings

from django_pgnotify import signals
from django_pgnotify.listening.connection import Notification
from django_pgnotify.listening.listener import BACKOFF_BASE, Listener
from example_project.embedded import EmbeddedPostgres
from tests.integration.recording import (
    DEADLINE,
    Sink,
    alias_at,
    anotify,
    aterminate,
    client,
    running,
)
from tests.proxy import TCPProxy

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _quick(settings: Settings) -> None:
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.2
    settings.PGNOTIFY_CONNECT_TIMEOUT = 5.0


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def proxied(proxy: TCPProxy) -> Iterator[str]:
    """An alias that goes through the proxy."""
    with alias_at("proxied", HOST=proxy.host, PORT=str(proxy.port)) as alias:
        yield alias


async def blackhole(proxy: TCPProxy) -> None:
    await asyncio.to_thread(proxy.blackhole)


# -- established ----------------------------------------------------------------------------


async def test_once_established_the_server_listens_and_frames_arrive(sink: Sink) -> None:
    listener = Listener("default", ["jobs", 'Ünusual channel; "quoted"'], sink)
    async with client() as other, running(listener):
        channels = await sink.until("established")
        assert channels == {"jobs", 'Ünusual channel; "quoted"'}
        await anotify(other, "jobs", "one", "two")
        await anotify(other, 'Ünusual channel; "quoted"', "three")
        await sink.until("heard", 3)
        assert sink.of("heard") == ["one", "two", "three"]
        assert listener.health.round_trip is not None
        assert listener.health.round_trip < DEADLINE
    assert sink.kinds == ["established", "heard", "heard", "heard"]


async def test_a_listener_that_never_hears_itself_is_never_established(
    sink: Sink, settings: Settings
) -> None:
    settings.PGNOTIFY_HEARTBEAT_TIMEOUT = 0.2

    class Mute(Listener):
        async def _echo(self, nonce: str) -> None:
            """LISTEN was committed, but nothing comes back."""

    async with running(Mute("default", ["jobs"], sink)):
        cause, _ = await sink.until("lost", 2)
    assert "did not come back" in cause
    assert "pooler" in cause
    assert "established" not in sink.kinds


async def test_frames_between_listen_and_echo_are_delivered_once_established(sink: Sink) -> None:
    async with client() as other:

        class Crossed(Listener):
            async def _echo(self, nonce: str) -> None:
                await anotify(other, "jobs", "early", "earlier than the echo")
                await super()._echo(nonce)

        async with running(Crossed("default", ["jobs"], sink)):
            await sink.until("heard", 2)
    assert sink.kinds == ["established", "heard", "heard"]
    assert sink.of("heard") == ["early", "earlier than the echo"]


async def test_frames_between_listen_and_echo_of_a_reconnect_come_after_the_gap(
    sink: Sink,
) -> None:
    async with client() as other:

        class Crossed(Listener):
            async def _echo(self, nonce: str) -> None:
                await anotify(other, "jobs", "crossed")
                await super()._echo(nonce)

        listener = Crossed("default", ["jobs"], sink)
        async with running(listener):
            await sink.until("heard", 1)
            await aterminate(other, listener.backend_pid)
            await sink.until("heard", 2)
    assert sink.kinds == ["established", "heard", "lost", "gap", "established", "heard"]


async def test_an_empty_set_of_channels_is_established_too(sink: Sink) -> None:
    async with running(Listener("default", [], sink)):
        assert await sink.until("established") == frozenset()


# -- lost and found -------------------------------------------------------------------------


async def test_a_terminated_backend_is_replaced_and_the_gap_comes_before_later_frames(
    sink: Sink,
) -> None:
    listener = Listener("default", ["jobs"], sink)
    async with client() as other, running(listener):
        await sink.until("established")
        first = listener.backend_pid
        before = datetime.now(UTC)
        await aterminate(other, first)
        await sink.until("established", 2)
        after = datetime.now(UTC)
        await anotify(other, "jobs", "later")
        await sink.until("heard")
        assert listener.backend_pid not in (None, first)
        assert listener.health.last_error is None
    assert sink.kinds == ["established", "lost", "gap", "established", "heard"]
    [(since, until, cause)] = sink.of("gap")
    assert since <= before <= until <= after
    assert "the connection broke" in cause


async def test_a_frame_sent_while_nobody_listened_lies_inside_the_gap(
    sink: Sink, proxy: TCPProxy, proxied: str
) -> None:
    async with client() as other, running(Listener(proxied, ["jobs"], sink)):
        await sink.until("established")
        await asyncio.to_thread(proxy.close)
        await sink.until("lost")
        missed_at = datetime.now(UTC)
        await anotify(other, "jobs", "missed")
        await asyncio.to_thread(proxy.open)
        await sink.until("established", 2)
        await anotify(other, "jobs", "heard")
        await sink.until("heard")
    assert sink.of("heard") == ["heard"]
    [(since, until, _)] = sink.of("gap")
    assert since < missed_at < until


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
async def test_a_connection_that_the_network_closes_is_replaced_with_a_gap(
    sink: Sink, proxy: TCPProxy, proxied: str, reset: bool
) -> None:
    async with client() as other, running(Listener(proxied, ["jobs"], sink)):
        await sink.until("established")
        await asyncio.to_thread(proxy.disconnect, reset=reset)
        await sink.until("established", 2)
        await anotify(other, "jobs", "later")
        await sink.until("heard")
    assert sink.kinds == ["established", "lost", "gap", "established", "heard"]


async def test_a_half_open_connection_is_found_by_the_heartbeat_and_replaced(
    sink: Sink, proxy: TCPProxy, proxied: str, settings: Settings
) -> None:
    settings.PGNOTIFY_HEARTBEAT_INTERVAL = 0.1
    settings.PGNOTIFY_HEARTBEAT_TIMEOUT = 0.3
    settings.PGNOTIFY_CONNECT_TIMEOUT = 0.5
    async with client() as other, running(Listener(proxied, ["jobs"], sink)):
        await sink.until("established")
        await blackhole(proxy)
        # Not an error of the socket: nothing but the deadline can tell.
        cause, _ = await sink.until("lost")
        assert "answer" in cause or "heartbeat" in cause
        await anotify(other, "jobs", "into the hole")
        await sink.until("lost", 2)  # new connections are met with silence, and given up too
        await asyncio.to_thread(proxy.disconnect)
        await asyncio.to_thread(proxy.resume)
        await sink.until("gap")
        await sink.until("established", 2)
        await anotify(other, "jobs", "later")
        await sink.until("heard")
    assert sink.of("heard")[-1] == "later"
    assert sink.kinds.index("gap") < sink.kinds.index("heard")


async def test_a_server_that_stops_and_starts_on_its_port_is_found_again(
    sink: Sink, start_server: Callable[..., EmbeddedPostgres]
) -> None:
    server = await asyncio.to_thread(start_server)
    own = {"NAME": "postgres", "USER": "postgres", "HOST": server.host, "PORT": str(server.port)}
    with alias_at("own", **own, PASSWORD="") as alias:
        async with running(Listener(alias, ["jobs"], sink)):
            await sink.until("established")
            await asyncio.to_thread(server.stop)
            await sink.until("lost", 2)
            await asyncio.to_thread(server.start)
            await sink.until("established", 2)
            async with client(server.url()) as other:
                await anotify(other, "jobs", "after the restart")
            await sink.until("heard")
    assert sink.of("heard") == ["after the restart"]
    assert sink.kinds.index("gap") < sink.kinds.index("heard")
    assert len(sink.of("gap")) == 1


async def test_a_fail_over_to_another_server_is_followed_and_told_as_a_gap(
    sink: Sink, start_server: Callable[..., EmbeddedPostgres]
) -> None:
    """The parameters name both, as libpq lets them; the first that answers is the primary."""
    old, new = [await asyncio.to_thread(start_server) for _ in range(2)]
    await asyncio.to_thread(new.stop)
    both = {"HOST": f"{old.host},{new.host}", "PORT": f"{old.port},{new.port}"}
    with alias_at("both", **both, NAME="postgres", USER="postgres", PASSWORD="") as alias:
        async with running(Listener(alias, ["jobs"], sink)):
            await sink.until("established")
            await asyncio.to_thread(old.stop, "immediate")
            await asyncio.to_thread(new.start)
            await sink.until("established", 2)
            async with client(new.url()) as other:
                await anotify(other, "jobs", "from the new primary")
            await sink.until("heard")
    assert sink.of("heard") == ["from the new primary"]
    assert sink.kinds.index("gap") < sink.kinds.index("heard")


async def test_a_session_that_was_unlistened_behind_our_back_is_replaced(
    sink: Sink, settings: Settings
) -> None:
    settings.PGNOTIFY_HEARTBEAT_INTERVAL = 0.1

    class Meddled(Listener):
        meddle = False

        async def _echo(self, nonce: str) -> None:
            if self.meddle:
                self.meddle = False
                await self._open().execute(b'UNLISTEN "jobs"', timeout=5)
            await super()._echo(nonce)

    listener = Meddled("default", ["jobs"], sink)
    async with client() as other, running(listener):
        await sink.until("established")
        listener.meddle = True
        cause, _ = await sink.until("lost")
        assert "no longer listens" in cause
        await sink.until("established", 2)
        await anotify(other, "jobs", "later")
        await sink.until("heard")
    assert sink.kinds == ["established", "lost", "gap", "established", "heard"]


async def test_a_quiet_connection_is_proven_again_and_again(sink: Sink, settings: Settings) -> None:
    settings.PGNOTIFY_HEARTBEAT_INTERVAL = 0.02
    proofs = asyncio.Event()
    count = 0

    class Counted(Listener):
        async def _echoed(self, nonce: str) -> None:
            nonlocal count
            await super()._echoed(nonce)
            count += 1
            if count == 5:
                proofs.set()

    async with running(Counted("default", ["jobs"], sink)):
        async with asyncio.timeout(DEADLINE):
            await proofs.wait()
    assert sink.kinds == ["established"]


async def test_pauses_between_attempts_grow_within_their_bounds(
    sink: Sink, proxy: TCPProxy, proxied: str, settings: Settings
) -> None:
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.3
    await asyncio.to_thread(proxy.close)
    async with running(Listener(proxied, ["jobs"], sink)):
        await sink.until("lost", 5)
        bounds = [min(0.3, BACKOFF_BASE * 2**attempt) for attempt in range(5)]
        pauses = [retry_in for _, retry_in in sink.of("lost")[:5]]
        assert all(0 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))
        assert len(set(pauses)) == 5  # jittered
        await asyncio.to_thread(proxy.open)
        await sink.until("established")
    # It never listened before, so nothing can have been missed.
    assert "gap" not in sink.kinds


async def test_a_healthy_period_begins_a_new_series_of_pauses(
    sink: Sink, settings: Settings
) -> None:
    settings.PGNOTIFY_HEARTBEAT_INTERVAL = 0.01
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 30.0

    class Proving(Listener):
        async def _echoed(self, nonce: str) -> None:
            await super()._echoed(nonce)
            sink._add("proof", nonce)

    listener = Proving("default", ["jobs"], sink)
    # Were the attempts never reset, the tenth pause could be up to 30 seconds.
    async with client() as other, running(listener):
        for times in range(1, 13):
            await sink.until("established", times)
            await sink.until("proof", len(sink.of("proof")) + 2)
            await aterminate(other, listener.backend_pid)
            _, retry_in = await sink.until("lost", times)
            assert retry_in <= BACKOFF_BASE


async def test_the_gap_signal_is_sent_before_established_and_later_frames(sink: Sink) -> None:
    def on_gap(sender: Any, **told: Any) -> None:
        sink._add("signal gap", (sender, told))

    def on_established(sender: Any, **told: Any) -> None:
        sink._add("signal established", (sender, told))

    signals.listener_gap.connect(on_gap)
    signals.listener_established.connect(on_established)
    try:
        listener = Listener("default", ["jobs"], sink)
        async with client() as other, running(listener):
            await sink.until("signal established")
            await aterminate(other, listener.backend_pid)
            await sink.until("signal established", 2)
            await anotify(other, "jobs", "later")
            await sink.until("heard")
    finally:
        signals.listener_gap.disconnect(on_gap)
        signals.listener_established.disconnect(on_established)
    own = [kind for kind in sink.kinds if kind.startswith("signal") or kind == "heard"]
    assert own == ["signal established", "signal gap", "signal established", "heard"]
    [(sender, told)] = sink.of("signal gap")
    assert sender is listener
    assert told["since"] <= told["until"]
    assert told["cause"]
    assert sink.of("signal established")[0][1]["using"] == "default"


async def test_a_signal_receiver_that_raises_does_not_stop_the_listener(sink: Sink) -> None:
    def broken(**kwargs: Any) -> None:
        raise RuntimeError("as asked")

    signals.listener_established.connect(broken)
    try:
        async with client() as other, running(Listener("default", ["jobs"], sink)):
            await sink.until("established")
            await anotify(other, "jobs", "one")
            await sink.until("heard")
    finally:
        signals.listener_established.disconnect(broken)
    assert "lost" not in sink.kinds


# -- channels that come and go ----------------------------------------------------------------


async def test_channels_are_added_and_removed_on_the_same_connection_without_a_gap(
    sink: Sink,
) -> None:
    listener = Listener("default", ["a"], sink)
    async with client() as other, running(listener):
        await sink.until("established")
        pid = listener.backend_pid
        listener.want(["a", "b"])
        assert await sink.until("established", 2) == {"a", "b"}
        await anotify(other, "b", "to b")
        await sink.until("heard")
        listener.want(["b", "c"])
        assert {"b", "c"} <= await sink.until("established", 3)
        await anotify(other, "c", "to c")
        await sink.until("heard", 2)
        assert listener.backend_pid == pid
    assert sink.of("heard") == ["to b", "to c"]
    assert "gap" not in sink.kinds


async def test_a_removed_channel_is_unlistened_on_the_server(sink: Sink) -> None:
    listener = Listener("default", ["a", "b"], sink)
    async with running(listener):
        await sink.until("established")
        listener.want(["b"])
        assert await sink.until("established", 2) == {"b"}
        rows = await listener._open().execute(
            b"SELECT channel FROM pg_listening_channels() AS channel", timeout=5
        )
        assert b"b" in {row[0] for row in rows}
        assert b"a" not in {row[0] for row in rows}


async def test_channels_wanted_while_there_is_no_connection_are_heard_after_it_is_back(
    sink: Sink, proxy: TCPProxy, proxied: str
) -> None:
    listener = Listener(proxied, ["a"], sink)
    async with client() as other, running(listener):
        await sink.until("established")
        await asyncio.to_thread(proxy.close)
        await sink.until("lost")
        listener.want(["b"])
        await asyncio.to_thread(proxy.open)
        assert await sink.until("established", 2) == {"b"}
        await anotify(other, "b", "to b")
        await sink.until("heard")


async def test_ten_thousand_notifications_of_one_transaction_arrive_in_order(sink: Sink) -> None:
    payloads = [f"{number:05d} " + "x" * 100 for number in range(10_000)]
    async with client() as other, running(Listener("default", ["jobs"], sink)):
        await sink.until("established")
        await anotify(other, "jobs", *payloads)
        await sink.until("heard", 10_000)
    assert sink.of("heard") == payloads


# -- the end ----------------------------------------------------------------------------------


async def test_a_sink_that_raises_ends_the_listener_instead_of_losing_frames_in_silence() -> None:
    class Broken(Sink):
        def notified(self, notifications: Sequence[Notification]) -> None:
            raise LookupError("a mistake")

    sink = Broken()
    task = asyncio.create_task(Listener("default", ["jobs"], sink).run())
    async with client() as other:
        await sink.until("established")
        await anotify(other, "jobs", "heard by nobody")
        async with asyncio.timeout(DEADLINE):
            with pytest.raises(LookupError, match="a mistake"):
                await task


async def test_stop_closes_the_connection(sink: Sink) -> None:
    listener = Listener("default", ["jobs"], sink)
    async with client() as other:
        async with running(listener):
            await sink.until("established")
            pid = listener.backend_pid
        assert listener.backend_pid is None
        async with asyncio.timeout(DEADLINE):
            while await (
                await other.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid])
            ).fetchone():
                pass
    assert sink.kinds == ["established"]


async def test_stop_requested_before_run_is_not_lost(sink: Sink) -> None:
    listener = Listener("default", ["jobs"], sink)
    listener.stop()
    async with asyncio.timeout(DEADLINE):
        await listener.run()


async def test_stop_while_waiting_for_the_next_attempt_does_not_wait_for_it(
    sink: Sink, proxy: TCPProxy, proxied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("django_pgnotify.backoff.Backoff.next", lambda self: 3600.0)
    await asyncio.to_thread(proxy.close)
    listener = Listener(proxied, ["jobs"], sink)
    async with running(listener):
        await sink.until("lost")


async def test_stop_while_connecting_to_silence_does_not_wait_for_the_timeout(
    sink: Sink, proxy: TCPProxy, proxied: str, settings: Settings
) -> None:
    settings.PGNOTIFY_CONNECT_TIMEOUT = 60.0
    await blackhole(proxy)
    listener = Listener(proxied, ["jobs"], sink)
    task = asyncio.create_task(listener.run())
    try:
        await asyncio.to_thread(proxy.wait_for_accepted, 1)
        listener.stop()
        done, _ = await asyncio.wait([task], timeout=30)
        assert done, "stop() waits for a connection attempt that will never succeed"
    finally:
        await asyncio.to_thread(proxy.resume)
        await asyncio.wait([task])


# -- parameters -------------------------------------------------------------------------------


async def test_the_connection_takes_the_options_of_its_alias(sink: Sink) -> None:
    options = {**connections["default"].settings_dict["OPTIONS"], "application_name": "mine"}
    with alias_at("named", OPTIONS=options) as alias:
        async with client() as other, running(Listener(alias, ["jobs"], sink)):
            await sink.until("established")
            row = await (
                await other.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'mine'"
                )
            ).fetchone()
    assert row == (1,)


async def test_a_wrong_database_is_reported_and_tried_again(sink: Sink) -> None:
    with alias_at("wrong", NAME="no_such_database") as alias:
        async with running(Listener(alias, ["jobs"], sink)):
            cause, _ = await sink.until("lost", 2)
    assert "no_such_database" in cause


async def test_parameters_are_read_anew_at_each_attempt(sink: Sink) -> None:
    with alias_at("moving", NAME="no_such_database") as alias:
        async with running(Listener(alias, ["jobs"], sink)):
            await sink.until("lost")
            name = connections["default"].settings_dict["NAME"]
            connections.settings[alias]["NAME"] = name
            await sink.until("established")


async def test_listening_is_never_done_inside_a_transaction(sink: Sink) -> None:
    listener = Listener("default", ["jobs"], sink)
    async with client() as other, running(listener):
        await sink.until("established")
        cursor = await other.execute(
            "SELECT state, xact_start FROM pg_stat_activity WHERE pid = %s", [listener.backend_pid]
        )
        assert await cursor.fetchone() == ("idle", None)
