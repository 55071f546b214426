"""An event too big for NOTIFY is stored in a row and travels by reference, whatever its size."""

# ruff: noqa: PT012  a block that is rolled back is more than one statement

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.db.models.functions import Now
from pytest_django import Settings

from django_pgnotify import publish
from django_pgnotify.models import StoredEvent
from django_pgnotify.publishing.store import PRUNE_BATCH, fetch, prune, store
from django_pgnotify.stats import publishing_stats
from django_pgnotify.testing import running_listener
from django_pgnotify.wire import reference_in, stored_body
from tests.integration.hearing import Ear, hearing, statements
from tests.testapp.models import Profile

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def ear() -> Iterator[Ear]:
    with hearing("jobs", "testapp.profile") as one:
        yield one


@pytest.mark.parametrize("size", [7_000, 8_000, 1_000_000, 20_000_000])
@pytest.mark.parametrize("delivery", ["after_commit", "atomic"])
def test_an_event_of_any_size_arrives_whole(ear: Ear, size: int, delivery: str) -> None:
    text = "x" * (size - 4) + "é\U0001f600"
    publish("jobs", {"text": text}, delivery=delivery)  # type: ignore[arg-type]
    event = ear.event()
    assert event.data == {"text": text}
    assert StoredEvent.objects.count() == (0 if size == 7_000 else 1)


def test_a_row_whose_values_are_too_big_arrives_whole(ear: Ear) -> None:
    profile = Profile.objects.create(settings={"text": "x" * 100_000})
    event = ear.event()
    assert (event.pk, event.action) == (profile.pk, "created")
    assert event.data["settings"] == profile.settings
    profile.settings = {}
    profile.save()
    assert ear.event().changed == ("settings",)


def test_big_and_small_events_keep_their_order(ear: Ear) -> None:
    sizes = [1, 9_000, 2, 3, 50_000, 8_500, 4, 7_000, 7_000, 9_000, 5]
    with transaction.atomic():
        for number, size in enumerate(sizes):
            publish("jobs", [number, "x" * size])
    assert [(number, len(text)) for number, text in ear.data()] == list(enumerate(sizes))


def test_many_big_events_leave_in_few_statements(ear: Ear) -> None:
    with statements() as ran, transaction.atomic():
        for number in range(500):
            publish("jobs", [number, "x" * 8_000])
    inserts = [one for one in ran.all if "pgnotify_stored_event" in one]
    assert len(ran.notify) <= 5
    assert len(inserts) <= 10
    assert [number for number, _ in ear.data()] == list(range(500))


def test_the_row_is_there_before_anybody_can_hear_of_it(ear: Ear) -> None:
    """INSERT and NOTIFY are one transaction."""
    with statements() as ran:
        publish("jobs", "x" * 10_000)
    marks = [
        mark
        for one in ran.all
        for mark in ("BEGIN", "INSERT", "pg_notify(", "COMMIT")
        if mark in one
    ]
    assert marks == ["BEGIN", "INSERT", "pg_notify(", "COMMIT"]
    assert ear.data() == ["x" * 10_000]


@pytest.mark.parametrize("delivery", ["after_commit", "atomic"])
def test_a_rolled_back_event_leaves_no_row_behind(ear: Ear, delivery: str) -> None:
    with pytest.raises(RuntimeError), transaction.atomic():
        publish("jobs", "x" * 10_000, delivery=delivery)  # type: ignore[arg-type]
        raise RuntimeError
    assert ear.events() == []
    assert StoredEvent.objects.count() == 0


def test_a_big_event_without_autocommit_follows_the_commit_by_hand(ear: Ear) -> None:
    transaction.set_autocommit(False)
    try:
        publish("jobs", "x" * 10_000)
        transaction.rollback()
        publish("jobs", "y" * 10_000)
        assert ear.events() == []
        transaction.commit()
        assert ear.data() == ["y" * 10_000]
        transaction.rollback()
    finally:
        transaction.set_autocommit(True)


def test_a_reference_says_what_the_row_must_hash_to(ear: Ear) -> None:
    publish("jobs", "x" * 10_000)
    [heard] = ear.frames()
    row = StoredEvent.objects.get()
    assert f'"ref":{row.pk}' in heard.payload
    assert '"digest":"' in heard.payload
    assert len(heard.payload) < 300
    found = reference_in({"ref": row.pk, "digest": None})
    assert found is not None
    assert stored_body(fetch([found.row], "default")[row.pk], None)["data"] == "x" * 10_000


def test_a_signed_event_too_big_for_notify_arrives(settings: Settings, ear: Ear) -> None:
    settings.PGNOTIFY_SIGNING = True
    publish("jobs", "x" * 10_000)
    assert ear.data() == ["x" * 10_000]


def test_a_stored_event_is_counted(ear: Ear) -> None:
    stored = publishing_stats["stored"]
    publish("jobs", "x")
    publish("jobs", "x" * 10_000)
    assert publishing_stats["stored"] == stored + 1


# -- the table -------------------------------------------------------------------------------


def test_rows_are_stored_and_fetched_by_id() -> None:
    bodies = [f"body {number}" for number in range(250)]
    ids = store(bodies, "default")
    assert [fetch(ids, "default")[row] for row in ids] == bodies
    assert fetch([*ids[:2], 10**9], "default") == dict(zip(ids[:2], bodies[:2], strict=True))
    assert fetch([], "default") == {}


def test_only_what_is_older_than_the_limit_is_pruned_and_a_batch_at_a_time() -> None:
    old = store(["old"] * (PRUNE_BATCH + 5), "default")
    StoredEvent.objects.filter(pk__in=old).update(created_at=Now() - timedelta(seconds=100))
    new = store(["new"] * 3, "default")
    assert prune(50, "default") == PRUNE_BATCH
    assert prune(50, "default") == 5
    assert prune(50, "default") == 0
    assert list(StoredEvent.objects.values_list("pk", flat=True)) == new


# -- through the listener --------------------------------------------------------------------


def test_a_listener_fetches_what_was_stored_and_keeps_the_order() -> None:
    with running_listener(topics=["jobs"]) as listener:
        with transaction.atomic():
            for number, size in enumerate([1, 9_000, 1_000_000, 2]):
                publish("jobs", [number, "x" * size])
        publish("jobs", [4, ""])
        events = listener.wait_for(5)
    assert [(number, len(text)) for number, text in (event.data for event in events)] == [
        (0, 1), (1, 9_000), (2, 1_000_000), (3, 2), (4, 0),
    ]  # fmt: skip


def test_a_stored_event_that_is_gone_is_skipped_and_the_next_one_is_handled() -> None:
    with running_listener(topics=["jobs"]) as listener:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_notify('jobs', %s)", ['{"pgnotify":1,"events":[{"ref":987654321}]}']
            )
        publish("jobs", "next")
        [event] = listener.wait_for(1)
        assert event.data == "next"
        assert listener.service is not None
        assert listener.service.stats["broken"] == 1


def test_a_stored_event_that_was_tampered_with_is_skipped() -> None:
    [row] = store(['{"action":"published","data":"forged"}'], "default")
    with running_listener(topics=["jobs"]) as listener:
        digest = "0" * 32
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_notify('jobs', %s)",
                [f'{{"pgnotify":1,"events":[{{"ref":{row},"digest":"{digest}"}}]}}'],
            )
        publish("jobs", "next")
        assert [event.data for event in listener.wait_for(1)] == ["next"]
        assert listener.service is not None
        assert listener.service.stats["broken"] == 1
