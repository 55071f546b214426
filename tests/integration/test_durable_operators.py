"""What an operator does: pause, reset, replay, prune, resync; by functions, commands, admin."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.contrib.messages import get_messages
from django.core.management import CommandError, call_command
from django.db import ProgrammingError, connection, transaction
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from django_pgnotify import Event, Topic, consumers, publish, publish_many, receiver
from django_pgnotify.durable import retention
from django_pgnotify.durable.lag import lag_of
from django_pgnotify.durable.retention import LogPruner
from django_pgnotify.durable.waking import wake_consumers
from django_pgnotify.exceptions import InvalidArgument, UnknownConsumer
from django_pgnotify.models import Consumer, LoggedEvent
from django_pgnotify.registry import Registry, registry
from django_pgnotify.testing import running_listener
from tests.integration.durable import (
    LEDGER,
    Picky,
    consume,
    letters,
    other_session,
    register,
    stored,
    until,
    write,
)
from tests.integration.recording import DEADLINE, Gate, Recorder, query

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _registry(settings: Any) -> Iterator[Registry]:
    settings.PGNOTIFY_LEADER_POLL_INTERVAL = 0.05
    with registry.isolated() as isolated:
        yield isolated


@pytest.fixture
def recorder() -> Recorder:
    heard = Recorder()
    consume(heard)
    return heard


def command(name: str, *args: str) -> str:
    out = StringIO()
    call_command(name, *args, stdout=out)
    return out.getvalue()


def status() -> str:
    out = StringIO()
    with pytest.raises(SystemExit):
        call_command("pgnotify_status", "--timeout", "0.2", stdout=out)
    return out.getvalue()


def age(hours: float, **filters: Any) -> None:
    """Make events that many hours older."""
    rows = LoggedEvent.objects.filter(**filters)
    rows.update(created_at=timezone.now() - timedelta(hours=hours))


# -- pause, resume, reset, delete -----------------------------------------------------------------


def test_a_paused_consumer_gets_nothing_until_it_is_resumed(recorder: Recorder) -> None:
    with running_listener():
        publish(LEDGER, 1)
        recorder.wait_for(1)
        other = Recorder()
        consume(other, "witness")
    with running_listener():
        assert "paused" in command("pgnotify_consumers", "--pause", "ledger")
        publish(LEDGER, 2)
        other.wait_for(1)
        assert recorder.data == [1]
        command("pgnotify_consumers", "--resume", "ledger")
        recorder.wait_for(2)
    assert recorder.data == [1, 2]


def test_a_pause_in_the_middle_keeps_the_place_and_repeats_nothing(recorder: Recorder) -> None:
    with Gate() as gate:
        registry.remove(recorder)

        def slow(event: Event) -> None:
            if event.data == 2:
                gate.pass_through()
            recorder(event)

        consume(slow)
        with running_listener():
            publish_many(LEDGER, range(6))
            gate.wait_for(1)
            consumers.pause("ledger")
            gate.open()
            until(lambda: stored().handled >= 3)
            consumers.resume("ledger")
            recorder.wait_for(6)
    assert recorder.data == [0, 1, 2, 3, 4, 5]


def test_a_reset_to_now_skips_and_one_to_the_beginning_repeats(recorder: Recorder) -> None:
    with running_listener():
        publish_many(LEDGER, [1, 2])
        recorder.wait_for(2)
        consumers.reset("ledger", "beginning")
        recorder.wait_for(4)
    assert recorder.data == [1, 2, 1, 2]
    publish(LEDGER, "skipped")
    consumers.reset("ledger", "now")
    with running_listener():
        publish(LEDGER, 3)
        recorder.wait_for(5)
    assert recorder.data[4:] == [3]


def test_a_reset_to_a_time_repeats_what_was_published_from_then_on(recorder: Recorder) -> None:
    register()
    publish_many(LEDGER, range(5))
    age(2, id__in=list(LoggedEvent.objects.order_by("id").values_list("id", flat=True)[:3]))
    with running_listener():
        recorder.wait_for(5)
        consumers.reset("ledger", timezone.now() - timedelta(hours=1))
        recorder.wait_for(7)
        publish(LEDGER, "new")
        recorder.wait_for(8)
    assert recorder.data == [0, 1, 2, 3, 4, 3, 4, "new"]
    consumers.reset("ledger", timezone.now() + timedelta(hours=1))
    publish(LEDGER, "later than the reset")
    with running_listener():
        recorder.wait_for(9)


def test_a_place_that_is_none_is_refused(recorder: Recorder) -> None:
    register()
    for place in ("yesterday", datetime(2025, 1, 1), None, 7):
        with pytest.raises(InvalidArgument, match="'now', 'beginning', 'continue'"):
            consumers.reset("ledger", place)  # type: ignore[arg-type]
    with pytest.raises(CommandError, match="go together"):
        command("pgnotify_consumers", "--reset", "ledger")
    with pytest.raises(
        CommandError, match=r"is not a time .*, nor one of now, beginning, continue"
    ):
        command("pgnotify_consumers", "--reset", "ledger", "--to", "yesterday")


def test_an_unknown_consumer_is_answered_with_those_that_there_are(recorder: Recorder) -> None:
    register()
    for act in (consumers.pause, consumers.resume, consumers.delete, consumers.replay):
        with pytest.raises(UnknownConsumer, match="there are 'ledger'"):
            act("leger")
    with pytest.raises(CommandError, match="'leger'"):
        command("pgnotify_consumers", "--pause", "leger")


def test_a_deleted_consumer_that_still_runs_begins_anew(recorder: Recorder) -> None:
    with running_listener():
        publish(LEDGER, 1)
        recorder.wait_for(1)
        before = stored().pk
        command("pgnotify_consumers", "--delete", "ledger")
        until(lambda: Consumer.objects.exclude(pk=before).exists())
        publish(LEDGER, 2)
        recorder.wait_for(2)
    assert recorder.data == [1, 2]


def test_who_deletes_a_consumer_that_the_code_still_has_is_told_that_it_comes_back(
    recorder: Recorder,
) -> None:
    consume(Recorder(), "history", start="beginning")
    register()
    comes_back = "deleted; the code still has it: pglisten makes it anew, from"
    assert command("pgnotify_consumers", "--delete", "ledger") == f"ledger: {comes_back} now\n"
    told = command("pgnotify_consumers", "--delete", "history")
    assert told == f"history: {comes_back} the beginning of the log\n"
    register()
    registry.remove(recorder)
    assert command("pgnotify_consumers", "--delete", "ledger") == "ledger: deleted\n"


# -- lag ----------------------------------------------------------------------------------------


def test_the_lag_counts_what_was_not_handled_and_how_old_it_is(recorder: Recorder) -> None:
    register()
    assert (lag_of(stored()).events, lag_of(stored()).seconds) == (0, 0.0)
    publish_many(LEDGER, range(25))
    publish_many(Topic("other", "durable"), range(5))
    age(1)
    lag = lag_of(stored())
    assert (lag.events, lag.more) == (25, False)
    assert 3600 <= lag.seconds < 3700
    assert lag_of(stored(), counted=10)[::2] == (10, True)
    with running_listener():
        recorder.wait_for(25)
        until(lambda: lag_of(stored()).events == 0)


def test_the_lag_in_the_middle_of_a_sweep_counts_the_rest_of_it(recorder: Recorder) -> None:
    register()
    publish_many(LEDGER, range(10))
    ids = list(LoggedEvent.objects.order_by("id").values_list("id", flat=True))
    [(now,)] = query("SELECT pg_current_snapshot()::text")
    Consumer.objects.update(target=now, position=ids[3])
    assert lag_of(stored()).events == 6
    publish(LEDGER, "after the sweep began")
    assert lag_of(stored()).events == 7


def test_consumers_are_listed_with_their_lag_by_the_command_and_by_the_status(
    recorder: Recorder,
) -> None:
    register()
    publish_many(LEDGER, [1, 2, 3])
    table = command("pgnotify_consumers")
    heading, line = (row.split("  ") for row in table.strip().splitlines())
    assert heading[0] == "CONSUMER"
    assert line[0] == "ledger"
    [described] = json.loads(command("pgnotify_consumers", "--json"))
    assert described["events_behind"] == 3
    assert (described["state"], described["topics"]) == ("not run", ["ledger"])
    out = StringIO()
    with pytest.raises(SystemExit):
        call_command("pgnotify_status", "--json", "--timeout", "0", stdout=out)
    assert [one["name"] for one in json.loads(out.getvalue())["consumers"]] == ["ledger"]
    out = StringIO()
    with pytest.raises(SystemExit):
        call_command("pgnotify_status", "--timeout", "0", stdout=out)
    assert "EVENTS BEHIND" in out.getvalue()


def test_a_consumer_whose_process_was_killed_is_not_shown_as_run(
    admin: Client, recorder: Recorder
) -> None:
    for number in range(3):
        consume(Recorder(), f"consumer {number}")
    with running_listener() as listener:
        assert listener.service is not None
        until(lambda: Consumer.objects.exclude(holder="").count() == 4)
        with CaptureQueriesContext(connection) as queries:
            states = {one.name: consumers.state_of(one) for one, _ in consumers.consumers()}
        assert set(states.values()) == {"runs"}
        assert sum("pg_locks" in one["sql"] for one in queries) == 1
        with CaptureQueriesContext(connection) as queries:
            assert page(admin, "consumer").count('<td class="field-state">runs</td>') == 4
        assert sum("pg_locks" in one["sql"] for one in queries) == 1
        assert consumers.state_of(stored()) == "runs"
    # What it leaves behind that has no time to say that it ends.
    Consumer.objects.update(holder="gone:1")

    def told() -> set[str]:
        return {one["state"] for one in json.loads(command("pgnotify_consumers", "--json"))}

    until(lambda: told() == {"not run"})  # the server may take a moment to let go of the locks
    assert '<td class="field-state">not run</td>' in page(admin, "consumer")
    assert consumers.state_of(stored()) == "not run"


def test_a_consumer_of_the_code_that_has_no_row_yet_is_listed_with_what_makes_it() -> None:
    assert command("pgnotify_consumers") == "There is no durable consumer.\n"
    receiver("live", dispatch_uid="live")(Recorder())
    consume(Recorder(), "made")
    register()
    consume(Recorder(), "billing.send")
    *_, made, unmade = command("pgnotify_consumers").splitlines()
    assert made.startswith("made ")
    assert unmade == "billing.send  not made yet: run 'manage.py migrate', or start pglisten"
    described, other = json.loads(command("pgnotify_consumers", "--json"))
    assert described.keys() == other.keys()
    assert (other["name"], other["state"], other["topics"]) == (
        "billing.send",
        "not made yet",
        ["ledger"],
    )
    consumers.delete("made")
    assert [line.split()[0] for line in command("pgnotify_consumers").splitlines()] == [
        "made",
        "billing.send",
    ]


# -- dead letters by command ----------------------------------------------------------------------


def test_dead_letters_are_listed_requeued_and_discarded_by_the_command() -> None:
    assert "no dead letter" in command("pgnotify_deadletters")
    picky = Picky([1, 2, 3])
    consume(picky)
    with running_listener():
        publish_many(LEDGER, [1, 2, 3], key="k")
        until(lambda: len(letters()) == 3)
        listed = command("pgnotify_deadletters", "--consumer", "ledger")
        assert listed.count("ValueError: cannot take") == 3
        first, second, _ = (str(letter.event_id) for letter in letters())
        shown = command("pgnotify_deadletters", "--traceback-of", first)
        assert "Traceback (most recent call last)" in shown
        with pytest.raises(CommandError, match="Say which"):
            command("pgnotify_deadletters", "--requeue")
        with pytest.raises(CommandError, match="No dead letter is of event"):
            command("pgnotify_deadletters", "--traceback-of", "987654")
        for act, done in (("--requeue", "requeued"), ("--discard", "discarded")):
            with pytest.raises(
                CommandError, match=f"No dead letter is of event 987654; nothing was {done}"
            ):
                command("pgnotify_deadletters", act, "--event", first, "--event", "987654")
        with pytest.raises(CommandError, match="No dead letter of 'ledger' is of event 987654"):
            command(
                *("pgnotify_deadletters", "--discard", "--consumer", "ledger", "--event", "987654")
            )
        assert len(letters()) == 3
        picky.bad.clear()
        assert command("pgnotify_deadletters", "--requeue", "--event", first).startswith("1 ")
        picky.wait_for(1)
        assert command("pgnotify_deadletters", "--discard", "--event", second).startswith("1 ")
        assert command("pgnotify_deadletters", "--requeue", "--all").startswith("1 ")
        picky.wait_for(2)
        until(lambda: letters() == [])
    assert picky.data == [1, 3]
    with pytest.raises(CommandError, match="no durable consumer 'leger'"):
        command("pgnotify_deadletters", "--consumer", "leger")


# -- replay -------------------------------------------------------------------------------------


def test_a_stretch_of_time_or_chosen_events_are_delivered_again_to_one_consumer(
    recorder: Recorder,
) -> None:
    bystander = Recorder()
    consume(bystander, "bystander")
    with running_listener():
        publish_many(LEDGER, range(6), key="k")
        publish(Topic("other", "durable"), "of another topic")
        recorder.wait_for(6)
        bystander.wait_for(6)
        ids = list(LoggedEvent.objects.order_by("id").values_list("id", flat=True))
        age(2, id__in=ids[1:3])
        hour = timedelta(hours=1)
        now = timezone.now()
        assert consumers.replay("ledger", since=now - 3 * hour, until=now - hour) == 2
        recorder.wait_for(8)
        printed = command(
            *("pgnotify_replay", "ledger", "--event", str(ids[5]), "--event", str(ids[-1]))
        )
        assert printed == "ledger will get 1 event(s) again\n"
        recorder.wait_for(9)
        until(lambda: letters() == [])
    assert recorder.data == [0, 1, 2, 3, 4, 5, 1, 2, 5]
    assert bystander.data == [0, 1, 2, 3, 4, 5]


def test_a_replay_is_due_at_once_though_the_clock_of_who_asks_for_it_is_fast(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    publish(LEDGER, 1)
    consumers.reset("ledger", "now")
    fast = timezone.now() + timedelta(days=1)
    with monkeypatch.context() as patched:
        patched.setattr(timezone, "now", lambda: fast)
        assert consumers.replay("ledger", since=datetime(2020, 1, 1, tzinfo=UTC)) == 1
    with running_listener():
        recorder.wait_for(1)


@pytest.mark.parametrize("transactional", [False, True])
def test_a_replay_of_an_event_that_is_being_replayed_is_not_lost(transactional: bool) -> None:
    heard = Recorder()

    def replay_once_more(event: Event) -> None:
        heard(event)
        if len(heard.events) == 2:
            consumers.replay("ledger", since=datetime(2020, 1, 1, tzinfo=UTC))

    consume(replay_once_more, transactional=transactional)
    with running_listener():
        publish(LEDGER, 1)
        heard.wait_for(1)
        until(lambda: stored().handled == 1)
        consumers.replay("ledger", since=datetime(2020, 1, 1, tzinfo=UTC))
        heard.wait_for(3)
        until(lambda: letters() == [])
    assert heard.data == [1, 1, 1]


def test_a_replay_needs_to_be_told_which_events(recorder: Recorder) -> None:
    register()
    with pytest.raises(InvalidArgument, match="Say which events"):
        consumers.replay("ledger")
    with pytest.raises(InvalidArgument, match="aware"):
        consumers.replay("ledger", since=datetime(2025, 1, 1))
    with pytest.raises(
        CommandError, match="Say which events: --since TIME, --until TIME or --event"
    ):
        command("pgnotify_replay", "ledger")


def test_a_replay_of_more_than_one_statement_holds_keeps_the_order_of_keys(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "_ROWS", 7)
    register()
    consumers.reset("ledger", "now")
    publish_many(LEDGER, range(40), key=lambda n: f"k{n % 2}")
    consumers.reset("ledger", "now")
    assert consumers.replay("ledger", since=datetime(2020, 1, 1, tzinfo=UTC)) == 40
    publish(LEDGER, "later", key="k0")
    with running_listener():
        recorder.wait_for(41)
        until(lambda: letters() == [])
    assert [event.data for event in recorder.events if event.key == "k0"] == [
        *range(0, 40, 2),
        "later",
    ]


# -- retention ----------------------------------------------------------------------------------


def test_what_everybody_has_passed_goes_after_the_retention_and_not_before(
    recorder: Recorder, settings: Any
) -> None:
    settings.PGNOTIFY_LOG_RETENTION = 3600.0
    with running_listener():
        publish_many(LEDGER, range(5))
        recorder.wait_for(5)
        until(lambda: lag_of(stored()).events == 0)
    assert command("pgnotify_prune") == "0 event(s) removed from the log\n"
    age(2, id__in=list(LoggedEvent.objects.order_by("id").values_list("id", flat=True)[:3]))
    assert command("pgnotify_prune") == "3 event(s) removed from the log\n"
    assert LoggedEvent.objects.count() == 2


def test_what_a_live_consumer_has_not_passed_is_kept_paused_or_not(
    recorder: Recorder, settings: Any
) -> None:
    settings.PGNOTIFY_LOG_LIMIT = None
    register()
    publish_many(LEDGER, range(5))
    publish_many(Topic("nobody's", "durable"), range(5))
    age(24 * 365)
    consumers.pause("ledger")
    assert command("pgnotify_prune") == "5 event(s) removed from the log\n"
    assert set(LoggedEvent.objects.values_list("topic", flat=True)) == {"ledger"}
    consumers.resume("ledger")
    with running_listener():
        recorder.wait_for(5)
        until(lambda: lag_of(stored()).events == 0)
    assert command("pgnotify_prune") == "5 event(s) removed from the log\n"


def test_the_part_of_a_sweep_that_is_done_may_go(recorder: Recorder) -> None:
    register()
    publish_many(LEDGER, range(10))
    ids = list(LoggedEvent.objects.order_by("id").values_list("id", flat=True))
    [(now,)] = query("SELECT pg_current_snapshot()::text")
    Consumer.objects.update(target=now, position=ids[3])
    age(24 * 8)
    assert command("pgnotify_prune", "--limit", "8640000") == "4 event(s) removed from the log\n"


def test_beyond_the_limit_events_go_and_the_consumer_is_told_of_the_gap() -> None:
    heard = Recorder()
    consume(heard, on_gap=True)
    register()
    publish_many(LEDGER, range(5))
    age(24 * 31, id__in=list(LoggedEvent.objects.order_by("id").values_list("id", flat=True)[:3]))
    assert command("pgnotify_prune") == "3 event(s) removed from the log\n"
    with running_listener():
        heard.wait_for(3)
    gap, *rest = heard.events
    assert gap.action == "gap"
    assert "PGNOTIFY_LOG_LIMIT" in gap.data["cause"]
    since = datetime.fromisoformat(gap.data["since"])
    assert timedelta(days=30) < timezone.now() - since < timedelta(days=32)
    assert [event.data for event in rest] == [3, 4]
    assert (stored().gap_events, stored().gap_cause) == (3, "")


def test_events_that_go_while_a_gap_is_told_are_told_of_too(settings: Any) -> None:
    settings.PGNOTIFY_SWEEP_INTERVAL = 0.05
    heard = Recorder()

    def lose_more(event: Event) -> None:
        if not heard.events:
            age(24 * 32)
            LogPruner("default").run()
        heard(event)

    consume(lose_more, on_gap=True)
    register()
    publish_many(LEDGER, range(2))
    age(24 * 40, id=LoggedEvent.objects.order_by("id").values_list("id", flat=True)[0])
    LogPruner("default").run()
    with running_listener():
        heard.wait_for(2)
        until(lambda: stored().gap_cause == "")
    assert [event.action for event in heard.events] == ["gap", "gap"]
    untils = [datetime.fromisoformat(event.data["until"]) for event in heard.events]
    assert timedelta(days=7) < untils[1] - untils[0] < timedelta(days=9)
    assert stored().gap_events == 2


def test_what_commits_while_events_are_removed_stays_until_it_is_counted_too() -> None:
    consume(Recorder())
    register()
    with other_session() as late, other_session() as holder:
        write(late, "1")
        late.execute("UPDATE pgnotify_event_log SET created_at = created_at - interval '31 days'")
        publish_many(LEDGER, range(2, 6))
        age(24 * 31)
        holder.execute("SELECT FROM pgnotify_consumer FOR UPDATE")
        with ThreadPoolExecutor(1) as threads:
            pruning = threads.submit(_prune)
            until(lambda: bool(query("SELECT FROM pg_locks WHERE NOT granted")))
            late.commit()
            holder.commit()
            assert pruning.result(DEADLINE) == stored().gap_events == 4
    assert _prune() == 1
    assert stored().gap_events == 5


def _prune() -> int:
    try:
        return LogPruner("default").run().removed
    finally:
        connection.close()


def test_a_run_looks_at_a_bounded_number_of_rows_and_the_next_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retention, "BATCH", 10)
    publish_many(LEDGER, range(100))
    age(24 * 8)
    pruner = LogPruner("default")
    assert pruner.run(rows=25) == (25, 25, True)
    assert pruner.run(rows=25) == (25, 25, True)
    assert command("pgnotify_prune", "--max-rows", "10") == "10 event(s) removed from the log\n"
    assert pruner.run() == (40, 40, False)
    assert LoggedEvent.objects.count() == 0


def test_a_slow_consumer_does_not_keep_the_events_of_other_topics(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH", 10)
    register()
    publish_many(LEDGER, range(30))
    publish_many(Topic("nobody's", "durable"), range(30))
    age(24 * 8)
    pruner = LogPruner("default")
    assert [pruner.run(rows=20).removed for _ in range(3)] == [0, 10, 20]


def test_pglisten_prunes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("django_pgnotify.dispatching.service.PRUNE_INTERVAL", 0.05)
    publish_many(LEDGER, range(10))
    age(24 * 8)
    consume(Recorder())
    with running_listener():
        until(lambda: not LoggedEvent.objects.exists())


def test_a_receiver_that_hears_only_live_what_is_in_the_log_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("django_pgnotify.dispatching.service.PRUNE_INTERVAL", 0.02)
    publish(LEDGER, 1)
    receiver("ledger", dispatch_uid="by mistake")(Recorder())
    receiver("ledger", dispatch_uid="on purpose", durable=False)(Recorder())
    receiver("jobs", dispatch_uid="of another topic")(Recorder())
    with running_listener():
        until(lambda: "hear it live only" in caplog.text)
    [message] = [r.getMessage() for r in caplog.records if "live only" in r.getMessage()]
    assert "'ledger'" in message
    assert "only: by mistake;" in message


# -- no tables yet --------------------------------------------------------------------------------


@contextmanager
def tables_missing() -> Iterator[None]:
    """As before the first ``migrate``."""
    tables = ("pgnotify_event_log", "pgnotify_consumer", "pgnotify_dead_letter")
    with connection.cursor() as cursor:
        for table in tables:
            cursor.execute(f"ALTER TABLE {table} RENAME TO hidden_{table}")
        try:
            yield
        finally:
            for table in tables:
                cursor.execute(f"ALTER TABLE hidden_{table} RENAME TO {table}")


TO_DO = "tables of durable topics are missing on database 'default'; run 'manage.py migrate'"


def test_without_tables_to_publish_and_the_commands_say_to_migrate() -> None:
    with tables_missing():
        with pytest.raises(ProgrammingError, match=f"not published: the {TO_DO}"):
            publish(LEDGER, 1)
        with pytest.raises(ProgrammingError, match=TO_DO):
            publish_many(LEDGER, [1, 2])
        for name in ("consumers", "deadletters", "prune"):
            with pytest.raises(CommandError, match=TO_DO):
                command(f"pgnotify_{name}")
        with pytest.raises(CommandError, match=TO_DO):
            command("pgnotify_replay", "ledger", "--event", "1")


def test_without_tables_the_check_fails_where_a_durable_consumer_would_wait_for_them() -> None:
    receiver("jobs")(Recorder())
    with tables_missing():
        assert "pglisten: ok" in command("pglisten", "--check")
        consume(Recorder())
        assert "pglisten: ok" in command("pglisten", "--check", "--topic", "jobs")
        with pytest.raises(CommandError, match=f"would not get ready: the {TO_DO}"):
            command("pglisten", "--check")
    assert "pglisten: ok" in command("pglisten", "--check")


def test_without_tables_a_listener_says_to_migrate_and_whom_it_waits_for(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadPoolExecutor(1) as threads:
        with tables_missing():
            registering = threads.submit(register)
            until(lambda: "is not ready until" in caplog.text)
            # At once it may not listen yet, and does not answer.
            until(lambda: "pglisten is not ready: process" in status())
        registering.result(DEADLINE)
    with running_listener():
        assert "not ready" not in status()
    messages = [record.getMessage() for record in caplog.records]
    assert messages.count(f"Durable consumers wait for the database: the {TO_DO}") == 1
    waits = "This listener is not ready until its durable consumers exist: ledger"
    assert messages.count(waits) == 1


def test_a_consumer_whose_tables_go_says_what_is_wrong_in_words(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    with running_listener() as listener:
        assert listener.service is not None
        durable = listener.service.durable
        until(lambda: durable.held == ["ledger"])
        with tables_missing():
            wake_consumers("default")
            until(lambda: "Consumer ledger waits" in caplog.text)
        publish(LEDGER, 1)
        recorder.wait_for(1)
    assert f"Consumer ledger waits: the database cannot be used: the {TO_DO}" in caplog.text


# -- restored and copied databases ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "cause"),
    [("1/{database}/{timeline}", "system identifier"), ("{system}/1/{timeline}", "was copied")],
)
def test_in_another_database_a_consumer_waits_until_somebody_decides(
    recorder: Recorder, epoch: str, cause: str
) -> None:
    register()
    system, database, timeline = stored().epoch.split("/")
    Consumer.objects.update(epoch=epoch.format(system=system, database=database, timeline=timeline))
    publish(LEDGER, 1)
    with running_listener():
        until(lambda: cause in stored().resync)
        assert cause in command("pgnotify_consumers")
        assert recorder.events == []
        command("pgnotify_consumers", "--reset", "ledger", "--to", "continue")
        recorder.wait_for(1)
        assert stored().resync == ""
    assert recorder.data == [1]
    with running_listener():
        publish(LEDGER, 2)
        recorder.wait_for(2)


def test_transaction_ids_that_went_back_are_noticed_whatever_the_epoch_says(
    recorder: Recorder,
) -> None:
    register()
    Consumer.objects.update(snapshot="900000000000:900000000000:")
    with running_listener():
        until(lambda: "went back" in stored().resync)
        command("pgnotify_consumers", "--reset", "ledger", "--to", "beginning")
        publish(LEDGER, 1)
        recorder.wait_for(1)


def test_a_promoted_server_is_told_as_a_gap_and_delivery_goes_on() -> None:
    heard = Recorder()
    consume(heard, on_gap=True)
    register()
    Consumer.objects.update(epoch=stored().epoch.rpartition("/")[0] + "/000000FF")
    publish(LEDGER, 1)
    with running_listener():
        heard.wait_for(2)
    assert [event.action for event in heard.events] == ["gap", "published"]
    assert "timeline" in heard.events[0].data["cause"]


def restored(*data: int) -> None:
    """Events with transaction ids that this server has yet to come to, as a dump brings them."""
    rows = query(
        "INSERT INTO pgnotify_event_log (topic, source, body, xid)"
        " SELECT 'ledger', 'psql', json_build_object('data', number)::text, '900000000000'"
        " FROM unnest(%s::int[]) AS number RETURNING id",
        list(data),
    )
    assert len(rows) == len(data)


def from_elsewhere() -> None:
    """Have all consumers wait, with a cursor that another server has given them."""
    Consumer.objects.update(snapshot="900900000000:900900000000:", resync="restored")


def test_events_restored_from_a_server_that_was_further_on_are_not_new_again_and_again(
    recorder: Recorder, settings: Any
) -> None:
    settings.PGNOTIFY_SWEEP_INTERVAL = 0.01
    with running_listener():
        restored(*range(5))
        for number in range(10, 20):
            publish(LEDGER, number)
            recorder.wait_for(number - 9)
    assert recorder.data == list(range(10, 20))


@pytest.mark.parametrize("count", [5, 1500])
def test_a_reset_skips_or_repeats_what_was_restored_from_a_server_that_was_further_on(
    recorder: Recorder, count: int
) -> None:
    register()
    restored(*range(count))
    age(2)
    restored(-1, -2)
    from_elsewhere()
    with running_listener():
        consumers.reset("ledger", "now")
        publish(LEDGER, "new")
        recorder.wait_for(1)
        assert recorder.data == ["new"]
        until(lambda: lag_of(stored()).events == 0)
        consumers.reset("ledger", timezone.now() - timedelta(hours=1))
        recorder.wait_for(4)
        assert recorder.data == ["new", -1, -2, "new"]
        consumers.reset("ledger", "beginning")
        recorder.wait_for(4 + count + 3)
    assert recorder.data[4:] == [*range(count), -1, -2, "new"]


def test_a_consumer_that_is_new_where_a_dump_was_restored_is_behind_it_or_gets_it_all() -> None:
    restored(*range(3))
    late, early = Recorder(), Recorder()
    consume(late, "late")
    consume(early, "early", start="beginning")
    with running_listener():
        publish(LEDGER, "new")
        early.wait_for(4)
        late.wait_for(1)
        until(lambda: lag_of(stored("late")).events == 0)
    assert early.data == [0, 1, 2, "new"]
    assert late.data == ["new"]


def test_what_is_published_in_the_transaction_of_a_reset_is_not_taken_for_restored(
    recorder: Recorder,
) -> None:
    register()
    with transaction.atomic():
        publish(LEDGER, 1)
        consumers.reset("ledger", "now")
    with running_listener():
        recorder.wait_for(1)


def test_nothing_counts_as_passed_while_a_consumer_waits_with_the_cursor_of_another_server(
    recorder: Recorder,
) -> None:
    register()
    publish_many(LEDGER, range(3))
    age(24 * 8)
    from_elsewhere()
    assert command("pgnotify_prune") == "0 event(s) removed from the log\n"
    age(24 * 31)
    assert command("pgnotify_prune") == "3 event(s) removed from the log\n"
    assert stored().gap_events == 3


# -- consumers exist from migrate on --------------------------------------------------------------


def test_migrate_registers_consumers_so_that_nothing_published_before_pglisten_is_missed() -> None:
    heard = Recorder()
    consume(heard)
    call_command("migrate", "django_pgnotify", verbosity=0)
    assert stored().topics == ["ledger"]
    publish(LEDGER, "before the first pglisten")
    with running_listener():
        heard.wait_for(1)


# -- the admin ----------------------------------------------------------------------------------


@pytest.fixture
def admin() -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("admin"))
    return client


def page(admin: Client, model: str, **query_: str) -> str:
    answer = admin.get(reverse(f"admin:django_pgnotify_{model}_changelist"), query_)
    assert answer.status_code == 200
    return answer.content.decode()


def act(admin: Client, model: str, action: str, *pks: int) -> str:
    answer = admin.post(
        reverse(f"admin:django_pgnotify_{model}_changelist"),
        {"action": action, "_selected_action": [str(pk) for pk in pks]},
    )
    assert answer.status_code == 302
    return str(list(get_messages(answer.wsgi_request))[-1])


def test_the_log_can_be_read_and_filtered_and_not_changed(admin: Client) -> None:
    publish_many(LEDGER, range(3), key="k1")
    publish(Topic("other", "durable"), 1)
    assert "4 logged events" in page(admin, "loggedevent")
    assert re.search(r"\b1 logged event\s", page(admin, "loggedevent", topic="other"))
    assert "3 logged events" in page(admin, "loggedevent", q="k1")
    row = LoggedEvent.objects.first()
    assert row is not None
    shown = admin.get(reverse("admin:django_pgnotify_loggedevent_change", args=[row.pk]))
    assert b'name="_save"' not in shown.content
    assert admin.get(reverse("admin:django_pgnotify_loggedevent_add")).status_code == 403


def test_consumers_are_shown_with_their_lag_and_paused_in_the_admin(
    admin: Client, recorder: Recorder
) -> None:
    register()
    publish_many(LEDGER, range(7))
    assert '<td class="field-events_behind">7</td>' in page(admin, "consumer")
    assert act(admin, "consumer", "pause", stored().pk) == "Paused: ledger."
    assert stored().paused
    assert "paused" in page(admin, "consumer")
    assert act(admin, "consumer", "resume", stored().pk) == "Resumed: ledger."
    assert not stored().paused
    done = act(admin, "consumer", "skip_to_now", stored().pk)
    assert done == "Set to go on from now: ledger."
    assert lag_of(stored()).events == 0


def test_dead_letters_are_requeued_and_discarded_in_the_admin(admin: Client) -> None:
    picky = Picky([1, 2])
    consume(picky)
    with running_listener():
        publish_many(LEDGER, [1, 2])
        until(lambda: len(letters()) == 2)
        first, second = letters()
        answer = admin.get(reverse("admin:django_pgnotify_deadletter_change", args=[first.pk]))
        letter = answer.content.decode()
        assert "<pre>Traceback (most recent call last):" in letter
        assert "ValueError: cannot take 1\n</pre>" in letter
        assert "field-event_id" in letter
        assert "field-id" not in letter
        assert letter.count("cannot take 1") == 1
        assert '<td class="field-dead_letters">2</td>' in page(admin, "consumer")
        assert str(first) == f"event {first.event_id} of ledger for ledger"
        shown = page(admin, "deadletter")
        assert '<td class="field-last_error">ValueError: cannot take 1</td>' in shown
        assert "2 dead letters" in page(admin, "deadletter", state="dead")
        assert "0 dead letters" in page(admin, "deadletter", state="waiting")
        picky.bad.clear()
        act(admin, "deadletter", "requeue", first.pk)
        picky.wait_for(1)
        act(admin, "deadletter", "discard", second.pk)
        until(lambda: letters() == [])
    assert picky.data == [1]


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_the_admin_shows_and_changes_what_is_on_the_database_of_the_bus(
    admin: Client, settings: Any
) -> None:
    settings.PGNOTIFY_DATABASE = "other"
    consume(Picky([1, 2]))
    consume(Picky([2]), "second")
    with running_listener():
        publish_many(LEDGER, [1, 2])
        until(lambda: consumers.dead_letters().count() == 3)
        one = consumers.consumer("second")
        assert "2 logged events" in page(admin, "loggedevent")
        assert '<a href="?topic=ledger">' in page(admin, "loggedevent")
        assert '<td class="field-dead_letters">1</td>' in page(admin, "consumer")
        assert "3 dead letters" in page(admin, "deadletter")
        chosen = {"consumer__id__exact": str(one.pk)}
        assert re.search(r"\b1 dead letter\s", page(admin, "deadletter", **chosen))
        assert f'<a href="?consumer__id__exact={one.pk}">' in page(admin, "deadletter")
        [letter] = one.dead_letters.all()
        address = reverse("admin:django_pgnotify_deadletter_change", args=[letter.pk])
        assert b"cannot take 2" in admin.get(address).content
        act(admin, "deadletter", "discard", letter.pk)
        assert consumers.dead_letters().count() == 2
        act(admin, "consumer", "pause", one.pk)
        assert consumers.consumer("second").paused


def test_to_save_a_consumer_in_the_admin_does_not_put_its_cursor_back(
    admin: Client, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    address = reverse("admin:django_pgnotify_consumer_change", args=[stored().pk])
    load = Consumer.from_db

    def moved_meanwhile(cls: type[Consumer], *args: Any, **kwargs: Any) -> Consumer:
        row = load(*args, **kwargs)
        query("UPDATE pgnotify_consumer SET handled = 4711 RETURNING 1")
        return row

    monkeypatch.setattr(Consumer, "from_db", classmethod(moved_meanwhile))
    assert admin.post(address, {"_save": "Save"}).status_code == 302
    monkeypatch.undo()
    assert stored().handled == 4711


def test_nobody_without_permission_changes_anything(admin: Client, recorder: Recorder) -> None:
    register()
    client = Client()
    client.force_login(User.objects.create_user("clerk", is_staff=True))
    answer = client.post(
        reverse("admin:django_pgnotify_consumer_changelist"),
        {"action": "pause", "_selected_action": [str(stored().pk)]},
    )
    assert answer.status_code == 403
    assert not stored().paused
