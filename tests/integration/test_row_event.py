"""A row's event says what was saved: noted at the save, encoded when it leaves, or never."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from pytest_django import Settings

from django_pgnotify import publish
from django_pgnotify.publishing import row_event
from django_pgnotify.publishing.row_event import RowEvent
from django_pgnotify.registry import Publication, registry
from django_pgnotify.stats import publishing_stats
from django_pgnotify.testing import capture_events
from django_pgnotify.wire import Outgoing, encode_event
from tests.integration.hearing import Ear, hearing, statements
from tests.integration.recording import rolled_back
from tests.testapp.models import (
    Article,
    Document,
    Membership,
    Order,
    Profile,
    Shipment,
    Tag,
    Urgent,
)

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def ear() -> Iterator[Ear]:
    topics = ("order", "shipment", "profile", "document", "membership", "urgent", "article")
    with hearing("jobs", *(f"testapp.{topic}" for topic in topics)) as one:
        yield one


@pytest.fixture
def order() -> Order:
    return Order.objects.create()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The data of each row's event, as often as it is encoded."""
    seen: list[Any] = []

    def watched(*args: Any, **kwargs: Any) -> Outgoing:
        seen.append(kwargs["data"])
        return encode_event(*args, **kwargs)

    monkeypatch.setattr(row_event, "encode_event", watched)
    return seen


# -- what was saved --------------------------------------------------------------------------


def test_an_event_says_what_was_saved_though_the_instance_is_changed_before_the_commit(
    ear: Ear, order: Order
) -> None:
    ear.frames()
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    with transaction.atomic():
        shipment = Shipment.objects.create(
            order=order, status="packed", weight=Decimal("1.500"), sent_at=moment
        )
        pk = shipment.pk
        shipment.status, shipment.weight, shipment.sent_at = "lost", Decimal(9), None
        shipment.order_id = -1
        shipment.pk = -1
    event = ear.event()
    assert (event.action, event.pk, event.key) == ("created", pk, f"testapp.shipment:{pk}")
    assert event.data == {
        "status": "packed",
        "weight": "1.500",
        "sent_at": "2026-01-02T03:04:05.678901+00:00",
        "order": order.pk,
    }


def test_each_save_of_one_instance_in_a_transaction_is_an_event_of_its_own_values(
    ear: Ear, order: Order
) -> None:
    ear.frames()
    with transaction.atomic():
        shipment = Shipment(order=order)
        for number in range(5):
            shipment.status = str(number)
            shipment.save()
        shipment.delete()
    events = ear.events()
    assert [event.action for event in events] == ["created", *["updated"] * 4, "deleted"]
    assert [event.data["status"] for event in events] == ["0", "1", "2", "3", "4", "4"]
    # What a rollback may undo is not compared with.
    assert [event.changed for event in events] == [None, ("status",), None, None, None, None]
    assert len({event.pk for event in events}) == 1


@pytest.mark.parametrize(
    "value",
    [{"a": [1, {"b": 2}]}, [{"a": 1}], [[1]], {"a": {}}, ({"a": 1},), {"a": ({"b": 1},)}],
    ids=repr,
)
def test_a_json_value_that_is_changed_in_place_after_the_save_is_sent_as_it_was_saved(
    ear: Ear, value: Any
) -> None:
    with transaction.atomic():
        profile = Profile.objects.create(settings=value)
        _spoil(profile.settings)
    event = ear.event()
    profile.refresh_from_db()
    assert event.data["settings"] == profile.settings
    assert "spoilt" not in repr(event.data)


def _spoil(value: Any) -> None:
    """Change everything in it that can be changed."""
    inside = list(value.values()) if isinstance(value, dict) else list(value)
    for one in inside:
        if isinstance(one, (dict, list, tuple)):
            _spoil(one)
    if isinstance(value, dict):
        value["spoilt"] = "spoilt"
    elif isinstance(value, list):
        value.append("spoilt")


def test_an_update_in_place_between_two_saves_is_told_by_the_second_alone(ear: Ear) -> None:
    with transaction.atomic():
        profile = Profile.objects.create(settings={"a": 1})
        profile.settings["a"] = 2
        profile.save()
        profile.settings["a"] = 3
    created, updated = ear.events()
    assert created.data["settings"] == {"a": 1}
    assert updated.data["settings"] == {"a": 2}
    assert updated.changed == ("settings",)


def test_keys_of_every_kind_are_those_of_the_save(ear: Ear) -> None:
    badge = uuid.UUID(int=7)
    with transaction.atomic():
        document = Document.objects.create(title="a")
        pk = document.pk
        member = Membership.objects.create(team=1, person="é", badge=badge)
        document.pk = uuid.UUID(int=1)
        member.person = "other"
    events = ear.events()
    assert [event.pk for event in events] == [pk, (1, "é", badge)]


def test_an_event_was_published_when_the_row_was_saved_not_when_it_left(ear: Ear) -> None:
    with transaction.atomic():
        before = datetime.now(UTC)
        Order.objects.create()
        after = datetime.now(UTC)
        while datetime.now(UTC) < after + timedelta(milliseconds=10):
            Order.objects.exists()
    at = ear.event().published_at
    assert before.timestamp() - 0.001 <= at.timestamp() <= after.timestamp() + 0.001


def test_many_to_many_changes_are_those_of_their_moment(ear: Ear) -> None:
    with transaction.atomic():
        article = Article.objects.create(title="a")
        tag = Tag.objects.create(name="t")
        pk = tag.pk
        article.tags.add(tag)
        tag.pk = -1
    _, added = ear.events()
    assert added.data == {"field": "tags", "operation": "add", "pks": [pk]}


# -- order and ids ---------------------------------------------------------------------------


def test_rows_and_what_is_published_between_them_leave_in_their_order_with_ids_that_count(
    ear: Ear,
) -> None:
    with transaction.atomic():
        expected: list[Any] = []
        for number in range(400):  # more than one portion
            if number % 3:
                expected.append(publish("jobs", number))
            else:
                expected.append(Order.objects.create().pk)
    events = ear.events()
    counts = sorted(int(event.id.rpartition("-")[2], 16) for event in events)
    assert len(set(counts)) == 400
    of_jobs = [event for event in events if event.topic == "jobs"]
    of_orders = [event for event in events if event.topic == "testapp.order"]
    assert [event.id for event in of_jobs] == [one for one in expected if isinstance(one, str)]
    assert [event.pk for event in of_orders] == [one for one in expected if isinstance(one, int)]
    in_order = sorted(events, key=lambda event: int(event.id.rpartition("-")[2], 16))
    assert [event.id if event.topic == "jobs" else event.pk for event in in_order] == expected


def test_captured_events_are_in_the_order_of_the_saves_before_and_after_the_commit(
    ear: Ear,
) -> None:
    with capture_events() as captured:
        with transaction.atomic():
            first = Order.objects.create()
            publish("jobs", 1)
            second = Order.objects.create()
            inside = [(event.id, event.pk) for event in captured]
        assert [(event.id, event.pk) for event in captured] == inside
    assert [pk for _, pk in inside] == [first.pk, None, second.pk]
    assert {event.id for event in ear.events()} == {one for one, _ in inside}


# -- when it is encoded ----------------------------------------------------------------------


def test_a_save_in_a_transaction_encodes_nothing(ear: Ear, encoded: list[Any]) -> None:
    with transaction.atomic():
        for _ in range(10):
            Order.objects.create()
        assert encoded == []
    assert len(encoded) == len(ear.events()) == 10


def test_events_of_a_transaction_that_is_rolled_back_are_never_encoded(
    ear: Ear, encoded: list[Any]
) -> None:
    with rolled_back():
        Order.objects.create()
        with transaction.atomic():
            Order.objects.create().delete()
    assert encoded == []
    assert ear.events() == []


def test_events_of_a_savepoint_that_is_rolled_back_are_never_encoded(
    ear: Ear, encoded: list[Any], order: Order
) -> None:
    ear.frames()
    encoded.clear()
    with transaction.atomic():
        Shipment.objects.create(order=order, status="kept")
        with rolled_back():
            Shipment.objects.create(order=order, status="lost")
            with transaction.atomic():
                Shipment.objects.create(order=order, status="lost too")
        Shipment.objects.create(order=order, status="kept too")
    assert [data["status"] for data in encoded] == ["kept", "kept too"]
    assert [event.data["status"] for event in ear.events()] == ["kept", "kept too"]


def test_each_event_is_encoded_once_however_it_leaves(
    ear: Ear, encoded: list[Any], settings: Settings
) -> None:
    with transaction.atomic():
        Order.objects.create()
    Order.objects.create()
    with CaptureQueriesContext(connection), transaction.atomic():
        Order.objects.create()
    with transaction.atomic():
        for _ in range(300):
            Order.objects.create()
    assert len(ear.events()) == 303
    assert len(encoded) == 303


# -- what cannot be encoded ------------------------------------------------------------------


def test_a_value_that_cannot_be_carried_leaves_an_event_without_values_and_one_report(
    ear: Ear, order: Order, caplog: pytest.LogCaptureFixture
) -> None:
    ear.frames()
    failed = publishing_stats["publish_failed"]
    with caplog.at_level(logging.ERROR, "django_pgnotify.publishing"), transaction.atomic():
        # Django makes text of it for the row; JSON has no word for it.
        shipment = Shipment.objects.create(
            order=order,
            status=float("nan"),  # type: ignore[misc]
        )
        publish("jobs", "behind it")
    shipment.refresh_from_db()
    assert shipment.status == "nan"
    without, behind = ear.events()
    assert (without.action, without.pk, without.data) == ("created", shipment.pk, {})
    assert behind.data == "behind it"
    assert publishing_stats["publish_failed"] == failed + 1
    [record] = [one for one in caplog.records if one.name == "django_pgnotify.publishing"]
    assert "testapp.Shipment" in record.getMessage() or "testapp.shipment" in record.getMessage()
    assert "status" in record.getMessage()


def test_a_json_value_that_cannot_be_carried_leaves_an_event_without_values_and_one_report(
    ear: Ear, caplog: pytest.LogCaptureFixture
) -> None:
    deep: list[Any] = []
    for _ in range(250):
        deep = [deep]
    failed = publishing_stats["publish_failed"]
    with caplog.at_level(logging.ERROR, "django_pgnotify.publishing"):
        profile = Profile.objects.create(settings=deep)
    event = ear.event()
    assert (event.action, event.pk, event.data) == ("created", profile.pk, {})
    assert publishing_stats["publish_failed"] == failed + 1
    [record] = [one for one in caplog.records if one.name == "django_pgnotify.publishing"]
    assert "deeper than" in record.getMessage()


def test_a_key_that_cannot_be_carried_is_no_event_and_takes_no_other_along(
    ear: Ear, caplog: pytest.LogCaptureFixture
) -> None:
    """No field of Django's makes one; a field of somebody else's may."""
    [publication] = [one for one in registry.publications.values() if one.model is Shipment]
    failed = publishing_stats["publish_failed"]
    row = RowEvent(publication, "created", float("nan"), {"status": "packed"}, None)
    with caplog.at_level(logging.ERROR, "django_pgnotify.publishing"):
        assert row.encode() is None
    assert publishing_stats["publish_failed"] > failed
    assert publication.label in caplog.text


def test_an_event_that_was_given_up_does_not_keep_back_those_of_its_transaction(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = RowEvent.encode

    def give_up_the_second(self: RowEvent) -> Outgoing | None:
        return None if self.pk == given_up else encode(self)

    monkeypatch.setattr(RowEvent, "encode", give_up_the_second)
    with transaction.atomic():
        first = Order.objects.create()
        given_up = Order.objects.create().pk
        third = Order.objects.create()
    assert [event.pk for event in ear.events()] == [first.pk, third.pk]
    with transaction.atomic():
        given_up = Order.objects.create().pk
    assert ear.events() == []
    given_up = 0
    with transaction.atomic():
        last = Order.objects.create()
    assert ear.event().pk == last.pk


# -- tiers -----------------------------------------------------------------------------------


def test_the_atomic_tier_is_encoded_and_sent_at_the_save_and_leaves_with_the_commit(
    ear: Ear, encoded: list[Any]
) -> None:
    with transaction.atomic():
        with statements() as ran:
            urgent = Urgent.objects.create(name="a")
        assert len(ran.notify) == len(encoded) == 1
        assert ear.events() == []
    event = ear.event()
    assert (event.action, event.pk) == ("created", urgent.pk)


def test_the_atomic_tier_goes_with_its_savepoint(ear: Ear) -> None:
    with transaction.atomic():
        kept = Urgent.objects.create(name="a")
        with rolled_back():
            Urgent.objects.create(name="b")
    assert ear.event().pk == kept.pk


@pytest.mark.parametrize("model", [Order, Urgent], ids=["after_commit", "atomic"])
def test_a_transaction_by_hand_keeps_its_rows_events_to_itself(ear: Ear, model: Any) -> None:
    transaction.set_autocommit(False)
    try:
        model.objects.create()
        assert ear.events() == []
        transaction.rollback()
        kept = model.objects.create()
        transaction.commit()
        assert [event.pk for event in ear.events()] == [kept.pk]
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)
    assert ear.events() == []


def test_a_transaction_begun_by_a_statement_keeps_its_rows_events_to_itself(ear: Ear) -> None:
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        Order.objects.create()
        assert ear.events() == []
        cursor.execute("ROLLBACK")
        cursor.execute("BEGIN")
        kept = Order.objects.create()
        cursor.execute("COMMIT")
    assert ear.event().pk == kept.pk


def test_an_event_noted_by_hand_says_what_it_was_told(ear: Ear) -> None:
    [publication] = [one for one in registry.publications.values() if one.model is Shipment]
    assert isinstance(publication, Publication)
    row = RowEvent(publication, "updated", 7, {"status": "é"}, ("status",))
    first, second = row.encode(), row.encode()
    assert first is not None
    assert first == second
    assert first.topic == publication.topic
    assert first.size == len(first.body.encode())
