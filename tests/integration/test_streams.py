"""``event_stream()``: server-sent events over the bus, live and from the event log."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connections
from django.http import HttpResponse, StreamingHttpResponse
from django.test import RequestFactory
from pytest_django import Settings

from django_pgnotify import Event, Topic, apublish, apublish_many
from django_pgnotify.exceptions import InvalidArgument, InvalidTemplate, InvalidTopic, PgNotifyError
from django_pgnotify.listening.background import background_listener, stop_all
from django_pgnotify.streams import Subscriber, event_stream
from django_pgnotify.streams.hub import stream_stats
from example_project.embedded import EmbeddedPostgres
from tests.integration.durable import LEDGER, write
from tests.integration.recording import (
    aterminate,
    backends_of_listeners,
    client,
    dsn,
)
from tests.integration.streaming import DEADLINE, is_id, respond, watching
from tests.proxy import TCPProxy
from tests.testapp.models import Order, Shipment

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
async def _stopped() -> AsyncIterator[None]:
    yield
    await asyncio.to_thread(stop_all)


async def create_order(**fields: Any) -> Order:
    order: Order = await Order.objects.acreate(**fields)
    return order


# -- what is sent -------------------------------------------------------------------------------


async def test_what_happens_after_the_answer_is_heard_in_order() -> None:
    async with watching(event_stream("jobs")) as browser:
        await apublish_many("jobs", range(300))
        assert await browser.data(300) == list(range(300))


async def test_a_change_of_a_model_is_sent_with_the_fields_of_its_event() -> None:
    async with watching(event_stream([Order, "jobs"])) as browser:
        order = await create_order()
        await apublish("jobs", "O'Brien\r\n\u2028 ü")
        first, second = await browser.blocks(2)
    assert first.event == "message"
    assert first.data["model"] == "testapp.order"
    assert first.data["action"] == "created"
    assert first.data["pk"] == order.pk
    assert second.data["data"] == "O'Brien\r\n\u2028 ü"


async def test_the_headers_keep_everybody_from_keeping_it_back() -> None:
    response = await respond(event_stream("jobs"))
    assert isinstance(response, StreamingHttpResponse)
    response.close()
    assert response.status_code == 200
    assert response["Content-Type"] == "text/event-stream"
    assert "no-store" in response["Cache-Control"]
    assert response["X-Accel-Buffering"] == "no"
    assert not response.has_header("Content-Length")


async def test_the_browser_is_told_when_to_come_back_and_as_whom() -> None:
    async with watching(event_stream("jobs", retry=1.5)) as browser:
        assert browser.retry == 1500
        assert is_id(browser.last_id)


async def test_data_replaces_what_is_sent_and_is_made_once_for_all_streams() -> None:
    made = []

    def data(event: Event) -> dict[str, Any]:
        made.append(event.data)
        return {"data": f"job {event.data}"}

    view = event_stream("jobs", data=data)
    async with watching(view) as one, watching(view) as two:
        await apublish("jobs", 1)
        assert await one.data(1) == await two.data(1) == ["job 1"]
    assert made == [1]


async def test_a_filter_keeps_events_from_one_subscriber_and_not_from_another() -> None:
    def mine(event: Event, subscriber: Subscriber) -> bool:
        return bool(event.data["for"] == subscriber.kwargs["who"])

    view = event_stream("mail", filter=mine)
    async with watching(view, who="ann") as ann, watching(view, who="bob") as bob:
        for number, who in enumerate(["ann", "bob", "ann"]):
            await apublish("mail", {"for": who, "n": number})
        assert [one["n"] for one in await ann.data(2)] == [0, 2]
        assert [one["n"] for one in await bob.data(1)] == [1]


async def test_only_the_chosen_actions_are_sent() -> None:
    async with watching(event_stream(Order, actions=["deleted"])) as browser:
        order = await create_order()
        await order.adelete()
        [block] = await browser.blocks(1)
    assert block.data["action"] == "deleted"


async def test_an_event_that_cannot_be_shown_leaves_a_gap_and_the_next_follows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def data(event: Event) -> Any:
        if event.data == "bad":
            raise ValueError("no")
        return {"data": {1, 2} if event.data == "set" else event.data}

    view = event_stream("jobs", data=data)
    with caplog.at_level(logging.ERROR):
        async with watching(view) as browser, watching(view) as other:
            await apublish_many("jobs", ["bad", "set", "good"])
            first, second, third = await browser.blocks(3)
            assert [block.event for block in await other.blocks(3)] == ["gap", "gap", "message"]
    assert [one.getMessage().count("cannot be shown") for one in caplog.records] == [1, 1]
    assert [first.event, second.event, third.event] == ["gap", "gap", "message"]
    assert first.data["topics"] == ["jobs"]
    assert "no" not in first.data["cause"].split(), "what the error said is not for the browser"


async def test_signs_of_life_are_sent_while_nothing_happens() -> None:
    async with watching(event_stream("jobs", heartbeat=0.05)) as browser:
        for _ in range(3):
            assert await browser.chunk()
        assert browser.comments == 3
        await apublish("jobs", 1)
        assert await browser.data(1) == [1]


async def test_a_stream_ends_at_its_age_even_while_events_come() -> None:
    async with watching(event_stream("jobs", max_age=0.2)) as browser:
        stop = asyncio.Event()

        async def keep_busy() -> None:
            while not stop.is_set():
                await apublish("jobs", 1)

        busy = asyncio.create_task(keep_busy())
        await browser.rest()
        stop.set()
        await busy


# -- one subscription ---------------------------------------------------------------------------


async def test_all_streams_share_one_connection_and_the_last_one_ends_the_subscription() -> None:
    view, other = event_stream("jobs"), event_stream(["jobs", "news"])
    async with watching(view) as one, watching(view) as two, watching(other) as three:
        assert len(await sync_to_async(backends_of_listeners)()) == 1
        await apublish("jobs", 1)
        for browser in (one, two, three):
            assert await browser.data(1) == [1]
        assert len(background_listener("default")._subscriptions) == 2
    assert background_listener("default")._subscriptions == {}


async def test_a_response_that_nobody_reads_leaves_nothing_behind() -> None:
    view = event_stream("jobs")
    response = await respond(view)
    assert len(background_listener("default")._subscriptions) == 1
    del response  # as a middleware does that puts an error page in its place
    for _ in range(5):
        await asyncio.sleep(0)
    assert background_listener("default")._subscriptions == {}


async def test_a_browser_that_goes_while_the_answer_is_made_leaves_nothing_behind() -> None:
    view = event_stream("jobs")
    task = asyncio.create_task(respond(view))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(5):
        await asyncio.sleep(0)
    assert background_listener("default")._subscriptions == {}


async def test_streams_that_come_and_go_hear_their_own() -> None:
    view = event_stream("jobs")

    async def visit(number: int) -> None:
        for turn in range(5):
            async with watching(view) as browser:
                await apublish("jobs", [number, turn])
                while await browser.data(1) != [[number, turn]]:
                    pass

    await asyncio.gather(*(visit(number) for number in range(8)))


async def test_a_database_that_is_away_is_an_answer_and_no_error(settings: Settings) -> None:
    settings.PGNOTIFY_CONNECT_TIMEOUT = 0.2
    from tests.integration.recording import alias_at

    with alias_at("away", HOST="127.0.0.1", PORT="1") as alias:
        response = await respond(event_stream("jobs", using=alias))
        await asyncio.to_thread(stop_all)
    assert response.status_code == 503
    assert response["Retry-After"]


async def test_a_filter_that_fails_leaves_a_gap_for_whom_it_failed() -> None:
    def filter_(event: Event, subscriber: Subscriber) -> bool:
        return bool(event.data / subscriber.kwargs["by"])

    view = event_stream("jobs", filter=filter_)
    async with watching(view, by=0) as one, watching(view, by=1) as two:
        await apublish("jobs", 7)
        assert (await one.blocks(1))[0].event == "gap"
        assert await two.data(1) == [7]


# -- gaps ---------------------------------------------------------------------------------------


async def test_a_lost_listening_connection_is_a_gap_and_the_stream_goes_on() -> None:
    async with watching(event_stream("jobs")) as browser, client() as other:
        await aterminate(other, background_listener("default").backend_pid)
        [gap] = await browser.blocks(1)
        assert gap.event == "gap"
        assert gap.data["topics"] == ["jobs"]
        assert gap.data["cause"]
        await apublish("jobs", 1)
        assert await browser.data(1) == [1]


async def test_a_live_stream_that_is_opened_again_begins_with_a_gap() -> None:
    view = event_stream("jobs")
    async with watching(view) as browser:
        await apublish("jobs", 1)
        assert await browser.data(1) == [1]
    async with watching(view, last_id=browser.last_id) as again:
        await apublish("jobs", 2)
        gap, event = await again.blocks(2)
        assert gap.event == "gap"
        assert gap.data["topics"] == ["jobs"]
        assert gap.data["since"] is not None
        assert event.data["data"] == 2
        assert is_id(again.last_id)


async def test_a_slow_browser_gets_what_waits_then_a_gap_then_the_end() -> None:
    view = event_stream("jobs", max_waiting=10)
    dropped = stream_stats["dropped"]
    async with watching(view) as slow, watching(view) as other:
        for number in range(15):
            await apublish("jobs", number)
            assert await other.data(1) == [number]
        *waited, gap = await slow.rest()
    assert [block.data["data"] for block in waited] == list(range(10))
    assert gap.event == "gap"
    assert "keep up" in gap.data["cause"]
    assert stream_stats["dropped"] > dropped


# -- durable topics -----------------------------------------------------------------------------


async def test_a_durable_stream_that_comes_back_gets_what_it_missed_and_no_gap() -> None:
    view = event_stream(LEDGER)
    async with watching(view) as browser:
        await apublish_many(LEDGER, [1, 2])
        assert await browser.data(2) == [1, 2]
    await apublish_many(LEDGER, [3, 4])
    async with watching(view, last_id=browser.last_id) as again:
        assert await again.data(2) == [3, 4]
        await apublish(LEDGER, 5)
        assert await again.data(1) == [5]


async def test_a_durable_stream_resumes_from_before_its_first_event() -> None:
    view = event_stream(LEDGER)
    async with watching(view) as browser:
        pass
    await apublish(LEDGER, "missed")
    async with watching(view, last_id=browser.last_id) as again:
        assert await again.data(1) == ["missed"]


async def test_each_id_says_exactly_what_has_been_seen() -> None:
    view = event_stream(LEDGER)
    async with watching(view) as browser:
        await apublish_many(LEDGER, range(30))
        blocks = await browser.blocks(30)
    assert [block.data["data"] for block in blocks] == list(range(30))
    for place in (0, 7, 28, 29):
        async with watching(view, last_id=blocks[place].id) as again:
            await apublish(LEDGER, f"end {place}")
            seen: list[Any] = []
            while f"end {place}" not in seen:
                seen += await again.data(1)
        assert [one for one in seen if isinstance(one, int)] == list(range(place + 1, 30))


async def test_what_commits_late_is_not_lost_over_a_reconnect() -> None:
    view = event_stream(LEDGER)
    with psycopg.connect(dsn()) as late:
        write(late, '"late"')  # with a lower id, and not committed
        async with watching(view) as browser:
            await apublish(LEDGER, "early")
            assert await browser.data(1) == ["early"]
        late.commit()
        async with watching(view, last_id=browser.last_id) as again:
            assert await again.data(1) == ["late"]


async def test_what_commits_late_comes_to_a_stream_that_stays_and_says_nothing(
    settings: Settings,
) -> None:
    settings.PGNOTIFY_SWEEP_INTERVAL = 0.1
    async with watching(event_stream(LEDGER)) as browser:
        with psycopg.connect(dsn()) as other:
            write(other, '"quiet"')  # which sends no NOTIFY
        assert await browser.data(1) == ["quiet"]


async def test_a_lost_listening_connection_is_no_gap_where_the_log_has_everything() -> None:
    async with watching(event_stream(LEDGER)) as browser, client() as other:
        backend = background_listener("default").backend_pid
        await aterminate(other, backend)
        await apublish_many(LEDGER, range(5))
        assert await browser.data(5) == list(range(5))


async def test_signs_of_life_of_a_durable_stream_bring_its_id_up_to_date() -> None:
    """Or one that saw nothing for longer than the log keeps would have to be told of a gap."""
    view = event_stream(LEDGER, filter=lambda event, who: event.data != "hidden", heartbeat=0.05)
    async with watching(view) as browser:
        first = browser.last_id
        await apublish(LEDGER, "hidden")
        await apublish(LEDGER, "shown")
        assert await browser.data(1) == ["shown"]
        silent = browser.silent_ids
        while browser.silent_ids < silent + 2:
            assert await browser.chunk()
        assert browser.last_id != first
    async with watching(view, last_id=browser.last_id) as again:
        await apublish(LEDGER, "new")
        assert await again.data(1) == ["new"]


async def test_a_slow_browser_of_a_durable_stream_misses_nothing() -> None:
    view = event_stream(LEDGER, max_waiting=5)
    async with watching(view) as slow:
        for number in range(40):
            await apublish(LEDGER, number)
        await apublish_many(LEDGER, range(40, 60))
        assert await slow.data(60) == list(range(60))
        await apublish(LEDGER, 60)
        assert await slow.data(1) == [60]


async def test_many_pages_are_resumed_from() -> None:
    view = event_stream(LEDGER)
    async with watching(view) as browser:
        pass
    await apublish_many(LEDGER, range(1700))
    async with watching(view, last_id=browser.last_id) as again:
        assert await again.data(1700) == list(range(1700))


async def test_a_stream_that_catches_up_while_the_listener_ends_ends_too() -> None:
    view = event_stream(LEDGER)
    async with watching(view) as browser:
        pass
    await apublish_many(LEDGER, range(1200))
    async with watching(view, last_id=browser.last_id) as again:
        await again.blocks(1)
        await asyncio.to_thread(stop_all)
        rest = await again.rest()
        last_id = again.last_id
    async with watching(view, last_id=last_id) as third:
        missing = 1200 - 1 - len(rest)
        assert [*(block.data["data"] for block in rest), *await third.data(missing)] == list(
            range(1, 1200)
        )


async def test_writers_and_reconnects_at_once_lose_nothing_and_repeat_nothing() -> None:
    view = event_stream(LEDGER)
    total, writers = 30, 4

    async def writer(number: int) -> None:
        async with await psycopg.AsyncConnection.connect(dsn()) as connection:
            for turn in range(total):
                await connection.execute(
                    "INSERT INTO pgnotify_event_log (topic, source, body) VALUES"
                    " ('ledger', 'psql', json_build_object('data', %s::text)::text)",
                    [f"{number}.{turn}"],
                )
                if turn % 3 == number % 3:
                    await connection.commit()  # others have taken later ids meanwhile
                await asyncio.sleep(0)
            await connection.commit()

    async with watching(view) as first:
        last_id = first.last_id
    writing = asyncio.gather(*(writer(number) for number in range(writers)))
    seen: list[str] = []
    async with asyncio.timeout(4 * DEADLINE):
        while len(seen) < total * writers:
            async with watching(view, last_id=last_id) as browser:
                blocks = await browser.blocks(1)
                # Of what had come with it, the browser has seen some and not the rest.
                blocks += browser.at_hand(len(seen) % 4)
                seen += [block.data["data"] for block in blocks]
                last_id = blocks[-1].id
    await writing
    assert sorted(seen) == sorted(f"{n}.{t}" for n in range(writers) for t in range(total))


@pytest.mark.parametrize("last_id", ["nonsense", "7", "x" * 5000, "0~~:abc"])
async def test_an_id_that_is_not_ours_is_a_gap_and_the_stream_begins_now(last_id: str) -> None:
    await apublish(LEDGER, "before")
    async with watching(event_stream(LEDGER), last_id=last_id) as browser:
        [gap] = await browser.blocks(1)
        assert gap.event == "gap"
        assert gap.data["topics"] == ["ledger"]
        await apublish(LEDGER, "after")
        assert await browser.data(1) == ["after"]
        assert is_id(browser.last_id)


async def test_the_id_of_another_stream_or_another_key_is_none_of_ours(settings: Settings) -> None:
    async with watching(event_stream(Topic("other", delivery="durable"))) as other:
        pass
    view = event_stream(LEDGER)
    async with watching(view, last_id=other.last_id) as browser:
        assert (await browser.blocks(1))[0].event == "gap"
    settings.SECRET_KEY = "another"
    async with watching(view, last_id=browser.last_id) as again:
        assert (await again.blocks(1))[0].event == "gap"


async def test_an_id_older_than_the_log_keeps_events_is_a_gap(settings: Settings) -> None:
    view = event_stream(LEDGER)
    async with watching(view) as browser:
        pass
    settings.PGNOTIFY_LOG_RETENTION = 1e-6
    async with watching(view, last_id=browser.last_id) as again:
        [gap] = await again.blocks(1)
    assert gap.event == "gap"
    assert "keeps" in gap.data["cause"]


async def test_an_id_of_another_server_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    from django_pgnotify.durable.epoch import Epoch
    from django_pgnotify.streams import tail

    view = event_stream(LEDGER)
    async with watching(view) as browser:
        pass
    monkeypatch.setattr(tail, "current_epoch", lambda using: Epoch("1", "2", "3"))
    async with watching(view, last_id=browser.last_id) as again:
        [gap] = await again.blocks(1)
        assert gap.event == "gap"
        assert "server" in gap.data["cause"]


async def test_a_promoted_server_ends_the_streams_though_no_transaction_id_looks_wrong(
    start_server: Callable[..., EmbeddedPostgres],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings,
) -> None:
    """A copy that lacks the last transactions goes on, and gives their ids to others."""
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.2
    server = await asyncio.to_thread(start_server)
    copy = tmp_path / "copy"
    with TCPProxy(server.host, server.port) as proxy:
        # For threads that have yet to connect, as those of streams are.
        where = {"HOST": proxy.host, "PORT": str(proxy.port), "NAME": "postgres"}
        entry = {**connections["default"].settings_dict, **where, "USER": "postgres"}
        monkeypatch.setitem(connections.settings, "default", {**entry, "PASSWORD": ""})
        await asyncio.to_thread(migrate)
        await asyncio.to_thread(copy_of, server, copy)
        view = event_stream(LEDGER)
        async with watching(view) as browser:
            await log(server, range(3))
            assert await browser.data(3) == [0, 1, 2]
            await asyncio.to_thread(proxy.close)
            await asyncio.to_thread(promote, server, copy)
            await log(server, range(10, 20))
            await asyncio.to_thread(proxy.open)
            assert await browser.rest() == []
        async with watching(view, last_id=browser.last_id) as again:
            [gap] = await again.blocks(1)
            assert gap.event == "gap"
            assert "promoted" in gap.data["cause"]
            await log(server, ["after"])
            assert await again.data(1) == ["after"]
        await asyncio.to_thread(stop_all)


def migrate() -> None:
    call_command("migrate", "django_pgnotify", verbosity=0)
    connections.close_all()  # those of this thread


def copy_of(server: EmbeddedPostgres, folder: Path) -> None:
    server.stop()
    subprocess.run(["cp", "-a", server.data_dir, folder], check=True)
    server.start()


def promote(server: EmbeddedPostgres, copy: Path) -> None:
    """Have the copy take the place of the server, on a timeline of its own."""
    server.stop("immediate")
    shutil.rmtree(server.data_dir)
    subprocess.run(["cp", "-a", copy, server.data_dir], check=True)
    (server.data_dir / "recovery.signal").touch()
    server.options |= {"restore_command": "false", "hot_standby": "off"}
    server.start()


async def log(server: EmbeddedPostgres, data: Iterable[Any]) -> None:
    """Write events to the log of a server, in a transaction each, and wake who waits for them."""
    async with client(server.url()) as other:
        for one in data:
            await other.execute(
                "INSERT INTO pgnotify_event_log (topic, source, body) VALUES ('ledger', 'x', %s)",
                [json.dumps({"data": one})],
            )
        await other.execute("NOTIFY ledger, 'wake'")


async def test_a_listener_that_lost_its_server_has_the_log_make_sure_whose_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind a pooler, the connection that reads the log may outlive the server."""
    from django_pgnotify.durable.epoch import Epoch
    from django_pgnotify.streams import tail

    async with watching(event_stream(LEDGER)) as browser, client() as other:
        await apublish(LEDGER, 1)
        assert await browser.data(1) == [1]
        monkeypatch.setattr(tail, "current_epoch", lambda using: Epoch("1", "2", "3"))
        await aterminate(other, background_listener("default").backend_pid)
        assert await browser.rest() == []


async def test_a_stream_of_durable_and_live_topics_resumes_the_ones_and_tells_of_the_others() -> (
    None
):
    view = event_stream([LEDGER, "jobs"])
    async with watching(view) as browser:
        await apublish("jobs", 1)
        await apublish(LEDGER, 2)
        assert sorted(await browser.data(2)) == [1, 2]
    await apublish("jobs", 3)
    await apublish(LEDGER, 4)
    async with watching(view, last_id=browser.last_id) as again:
        gap, event = await again.blocks(2)
        assert gap.event == "gap"
        assert gap.data["topics"] == ["jobs"]
        assert event.data["data"] == 4


async def test_only_the_model_that_was_asked_for_comes_out_of_the_log(settings: Settings) -> None:
    view = event_stream(Shipment, durable=True)
    async with watching(view) as browser, client() as other:
        for model in ("testapp.order", "testapp.shipment"):
            await other.execute(
                "INSERT INTO pgnotify_event_log (topic, source, body)"
                " VALUES ('testapp.shipment', 'x', %s)",
                [json.dumps({"action": "updated", "model": model, "pk": 7})],
            )
        await other.execute("NOTIFY \"testapp.shipment\", 'wake'")
        [block] = await browser.blocks(1)
    assert block.data["model"] == "testapp.shipment"


async def test_an_event_of_the_log_that_is_broken_is_passed_over() -> None:
    async with watching(event_stream(LEDGER)) as browser, client() as other:
        await other.execute(
            "INSERT INTO pgnotify_event_log (topic, source, body) VALUES ('ledger', 'x', '{')"
        )
        await apublish(LEDGER, 1)
        assert await browser.data(1) == [1]


async def test_a_log_that_cannot_be_read_for_a_while_delays_and_loses_nothing() -> None:
    async with watching(event_stream(LEDGER)) as browser, client() as other:
        # Every session but ours: the listener's, the tail's, and those of other threads.
        await other.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE"
            " datname = current_database() AND pid <> pg_backend_pid()"
            " AND query LIKE '%pgnotify_event_log%'"
        )
        await other.execute(
            "INSERT INTO pgnotify_event_log (topic, source, body)"
            " VALUES ('ledger', 'x', '{\"data\": 1}')"
        )
        await other.execute("NOTIFY ledger, 'wake'")
        assert await browser.data(1) == [1]


# -- groups and permission ----------------------------------------------------------------------


def everybody(subscriber: Subscriber, group: str) -> bool:
    return True


async def test_a_browser_hears_the_groups_that_it_names() -> None:
    view = event_stream(Order, group="order.{pk}", permit=everybody)
    one, two = await create_order(), await create_order()
    async with watching(view, f"?group=order.{one.pk}") as browser:
        for order in (two, one):
            order.status = "paid"
            await order.asave()
        [block] = await browser.blocks(1)
        assert block.data["pk"] == one.pk


async def test_a_group_may_be_a_function_that_returns_several_or_none() -> None:
    def group(event: Event) -> list[str] | None:
        return None if event.data == "nobody" else ["all", f"n.{event.data}"]

    view = event_stream("jobs", group=group, permit=everybody)
    async with (
        watching(view, "?group=n.2") as two,
        watching(view, "?group=all&group=n.1") as everything,
    ):
        await apublish_many("jobs", ["nobody", 1, 2])
        assert await two.data(1) == [2]
        assert await everything.data(2) == [1, 2]


async def test_a_group_that_nobody_permits_is_refused() -> None:
    view = event_stream(Order, group="order.{pk}")
    refused = stream_stats["refused"]
    response = await respond(view, "?group=order.7")
    assert response.status_code == 403
    assert stream_stats["refused"] == refused + 1
    assert background_listener("default")._subscriptions == {}


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("", "Name the groups"),
        ("?group=", "letters"),
        ("?group=a%20b", "letters"),
        ("?group=" + "x" * 100, "letters"),
        ("?" + "&".join(f"group=g{n}" for n in range(4)), "At most 3"),
    ],
)
async def test_what_cannot_be_asked_for_is_answered_with_400(query: str, word: str) -> None:
    view = event_stream(Order, group="order.{pk}", permit=everybody, max_groups=3)
    response = await respond(view, query)
    assert isinstance(response, HttpResponse)
    assert response.status_code == 400
    assert word in response.content.decode()


async def test_one_refused_group_refuses_the_stream() -> None:
    view = event_stream(
        Order,
        group="order.{pk}",
        permit=lambda subscriber, group: group == "order.1",
    )
    assert (await respond(view, "?group=order.1&group=order.2")).status_code == 403


async def test_a_permission_sees_the_user_and_may_ask_the_database() -> None:
    def owns(subscriber: Subscriber, group: str) -> bool:
        return User.objects.filter(pk=subscriber.user.pk, username=group).exists()

    user = await User.objects.acreate_user("ann")
    view = event_stream("mail", group="{data}", permit=owns)
    async with watching(view, "?group=ann", user=user) as browser:
        await apublish("mail", "ann")
        assert await browser.data(1) == ["ann"]
    assert (await respond(view, "?group=bob", user=user)).status_code == 403
    assert (await respond(view, "?group=ann")).status_code == 403


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "HEAD", "PUT"])
async def test_only_get_is_answered(method: str) -> None:
    response = await respond(event_stream("jobs"), method=method)
    assert response.status_code == 405
    assert response["Allow"] == "GET"


def test_wsgi_is_refused_with_the_reason() -> None:
    request = RequestFactory().get("/events/")
    with pytest.raises(PgNotifyError, match=r"/events/ is a stream .* needs ASGI"):
        async_to_sync(event_stream("jobs"))(request)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"filter": lambda event: True}, "filter|called"),
        ({"filter": 7}, "filter="),
        ({"durable": "yes"}, "durable="),
        ({"heartbeat": 0}, "heartbeat="),
        ({"heartbeat": True}, "heartbeat="),
        ({"retry": -1}, "retry="),
        ({"max_age": "1"}, "max_age="),
        ({"max_waiting": 0}, "max_waiting="),
        ({"max_groups": 1.5}, "max_groups="),
        ({"permit": 7}, "permit="),
        ({"data": lambda: 1}, "called"),
        ({"actions": "created"}, "actions="),
    ],
)
def test_a_bad_argument_is_refused_where_it_is_written(options: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        event_stream("jobs", **options)


@pytest.mark.parametrize("source", [None, "", [], 7])
def test_a_source_that_is_none_is_refused(source: Any) -> None:
    with pytest.raises(InvalidTopic):
        event_stream(source)


def test_a_group_that_could_never_be_a_name_is_refused() -> None:
    with pytest.raises(InvalidTemplate):
        event_stream("jobs", group="job {pk}")


def test_an_async_filter_is_refused() -> None:
    async def ask(event: Event, subscriber: Subscriber) -> bool:
        return True

    with pytest.raises(InvalidArgument, match="plain function"):
        event_stream("jobs", filter=ask)  # type: ignore[arg-type]
