"""``pgnotify_status``: every live listener says how it is, and a probe can act on the answer."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connections, transaction
from pytest_django import Settings

from django_pgnotify import Event, publish, receiver, subscribe
from django_pgnotify.listening import roll_call
from django_pgnotify.listening.background import stop_all
from django_pgnotify.registry import Registry, registry
from django_pgnotify.testing import running_listener
from django_pgnotify.wire import PAYLOAD_LIMIT, byte_length
from tests.integration.recording import (
    DEADLINE,
    Gate,
    Recorder,
    alias_at,
    anotify,
    backends_of_listeners,
    client,
    dsn,
    notify,
    query,
    stats,
    terminate,
)

pytestmark = pytest.mark.django_db(transaction=True)

#: Seconds that listeners get to answer; they are all in this process and idle.
PATIENCE = "0.4"


@pytest.fixture(autouse=True)
def _registry() -> Iterator[Registry]:
    with registry.isolated() as isolated:
        yield isolated
    stop_all()


class Answer(NamedTuple):
    """Exit code and output of the command."""

    code: int
    text: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text)
        return found

    @property
    def listeners(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.json["listeners"]
        return found

    def only(self) -> dict[str, Any]:
        [listener] = self.listeners
        return listener


def status(*args: str) -> Answer:
    out = io.StringIO()
    with pytest.raises(SystemExit) as ended:
        call_command("pgnotify_status", "--timeout", PATIENCE, *args, stdout=out, no_color=True)
    assert isinstance(ended.value.code, int)
    return Answer(ended.value.code, out.getvalue())


def hear(*sources: Any, every_node: bool = False, func: Any = None) -> None:
    """Register a receiver."""
    receiver(
        list(sources), every_node=every_node, dispatch_uid=f"{sources} {every_node} {id(func)}"
    )(func or Recorder())


# -- who is there -----------------------------------------------------------------------------


def test_leader_standby_every_node_and_in_process_are_each_shown_with_their_role() -> None:
    hear("jobs")
    hear("news", every_node=True)
    with ExitStack() as stack:
        leader = stack.enter_context(running_listener())
        standby = stack.enter_context(running_listener())
        every = stack.enter_context(running_listener(["news"]))
        stack.enter_context(subscribe("visits"))
        answer = status("--json")
        backends = {each.backend_pid: each for each in (leader, standby, every)}
    assert answer.code == 0
    assert answer.json["problem"] is None
    roles = {listener["backend"]: listener["role"] for listener in answer.listeners}
    assert len(roles) == 4
    assert [roles.pop(pid) for pid in backends] == ["leader", "standby", "every node"]
    assert list(roles.values()) == ["in process"]
    topics = {listener["role"]: set(listener["topics"]) for listener in answer.listeners}
    assert topics == {
        "leader": {"jobs", "news"},
        "standby": {"jobs", "news"},
        "every node": {"news"},
        "in process": {"visits"},
    }


def test_the_backends_named_are_those_of_the_listening_connections(settings: Settings) -> None:
    settings.PGNOTIFY_NODE = "web1"
    hear("jobs")
    with running_listener(), running_listener(), subscribe("a"):
        answer = status("--json")
        assert sorted(each["backend"] for each in answer.listeners) == backends_of_listeners()
    assert {each["node"] for each in answer.listeners} == {"web1"}
    assert {each["database"] for each in answer.listeners} == {"default"}
    assert all(each["established"] is True for each in answer.listeners)


def test_a_listener_that_has_gone_is_not_there_any_more() -> None:
    hear("jobs")
    with running_listener():
        with running_listener():
            assert len(status("--json").listeners) == 2
        assert len(status("--json").listeners) == 1


def test_listeners_of_another_prefix_are_another_deployments(settings: Settings) -> None:
    hear("jobs")
    with running_listener():
        settings.PGNOTIFY_CHANNEL_PREFIX = "green."
        assert status("--json").listeners == []
        with running_listener():
            assert len(status("--json").listeners) == 1


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_the_listeners_of_the_database_asked_for_are_shown() -> None:
    hear("jobs")
    with running_listener(), running_listener(using="other"), running_listener(using="other"):
        assert len(status("--json").listeners) == 1
        on_other = status("--json", "--database", "other").listeners
    assert [each["database"] for each in on_other] == ["other", "other"]


# -- what they say ----------------------------------------------------------------------------


def test_handled_failed_dropped_and_foreign_events_are_counted(settings: Settings) -> None:
    settings.PGNOTIFY_QUEUE_MAX_EVENTS = 2
    with Gate() as gate:

        def run(event: Event) -> None:
            if event.data == "fail":
                raise RuntimeError("as asked")
            if event.data == "wait":
                gate.pass_through()

        hear("jobs", func=run)
        with running_listener() as listener:
            for count, value in enumerate(("one", "two", "fail"), 1):
                publish("jobs", value)
                listener.wait_for(count)
            notify("jobs", "three")
            listener.wait_for(4)
            publish("jobs", "wait")
            gate.wait_for(1)
            with transaction.atomic():
                for number in range(5):
                    publish("jobs", number)
            # While its receiver hangs, it answers all the same.
            answer = status("--json").only()
            table = status().text
            gate.open()
            listener.settle()
    assert answer["waiting"] == 2
    assert answer["running"] == 1
    counts = answer["counts"]
    assert counts["handled"] == 3
    assert counts["failed"] == 1
    assert counts["dropped"] == 3
    assert counts["foreign"] == 1
    row = dict(zip(_cells(table, 0), _cells(table, 1), strict=True))
    assert (row["WAITING"], row["HANDLED"], row["FAILED"], row["DROPPED"]) == ("2", "3", "1", "3")


def test_the_last_gap_is_told_with_its_times_and_its_cause() -> None:
    hear("jobs")
    with running_listener() as listener:
        assert status("--json").only()["last_gap"] is None
        terminate(listener.backend_pid)
        listener.wait_until_ready(2)
        answer = status("--json").only()
        table = status().text
    gap = answer["last_gap"]
    assert datetime.fromisoformat(gap["since"]) <= datetime.fromisoformat(gap["until"])
    assert gap["cause"]
    assert f"{gap['until'][11:19]} ({gap['cause'][:39].rstrip()}" in table


def test_a_long_cause_of_a_gap_is_cut_in_the_table_and_whole_in_json() -> None:
    hear("jobs")
    cause = "connection-was-lost:" * 5
    with running_listener() as listener:
        assert listener.service is not None
        listener.service.listener.health.note_gap(None, datetime.now(UTC), cause)
        answer = status("--json").only()
        table = status().text
    assert answer["last_gap"]["cause"] == cause
    assert f"{answer['last_gap']['until'][11:19]} ({cause[:39]}…)" in table


def test_times_and_round_trip_are_those_of_this_connection(settings: Settings) -> None:
    settings.PGNOTIFY_HEARTBEAT_INTERVAL = 0.02
    hear("jobs")
    with running_listener() as listener:
        first = status("--json").only()
        second = status("--json").only()
        terminate(listener.backend_pid)
        listener.wait_until_ready(2)
        third = status("--json").only()
    assert 0 < first["round_trip"] < DEADLINE
    assert first["established_since"] == second["established_since"] < third["established_since"]
    assert first["last_echo"] < second["last_echo"] < third["last_echo"]
    assert first["last_echo"] <= first["at"]


def test_an_in_process_listener_tells_its_connection_its_echo_and_its_gap_too() -> None:
    with subscribe("visits") as events:
        terminate(status("--json").only()["backend"])
        gap = events.get(DEADLINE)
        assert gap is not None
        assert gap.action == "gap"
        answer = status("--json").only()
    assert answer["role"] == "in process"
    assert answer["established_since"]
    assert answer["last_echo"]
    assert 0 < answer["round_trip"] < DEADLINE
    assert answer["last_gap"]["cause"] == gap.data["cause"]


def test_the_json_has_the_documented_shape() -> None:
    hear("jobs")
    with running_listener():
        answer = status("--json")
    assert set(answer.json) == {
        *("problem", "listeners", "consumers", "caches", "queue_usage", "suspects"),
    }
    assert {
        *("node", "pid", "backend", "database", "role", "established", "established_since"),
        *("last_echo", "round_trip", "topics", "waiting", "running", "counts", "last_gap", "at"),
    } <= set(answer.only())
    assert isinstance(answer.json["queue_usage"], float)
    assert answer.json["suspects"] == []


def test_the_table_has_a_row_for_each_listener_under_aligned_headings() -> None:
    hear("jobs", "news")
    with running_listener() as listener, running_listener():
        # That of the epoch table is there if an earlier test has used one.
        lines = [line for line in status().text.splitlines() if not line.startswith("epoch table")]
        backend = str(listener.backend_pid)
    assert len(lines) == 4
    assert lines[0].startswith("NODE  ") or lines[0].split()[0] == "NODE"
    for heading in ("PID", "BACKEND", "ROLE", "SINCE", "RTT", "LAST GAP", "TOPICS"):
        assert heading in lines[0]
    column = lines[0].index("ROLE")
    assert sorted(line[column:].split()[0] for line in lines[1:3]) == ["leader", "standby"]
    leader = next(line for line in lines[1:3] if "leader" in line)
    assert leader[lines[0].index("BACKEND") :].split()[0] == backend
    assert leader.endswith("jobs, news")
    assert lines[3].startswith("notification queue: 0.")


def _cells(table: str, line: int) -> list[str]:
    """The cells of a line, by where the headings stand."""
    heading, *_ = lines = table.splitlines()
    starts = [match.start() for match in re.finditer(r"(?:(?<=  )|^)\S", heading)]
    ends = [*starts[1:], None]
    return [lines[line][start:end].strip() for start, end in zip(starts, ends, strict=True)]


# -- a great many topics, and hostile calls ---------------------------------------------------


@pytest.mark.parametrize("name", ["topic.{:04d}", "Größe „{:04d}“ 😀"], ids=["ASCII", "wide"])
def test_thousands_of_topics_still_answer_in_one_notify_and_cost_no_connection(name: str) -> None:
    hear(*[name.format(number) for number in range(3000)])
    with running_listener() as listener:
        backend = listener.backend_pid
        answer = status("--json").only()
        publish(name.format(2999), 1)
        listener.wait_for(1)
        assert listener.backend_pid == backend
        assert stats(listener)["gaps"] == 0
    assert 0 < len(answer["topics"]) < 3000
    assert answer["role"] == "leader"
    assert byte_length(json.dumps(answer)) <= PAYLOAD_LIMIT


@pytest.mark.parametrize(
    "call",
    [
        "",
        "jobs",
        "pgnotify.reply." + "x" * 100,
        "pgnotify.reply." + "ü" * 40,
        '{"pgnotify":1,"events":[]}',
        "pgnotify.status",
    ],
    ids=["empty", "topic", "too long", "too long in bytes", "frame", "status"],
)
def test_a_call_that_is_none_is_answered_nowhere_and_costs_no_connection(call: str) -> None:
    heard = Recorder()
    receiver("jobs", on_gap=True)(heard)
    with running_listener() as listener:
        backend = listener.backend_pid
        notify("pgnotify.status", call)
        publish("jobs", "after")
        heard.wait_for(1)
        listener.settle()
        assert listener.backend_pid == backend
    assert heard.data == ["after"]


async def test_a_foreign_answer_does_not_break_the_roll_call() -> None:
    """Whoever hears the call may answer anything."""
    hear("jobs")
    async with client() as other:
        await other.execute('LISTEN "pgnotify.status"')

        async def answer_wrongly() -> None:
            calls = [heard.payload async for heard in other.notifies(stop_after=1)]
            await anotify(other, calls[0], *_WRONG)

        async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as group:
            group.create_task(answer_wrongly())
            with running_listener():
                roll = await roll_call.call_the_roll("default", 1.0)
    assert [listener["role"] for listener in roll.listeners] == ["leader"]


_WRONG = ("no JSON", "[]", '"text"', "{}", "null", '{"node":"n","pid":1}', "[" * 5000)


# -- the queue --------------------------------------------------------------------------------


@contextmanager
def in_a_transaction(url: str, application: str) -> Iterator[psycopg.Connection[Any]]:
    """A session that listens, and sits in a transaction."""
    with closing(psycopg.connect(url, application_name=application)) as session:
        session.execute("LISTEN pinned")
        session.commit()
        session.execute("SELECT 1")
        yield session


def wait_until_old(*pids: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while query(
        "SELECT 1 FROM pg_stat_activity WHERE pid = ANY(%s)"
        " AND xact_start > clock_timestamp() - interval '5 s'",
        list(pids),
    ):
        assert time.monotonic() < deadline


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_whoever_sits_in_a_transaction_is_named_with_what_he_does_to_the_queue() -> None:
    """Of whatever database: the queue is the cluster's."""
    hear("jobs")
    with (
        running_listener() as listener,
        in_a_transaction(dsn(), "sitter") as sitter,
        in_a_transaction(dsn("other"), "sitter next door") as next_door,
        closing(psycopg.connect(dsn(), application_name="well-behaved")) as well,
    ):
        well.execute("LISTEN pinned")
        well.commit()
        assert status("--json").json["suspects"] == []  # not yet, for all that is known
        for _ in range(20):
            notify("jobs", *("x" * 7000 + str(number) for number in range(50)))
        listener.wait_for(1000)
        wait_until_old(sitter.info.backend_pid, next_door.info.backend_pid)
        [(usage,)] = query("SELECT pg_notification_queue_usage()")
        answer, table = status("--json"), status().text
        assert answer.code == 0
        assert answer.json["queue_usage"] == pytest.approx(usage, rel=0.2)
        assert usage > 0
        suspects = {suspect["application"]: suspect for suspect in answer.json["suspects"]}
        assert "well-behaved" not in suspects
        assert suspects["sitter"]["pid"] == sitter.info.backend_pid
        assert suspects["sitter"]["state"] == "idle in transaction"
        assert suspects["sitter"]["seconds"] >= 5
        assert suspects["sitter"]["user"]
        assert f"backend {sitter.info.backend_pid} (sitter, " in table
        assert "idle in transaction for" in table
        assert suspects["sitter next door"]["pid"] == next_door.info.backend_pid


def test_once_the_sitter_has_left_the_queue_empties_and_nobody_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roll_call, "_SUSPECTS", roll_call._SUSPECTS.replace(b"'5 s'", b"'0 s'"))
    hear("jobs")
    with running_listener() as listener:
        with in_a_transaction(dsn(), "sitter"):
            for _ in range(4):
                notify("jobs", *("x" * 7000 + str(number) for number in range(50)))
            listener.wait_for(200)
            answer = status("--json").json
            pinned = answer["queue_usage"]
            assert "sitter" in {suspect["application"] for suspect in answer["suspects"]}
        notify("jobs", *("y" * 7000 + str(number) for number in range(50)))
        listener.wait_for(250)
        answer = status("--json").json
    assert pinned > answer["queue_usage"]
    assert "sitter" not in {suspect["application"] for suspect in answer["suspects"]}


# -- exit codes -------------------------------------------------------------------------------


def test_0_when_one_leads_or_nobody_needs_to() -> None:
    hear("jobs")
    with running_listener():
        assert status().code == 0
    with registry.isolated():
        hear("news", every_node=True)
        with running_listener():
            assert status().code == 0


def test_1_when_no_pglisten_answers_though_a_web_process_listens() -> None:
    assert status().code == 1
    with subscribe("visits"):
        answer = status("--json")
    assert answer.code == 1
    assert answer.json["problem"] == "No pglisten answers."
    assert len(answer.listeners) == 1


@contextmanager
def lock_held_elsewhere(topics: list[str] | None = None) -> Iterator[None]:
    """The leader of these topics is a session that does not answer: frozen, say."""
    with running_listener(topics) as leader:
        [key] = query(
            "SELECT classid::bigint::bit(32)::int, objid::bigint::bit(32)::int FROM pg_locks"
            " WHERE locktype = 'advisory' AND granted AND pid = %s",
            leader.backend_pid,
        )
    with closing(psycopg.connect(dsn(), autocommit=True)) as frozen:
        frozen.execute("SELECT pg_advisory_lock(%s::int4, %s::int4)", key)
        yield


def test_1_when_there_are_standbys_only() -> None:
    hear("jobs")
    with lock_held_elsewhere(), running_listener(), running_listener():
        answer = status("--json")
        table = status()
    assert (answer.code, table.code) == (1, 1)
    assert "leader" in answer.json["problem"]
    assert table.text.splitlines()[-1] == answer.json["problem"]
    assert {each["role"] for each in answer.listeners} == {"standby"}


def test_1_when_nobody_leads_though_a_listener_of_every_node_answers() -> None:
    hear("jobs")
    hear("news", every_node=True)
    with lock_held_elsewhere(), running_listener(), running_listener(["news"]):
        answer = status("--json")
    assert sorted(each["role"] for each in answer.listeners) == ["every node", "standby"]
    assert answer.code == 1
    assert "leader" in answer.json["problem"]


def test_1_when_nobody_leads_though_there_is_a_leader_of_other_topics() -> None:
    hear("jobs")
    hear("mail")
    with lock_held_elsewhere(["jobs"]), running_listener(["jobs"]), running_listener(["mail"]):
        answer = status("--json")
    assert sorted(each["role"] for each in answer.listeners) == ["leader", "standby"]
    assert answer.code == 1
    assert "leader" in answer.json["problem"]


def test_2_when_the_database_cannot_be_reached() -> None:
    with (
        alias_at("unreachable", HOST="127.0.0.1", PORT="1") as alias,
        pytest.raises(CommandError, match=r"'unreachable'.*refused") as failed,
    ):
        call_command("pgnotify_status", "--database", alias)
    assert failed.value.returncode == 2


@pytest.mark.parametrize("alias", ["lite", "nowhere"])
def test_2_when_the_alias_cannot_be_listened_on(alias: str) -> None:
    with pytest.raises(CommandError, match=repr(alias)) as failed:
        call_command("pgnotify_status", "--database", alias)
    assert failed.value.returncode == 2


def test_2_when_the_connection_is_lost_while_answers_are_awaited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who was not heard is not "not there"."""
    from django_pgnotify.listening.connection import ListenConnection

    original = ListenConnection.execute
    asked: list[int] = []

    async def execute(self: ListenConnection, statement: bytes, *args: Any, **kwargs: Any) -> Any:
        rows = await original(self, statement, *args, **kwargs)
        if statement == roll_call._SUSPECTS and not asked:
            asked.append(self.backend_pid)
            with closing(psycopg.connect(dsn(), autocommit=True)) as other:
                other.execute("SELECT pg_terminate_backend(%s, 5000)", [self.backend_pid])
        return rows

    monkeypatch.setattr(ListenConnection, "execute", execute)
    with pytest.raises(CommandError) as failed:
        call_command("pgnotify_status", "--timeout", "5", stdout=io.StringIO())
    assert asked
    assert failed.value.returncode == 2


def test_the_command_leaves_no_connection_behind() -> None:
    status()
    assert backends_of_listeners() == []
    assert all(not alias.startswith("pgnotify") for alias in connections)
