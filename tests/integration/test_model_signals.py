"""A change of a row becomes one event, whatever kind of model and however it was saved."""

# ruff: noqa: PT012  a block that is rolled back is more than one statement
# ruff: noqa: DJ008  nobody looks at the rows of a model that lives for one test

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.apps import apps
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.core.files.base import ContentFile
from django.core.management import call_command
from django.db import DatabaseError, connection, models, transaction
from django.db.migrations.state import ProjectState
from django.db.models import F
from django.test.utils import CaptureQueriesContext, isolate_apps
from pytest_django import Settings

from django_pgnotify import Event, no_notify, notify_changes
from django_pgnotify.models import LoggedEvent
from django_pgnotify.publishing import changes, handlers
from django_pgnotify.registry import registry
from django_pgnotify.stats import publishing_stats
from tests.integration.hearing import Ear, hearing, statements
from tests.testapp.models import (
    Audited,
    Bicycle,
    Car,
    Document,
    Invoice,
    Membership,
    Memo,
    Order,
    Place,
    Profile,
    Restaurant,
    Shipment,
    Sku,
    Sportscar,
    Urgent,
    Vehicle,
)

pytestmark = pytest.mark.django_db(transaction=True)

MISSING = object()
ALL_TOPICS = (
    "testapp.order", "testapp.shipment", "testapp.article", "testapp.tag", "testapp.audited",
    "testapp.document", "testapp.sku", "testapp.membership", "testapp.memo", "testapp.vehicle",
    "testapp.car", "testapp.bicycle", "testapp.sportscar", "testapp.place", "testapp.restaurant",
    "testapp.profile", "testapp.urgent", "testapp.invoice", "billing", "people", "auth.user",
)  # fmt: skip


@pytest.fixture
def ear() -> Iterator[Ear]:
    with hearing(*ALL_TOPICS) as one:
        yield one


def short(events: list[Event]) -> list[tuple[str | None, str, Any]]:
    return [(event.model, event.action, event.pk) for event in events]


@contextmanager
def forgotten_publications() -> Iterator[None]:
    """Models made by a test publish nothing after it."""
    before = dict(registry.publications)
    try:
        yield
    finally:
        registry.publications.clear()
        registry.publications.update(before)


# -- created, updated, deleted ---------------------------------------------------------------


def test_a_row_s_life_is_three_events(ear: Ear) -> None:
    order = Order.objects.create(status="new")
    pk = order.pk
    order.status = "paid"
    order.save()
    order.delete()
    events = ear.events()
    assert short(events) == [
        ("testapp.order", "created", pk), ("testapp.order", "updated", pk),
        ("testapp.order", "deleted", pk),
    ]  # fmt: skip
    for event in events:
        assert (event.topic, event.key, event.data) == ("testapp.order", f"testapp.order:{pk}", {})
        assert event.changed is None
        assert event.using == "default"


def test_the_row_is_there_for_who_hears_of_it_and_none_once_it_is_gone(ear: Ear) -> None:
    order = Order.objects.create(note="here")
    event = ear.event()
    assert event.instance() == order
    assert event.instance().note == "here"
    order.delete()
    assert event.instance() is None
    assert ear.event().instance() is None


async def test_the_row_is_there_for_async_code_too() -> None:
    order = await Order.objects.acreate(note="here")
    event = Event(
        "id", "testapp.order", "created", "testapp.order", order.pk, {}, None, "a:1",
        datetime.now(UTC),
    )  # fmt: skip
    found = await event.ainstance()
    assert found == order
    await order.adelete()
    assert await event.ainstance() is None


def test_a_save_that_fails_is_no_event(ear: Ear) -> None:
    Sku.objects.create(code="a")
    ear.events()
    with pytest.raises(DatabaseError):
        Sku(code="a").save(force_insert=True)
    with pytest.raises(DatabaseError):
        Order(pk=12345).save(force_update=True)
    assert ear.events() == []


def test_a_rolled_back_save_is_no_event(ear: Ear) -> None:
    with pytest.raises(RuntimeError), transaction.atomic():
        Order.objects.create()
        raise RuntimeError
    assert ear.events() == []


def test_what_sends_signals_in_bulk_is_an_event_per_row(ear: Ear) -> None:
    orders = [Order.objects.create() for _ in range(3)]
    Shipment.objects.create(order=orders[0])
    ear.events()
    Order.objects.all().delete()
    events = ear.events()
    deleted = {(event.model, event.action) for event in events}
    assert deleted == {("testapp.order", "deleted"), ("testapp.shipment", "deleted")}
    assert len(events) == 4


def test_what_sends_no_signals_publishes_nothing(ear: Ear) -> None:
    Order.objects.bulk_create([Order(), Order()])
    Order.objects.update(status="paid")
    Order.objects.bulk_update(Order.objects.all(), ["status"])
    assert ear.events() == []


def test_get_or_create_and_update_or_create_publish_what_they_did(ear: Ear) -> None:
    Sku.objects.get_or_create(code="a")
    Sku.objects.get_or_create(code="a")
    Sku.objects.update_or_create(code="a", defaults={"stock": 5})
    assert [event.action for event in ear.events()] == ["created", "updated"]


async def test_async_saves_publish_too() -> None:
    ear = await sync_to_async(Ear)("default", ("testapp.order",))
    try:
        order = await Order.objects.acreate()
        await order.asave()
        await order.adelete()
        events = await sync_to_async(ear.events)()
    finally:
        ear.close()
    assert [event.action for event in events] == ["created", "updated", "deleted"]


def test_a_save_costs_one_statement_more_and_no_query() -> None:
    order = Order.objects.create()
    shipment = Shipment.objects.create(order=order)
    for instance in (order, shipment):
        with no_notify(), statements() as quiet:
            instance.save()
        with statements() as ran:
            instance.save()
        assert len(ran.notify) == 1
        assert len(ran.all) == len(quiet.all) + 1


# -- fields ----------------------------------------------------------------------------------


def test_fields_are_carried_as_plain_values(ear: Ear) -> None:
    sent_at = datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=UTC)
    order = Order.objects.create()
    Shipment.objects.create(
        order=order, status="sent", weight=Decimal("1.500"), sent_at=sent_at, label="not carried"
    )
    [_, event] = ear.events()
    assert event.action == "created"
    assert event.data == {
        "status": "sent", "weight": "1.500", "sent_at": sent_at.isoformat(), "order": order.pk,
    }  # fmt: skip
    assert event.changed is None


def test_an_update_says_which_of_the_fields_changed(ear: Ear) -> None:
    order = Order.objects.create()
    shipment = Shipment.objects.create(order=order, weight=Decimal("1.500"))
    ear.events()
    shipment.status = "sent"
    shipment.label = "not tracked"
    shipment.save()
    event = ear.event()
    assert event.changed == ("status",)
    assert event.data["status"] == "sent"
    shipment.status, shipment.weight = "lost", Decimal("2.000")
    shipment.save()
    assert ear.event().changed == ("status", "weight")


def test_an_update_of_nothing_says_so_and_is_an_event_still(ear: Ear) -> None:
    shipment = Shipment.objects.create(order=Order.objects.create())
    ear.events()
    shipment.label = "not tracked"
    shipment.save()
    event = ear.event()
    assert (event.action, event.changed) == ("updated", ())


def test_a_row_loaded_elsewhere_is_compared_with_what_was_loaded(ear: Ear) -> None:
    pk = Shipment.objects.create(order=Order.objects.create()).pk
    ear.events()
    for shipment in (Shipment.objects.get(pk=pk), Shipment.objects.all()[0]):
        shipment.status += "!"
        shipment.save()
        assert ear.event().changed == ("status",)


def test_an_equal_value_of_another_type_is_no_silent_miss(ear: Ear) -> None:
    shipment = Shipment.objects.create(order=Order.objects.create(), weight=Decimal("1.5"))
    ear.events()
    shipment.weight = Decimal("1.50")
    shipment.save()
    assert ear.event().changed == ()


def test_a_foreign_key_is_carried_as_its_key_and_its_change_is_seen(ear: Ear) -> None:
    first, second = Order.objects.create(), Order.objects.create()
    shipment = Shipment.objects.create(order=first)
    ear.events()
    shipment.order = second
    shipment.save()
    event = ear.event()
    assert (event.changed, event.data["order"]) == (("order",), second.pk)
    shipment.order_id = first.pk
    shipment.save(update_fields=["order_id"])
    event = ear.event()
    assert (event.changed, event.data["order"]) == (("order",), first.pk)


def test_update_fields_say_what_changed_where_no_fields_are_tracked(ear: Ear) -> None:
    order = Order.objects.create()
    ear.events()
    order.save(update_fields=["status", "total"])
    event = ear.event()
    assert set(event.changed or ()) == {"status", "total"}
    order.save(update_fields=[])
    assert ear.events() == []


def test_update_fields_narrow_what_changed_to_what_was_written(ear: Ear) -> None:
    shipment = Shipment.objects.create(order=Order.objects.create())
    ear.events()
    shipment.status, shipment.weight = "sent", Decimal("9.000")
    shipment.save(update_fields=["status"])
    assert ear.event().changed == ("status",)


def test_a_value_that_was_not_written_is_not_carried_as_if_it_were(ear: Ear) -> None:
    shipment = Shipment.objects.create(order=Order.objects.create(), weight=Decimal("1.000"))
    ear.events()
    shipment.status, shipment.weight = "sent", Decimal("9.000")
    shipment.save(update_fields=["status"])
    event = ear.event()
    assert event.data["status"] == "sent"
    assert event.data.get("weight") in (None, "1.000")


def test_a_value_that_was_not_written_yet_is_a_change_when_it_is(ear: Ear) -> None:
    shipment = Shipment.objects.create(order=Order.objects.create(), weight=Decimal("1.000"))
    ear.events()
    shipment.status, shipment.weight = "sent", Decimal("9.000")
    shipment.save(update_fields=["status"])
    shipment.save()
    [_, event] = ear.events()
    assert event.changed == ("weight",)


def test_a_row_refreshed_from_the_database_is_compared_with_what_it_read(ear: Ear) -> None:
    shipment = Shipment.objects.create(order=Order.objects.create())
    Shipment.objects.update(status="changed elsewhere")
    ear.events()
    shipment.refresh_from_db()
    shipment.save()
    assert ear.event().changed in ((), None)


def test_what_a_copy_is_saved_as_says_nothing_of_the_row_it_was_copied_from(ear: Ear) -> None:
    order = Order.objects.create()
    shipment = Shipment.objects.create(order=order, status="packed")
    shipment = Shipment.objects.get(pk=shipment.pk)
    ear.events()
    clone = copy.copy(shipment)
    clone.pk, clone.status = None, "sent"
    clone._state.adding = True
    clone.save()
    shipment.status = "sent"
    shipment.save()
    clone.status = "packed"
    clone.save()
    created, updated, again = ear.events()
    assert (created.action, created.changed) == ("created", None)
    assert (updated.pk, updated.changed) == (shipment.pk, ("status",))
    assert (again.pk, again.changed) == (clone.pk, ("status",))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda row: pickle.loads(pickle.dumps(row))],
    ids=["copy", "deepcopy", "pickle"],
)  # fmt: skip
def test_a_copy_knows_what_its_original_knows_and_no_more(
    ear: Ear, copied: Callable[[Shipment], Shipment]
) -> None:
    order = Order.objects.create()
    shipment = Shipment.objects.create(order=order, status="packed")
    with transaction.atomic():
        shipment.status = "sent"
        shipment.save()
    ear.events()
    twin = copied(shipment)
    twin.save()  # it may have been rolled back
    twin.status = "lost"
    copied(twin).save()
    assert [event.changed for event in ear.events()] == [None, ("status",)]


def test_an_expression_is_not_carried_as_a_value_and_not_taken_for_unchanged(ear: Ear) -> None:
    shipment = Shipment.objects.create(order=Order.objects.create(), weight=Decimal("1.000"))
    ear.events()
    shipment.weight = F("weight") + 1
    shipment.save()
    event = ear.event()
    assert event.data.get("weight", "2.000") == "2.000"
    assert event.changed is None or "weight" in event.changed
    shipment.refresh_from_db()
    assert shipment.weight == Decimal("2.000")
    shipment.status = "sent"
    shipment.save()
    event = ear.event()
    assert event.changed is None or "status" in event.changed
    assert event.data["weight"] == "2.000"
    shipment.status = "lost"
    shipment.save()
    assert ear.event().changed == ("status",)


def test_a_deferred_field_is_neither_fetched_nor_carried_nor_taken_for_changed(ear: Ear) -> None:
    pk = Shipment.objects.create(order=Order.objects.create(), weight=Decimal("1.000")).pk
    ear.events()
    with CaptureQueriesContext(connection) as queries:
        shipment = Shipment.objects.only("status").get(pk=pk)
        shipment.status = "sent"
        shipment.save()
    assert not [q for q in queries if q["sql"].startswith("SELECT") and "weight" in q["sql"]]
    event = ear.event()
    assert event.data == {"status": "sent"}
    assert event.changed == ("status",)


def test_a_deferred_field_that_was_assigned_is_not_taken_for_unchanged(ear: Ear) -> None:
    pk = Shipment.objects.create(order=Order.objects.create(), weight=Decimal("1.000")).pk
    ear.events()
    shipment = Shipment.objects.defer("weight").get(pk=pk)
    shipment.weight = Decimal("2.000")
    shipment.save()
    event = ear.event()
    assert event.data["weight"] == "2.000"
    assert event.changed is None or "weight" in event.changed


def test_a_json_value_changed_in_place_is_seen(ear: Ear) -> None:
    profile = Profile.objects.create(settings={"theme": {"color": "dark"}, "tabs": [1]})
    assert ear.event().data["settings"] == {"theme": {"color": "dark"}, "tabs": [1]}
    profile.settings["theme"]["color"] = "light"
    profile.save()
    event = ear.event()
    assert event.changed == ("settings",)
    assert event.data["settings"]["theme"] == {"color": "light"}
    profile.settings["tabs"].append(2)
    profile.save()
    assert ear.event().changed == ("settings",)
    profile.save()
    assert ear.event().changed == ()


def test_an_event_does_not_change_with_the_value_it_was_made_of(ear: Ear) -> None:
    with transaction.atomic():
        profile = Profile.objects.create(settings={"tabs": [1]})
        profile.settings["tabs"].append(2)
    assert ear.event().data["settings"] == {"tabs": [1]}


def test_a_file_is_carried_as_its_name(ear: Ear) -> None:
    profile = Profile.objects.create()
    assert ear.event().data["picture"] == ""
    profile.picture.save("me.png", ContentFile(b"x"))
    event = ear.event()
    assert event.data["picture"] == profile.picture.name
    assert event.data["picture"].startswith("profiles/me")
    assert event.changed == ("picture",)
    profile.save()
    assert ear.event().changed == ()
    profile.picture.delete()
    event = ear.event()
    assert (event.data["picture"] or "", event.changed) == ("", ("picture",))


def test_a_deleted_row_takes_its_last_values_along(ear: Ear) -> None:
    shipment = Shipment.objects.create(order=Order.objects.create(), status="sent")
    ear.events()
    shipment.delete()
    event = ear.event()
    assert event.data["status"] == "sent"
    assert event.changed is None


def test_values_that_cannot_be_read_cost_the_values_not_the_event_and_not_the_save(
    ear: Ear, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    order = Order.objects.create()
    ear.events()
    failed = publishing_stats["publish_failed"]

    def broken(*args: Any) -> dict[str, Any]:
        raise RuntimeError("a field of somebody else's")

    monkeypatch.setattr(changes, "plain_values", broken)
    with caplog.at_level(logging.ERROR, "django_pgnotify.publishing"):
        shipment = Shipment.objects.create(order=order)
    assert Shipment.objects.filter(pk=shipment.pk).exists()
    assert publishing_stats["publish_failed"] == failed + 1
    assert "testapp.Shipment" in caplog.text or "testapp.shipment" in caplog.text
    event = ear.event()
    assert (event.pk, event.action, event.data) == (shipment.pk, "created", {})


# -- keys ------------------------------------------------------------------------------------


def test_a_uuid_arrives_as_a_uuid(ear: Ear) -> None:
    document = Document.objects.create(title="a")
    document.title = "b"
    document.save()
    pk = document.pk
    document.delete()
    events = ear.events()
    assert [event.action for event in events] == ["created", "updated", "deleted"]
    for event in events:
        assert event.pk == pk
        assert type(event.pk) is uuid.UUID
        assert event.key == f"testapp.document:{pk}"
    assert events[1].changed == ("title",)


@pytest.mark.parametrize("code", ["a", "ü/ {x}\"'\\", "1", "null", "x" * 80, "\U0001f600" * 80])
def test_a_text_key_arrives_as_it_is(ear: Ear, code: str) -> None:
    sku = Sku.objects.create(code=code)
    event = ear.event()
    assert event.pk == code
    assert type(event.pk) is str
    assert event.instance() == sku


def test_a_composite_key_arrives_as_a_tuple_of_its_types(ear: Ear) -> None:
    badge = uuid.uuid4()
    membership = Membership.objects.create(team=1, person="ann", badge=badge)
    created = ear.event()
    assert created.pk == (1, "ann", badge)
    assert [type(part) for part in created.pk] == [int, str, uuid.UUID]
    assert created.instance() == membership
    membership.role = "lead"
    membership.save()
    updated = ear.event()
    assert (updated.pk, updated.changed, updated.data) == (
        created.pk, ("role",), {"role": "lead"},
    )  # fmt: skip
    assert updated.key == created.key
    membership.delete()
    deleted = ear.event()
    assert (deleted.action, deleted.pk) == ("deleted", created.pk)
    assert deleted.instance() is None


# -- inheritance -----------------------------------------------------------------------------


def test_a_proxy_stands_for_its_table(ear: Ear) -> None:
    car = Car.objects.create(name="a")
    car.save()
    vehicle = Vehicle.objects.get()
    vehicle.save()
    pk = car.pk
    car.delete()
    events = ear.events()
    assert short(events) == [
        ("testapp.vehicle", action, pk) for action in ("created", "updated", "updated", "deleted")
    ]
    assert {event.topic for event in events} == {"testapp.vehicle"}


def test_a_child_that_is_not_notified_is_a_change_of_its_parent(ear: Ear) -> None:
    bicycle = Bicycle.objects.create(name="a", gears=3)
    pk = bicycle.pk
    assert short(ear.events()) == [("testapp.vehicle", "created", pk)]
    bicycle.name = "b"
    bicycle.save()
    assert short(ear.events()) == [("testapp.vehicle", "updated", pk)]
    bicycle.save(update_fields=["gears"])
    assert ear.events() == []
    bicycle.save(update_fields=["name"])
    assert short(ear.events()) == [("testapp.vehicle", "updated", pk)]
    bicycle.delete()
    assert short(ear.events()) == [("testapp.vehicle", "deleted", pk)]


def test_a_notified_child_of_a_notified_parent_is_a_change_of_both(ear: Ear) -> None:
    sportscar = Sportscar.objects.create(name="a", seats=2)
    pk = sportscar.pk
    both = {"testapp.vehicle", "testapp.sportscar"}

    def heard() -> set[tuple[str | None, str, Any]]:
        events = short(ear.events())
        assert len(events) == len(set(events))
        return set(events)

    assert heard() == {(model, "created", pk) for model in both}
    sportscar.seats = 3
    sportscar.save()
    assert heard() == {(model, "updated", pk) for model in both}
    sportscar.save(update_fields=["seats"])
    assert heard() == {("testapp.sportscar", "updated", pk)}
    sportscar.delete()
    assert heard() == {(model, "deleted", pk) for model in both}


def test_a_parent_saved_as_itself_is_a_change_of_the_parent(ear: Ear) -> None:
    sportscar = Sportscar.objects.create(name="a")
    ear.events()
    Vehicle.objects.get(pk=sportscar.pk).save()
    assert short(ear.events()) == [("testapp.vehicle", "updated", sportscar.pk)]


def test_a_parent_deleted_as_itself_takes_its_child_along(ear: Ear) -> None:
    pk = Sportscar.objects.create(name="a").pk
    ear.events()
    Vehicle.objects.get(pk=pk).delete()
    assert sorted(short(ear.events()), key=str) == [
        ("testapp.sportscar", "deleted", pk), ("testapp.vehicle", "deleted", pk),
    ]  # fmt: skip


def test_a_child_deleted_without_its_parent_is_deleted_alone(ear: Ear) -> None:
    sportscar = Sportscar.objects.create(name="a")
    pk = sportscar.pk
    ear.events()
    sportscar.delete(keep_parents=True)
    assert short(ear.events()) == [("testapp.sportscar", "deleted", pk)]
    assert Vehicle.objects.filter(pk=pk).exists()


def test_a_parent_that_is_not_notified_stays_silent(ear: Ear) -> None:
    restaurant = Restaurant.objects.create(address="a", stars=1)
    pk = restaurant.pk
    restaurant.save()
    assert short(ear.events()) == [
        ("testapp.restaurant", "created", pk), ("testapp.restaurant", "updated", pk),
    ]  # fmt: skip
    place = Place.objects.get(pk=pk)
    place.save()
    assert ear.events() == []
    place.delete()
    assert short(ear.events()) == [("testapp.restaurant", "deleted", pk)]


def test_a_field_of_an_abstract_base_is_a_field(ear: Ear) -> None:
    memo = Memo.objects.create(day=date(2026, 1, 2), text="a")
    assert ear.event().data == {"day": "2026-01-02", "text": "a"}
    memo.day = date(2026, 1, 3)
    memo.save()
    assert ear.event().changed == ("day",)


def test_an_abstract_model_passes_it_on_to_its_concrete_children(ear: Ear) -> None:
    with isolate_apps("tests.testapp"), forgotten_publications():

        @notify_changes(fields=["name"], topic="billing")
        class Named(models.Model):
            name = models.CharField(max_length=20)

            class Meta:
                abstract = True
                app_label = "testapp"

        class Middle(Named):
            class Meta(Named.Meta):
                abstract = True

        class Leaf(Middle):
            class Meta:
                app_label = "testapp"

        @notify_changes(topic="people")
        class Other(Named):
            class Meta:
                app_label = "testapp"

        class LeafProxy(Leaf):
            class Meta:
                app_label = "testapp"
                proxy = True

        assert registry.publications["testapp.leaf"].fields == ("name",)
        assert registry.publications["testapp.other"].topic == "people"
        assert "testapp.named" not in registry.publications
        assert "testapp.leafproxy" not in registry.publications
        with connection.schema_editor() as editor:
            editor.create_model(Leaf)
        try:
            leaf = LeafProxy._default_manager.create(name="a")
            [heard] = ear.frames()
            assert f'"model":"testapp.leaf","pk":{leaf.pk}' in heard.payload
            assert '"data":{"name":"a"}' in heard.payload
            assert ear.topics[heard.channel] == "billing"
        finally:
            with connection.schema_editor() as editor:
                editor.delete_model(Leaf)


# -- options ---------------------------------------------------------------------------------


def test_a_topic_of_its_own_is_heard_there_and_nowhere_else(ear: Ear) -> None:
    invoice = Invoice.objects.create(number="7")
    event = ear.event()
    assert (event.topic, event.model, event.pk) == ("billing", "testapp.invoice", invoice.pk)
    assert event.data == {"number": "7"}


def test_only_the_actions_asked_for_are_published(ear: Ear) -> None:
    audited = Audited.objects.create(name="a")
    audited.save()
    audited.delete()
    assert [event.action for event in ear.events()] == ["created", "deleted"]


def test_the_atomic_tier_notifies_inside_the_writing_transaction(ear: Ear) -> None:
    with transaction.atomic():
        with statements() as ran:
            Urgent.objects.create(name="a")
        assert len(ran.notify) == 1
    assert ear.event().model == "testapp.urgent"
    with pytest.raises(RuntimeError), transaction.atomic():
        Urgent.objects.create(name="b")
        raise RuntimeError
    assert ear.events() == []


def test_the_tier_of_the_settings_is_that_of_models_that_name_none(
    settings: Settings, ear: Ear
) -> None:
    settings.PGNOTIFY_DELIVERY = "atomic"
    with transaction.atomic():
        with statements() as ran:
            Order.objects.create()
        assert len(ran.notify) == 1
    assert ear.event().action == "created"


def test_a_model_of_another_app_publishes_as_its_setting_says(ear: Ear) -> None:
    user = User.objects.create_user("ann", password="s3cret")
    user.is_active = False
    user.save()
    user.save(update_fields=["last_login"])
    events = ear.events()
    assert {(event.topic, event.model) for event in events} == {("people", "auth.user")}
    assert [(event.action, event.changed) for event in events] == [
        ("created", None), ("updated", ("is_active",)), ("updated", ()),
    ]  # fmt: skip
    assert events[1].data == {"username": "ann", "is_active": False}
    assert events[0].instance() == user


def test_a_model_that_is_not_notified_costs_nothing(ear: Ear) -> None:
    with statements() as ran:
        Session.objects.create(session_key="a", expire_date=datetime.now(UTC))
        Session.objects.all().delete()
    assert ran.notify == []
    # The delete is still Django's fast one: no row is read for it.
    assert not [one for one in ran.all if one.startswith("SELECT")]


# -- raw -------------------------------------------------------------------------------------


@pytest.fixture
def fixture_file(tmp_path: Path) -> Path:
    path = tmp_path / "orders.json"
    rows = [
        {"model": "testapp.order", "pk": 77, "fields": {"status": "paid"}},
        {"model": "testapp.sportscar", "pk": 5, "fields": {"seats": 2}},
        {"model": "testapp.vehicle", "pk": 5, "fields": {"name": "a"}},
    ]
    path.write_text(json.dumps(rows))
    return path


def test_fixtures_are_not_published_by_default(ear: Ear, fixture_file: Path) -> None:
    call_command("loaddata", str(fixture_file), verbosity=0)
    assert Order.objects.filter(pk=77).exists()
    assert ear.events() == []


def test_fixtures_are_published_where_the_setting_says_so(
    settings: Settings, ear: Ear, fixture_file: Path
) -> None:
    settings.PGNOTIFY_PUBLISH_RAW = True
    call_command("loaddata", str(fixture_file), verbosity=0)
    assert ("testapp.order", "created", 77) in short(ear.events())


# -- migrations ------------------------------------------------------------------------------


@pytest.mark.parametrize("delivery", ["after_commit", "atomic", "durable"])
def test_a_data_migration_publishes_nothing_and_writes_nothing_to_the_event_log(
    settings: Settings, ear: Ear, delivery: str
) -> None:
    """The log may be the work of a migration that is still to come."""
    settings.PGNOTIFY_DELIVERY = delivery
    historical: Any = ProjectState.from_apps(apps).apps
    model = historical.get_model("testapp", "Order")
    assert model is not Order
    order = model.objects.create(status="new")
    order.status = "paid"
    order.save()
    order.delete()
    article = historical.get_model("testapp", "Article").objects.create(title="a")
    article.tags.create(name="t")
    historical.get_model("testapp", "Sportscar").objects.create(name="a", seats=2)
    assert ear.frames() == []
    assert LoggedEvent.objects.count() == 0


# -- no_notify -------------------------------------------------------------------------------


def test_nothing_is_published_inside_no_notify(ear: Ear) -> None:
    with no_notify():
        order = Order.objects.create()
        order.save()
        with no_notify():
            order.save()
        order.save()
    assert ear.events() == []
    order.save()
    assert ear.event().action == "updated"


def test_no_notify_ends_with_its_block_however_that_ends(ear: Ear) -> None:
    with pytest.raises(RuntimeError), no_notify():
        raise RuntimeError
    Order.objects.create()
    assert ear.event().action == "created"


def test_what_was_saved_before_no_notify_leaves_though_it_is_committed_inside(ear: Ear) -> None:
    with transaction.atomic():
        Order.objects.create(note="loud")
        with no_notify():
            Order.objects.create(note="quiet")
    assert ear.event().instance().note == "loud"


def test_no_notify_decorates_a_function_and_keeps_it_what_it_is(ear: Ear) -> None:
    @no_notify()
    def import_orders(number: int, *, status: str) -> int:
        """Docstring."""
        for _ in range(number):
            Order.objects.create(status=status)
        return number

    assert import_orders(2, status="new") == 2
    assert import_orders(1, status="new") == 1
    assert (import_orders.__name__, import_orders.__doc__) == ("import_orders", "Docstring.")
    assert ear.events() == []
    assert Order.objects.count() == 3


async def test_no_notify_holds_in_its_task_and_in_no_other() -> None:
    ear = await sync_to_async(Ear)("default", ("testapp.sku",))
    inside, outside = asyncio.Event(), asyncio.Event()

    @no_notify()
    async def quiet() -> None:
        await Sku.objects.acreate(code="quiet 1")
        inside.set()
        await outside.wait()
        await Sku.objects.acreate(code="quiet 2")

    async def loud() -> None:
        await inside.wait()
        await Sku.objects.acreate(code="loud")
        outside.set()

    try:
        assert asyncio.iscoroutinefunction(quiet)
        await asyncio.gather(quiet(), loud())
        with no_notify():
            await Sku.objects.acreate(code="quiet 3")
        events = await sync_to_async(ear.events)()
    finally:
        ear.close()
    assert [event.pk for event in events] == ["loud"]


def test_no_notify_holds_in_its_thread_and_in_no_other(ear: Ear) -> None:
    def save() -> None:
        try:
            Sku.objects.create(code="loud")
        finally:
            connection.close()

    with no_notify():
        thread = threading.Thread(target=save)
        thread.start()
        thread.join(30)
    assert ear.event().pk == "loud"


# -- another database ------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True, databases=["default", "lite"])
def test_a_row_on_another_engine_is_saved_and_its_silence_is_logged_once(
    ear: Ear, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "_unsupported", set())
    with caplog.at_level(logging.ERROR, "django_pgnotify.publishing"):
        for _ in range(3):
            Order.objects.using("lite").create()
        with transaction.atomic("lite"):
            Order.objects.using("lite").create()
    assert Order.objects.using("lite").count() == 4
    assert ear.events() == []
    messages = [one.getMessage() for one in caplog.records if "lite" in one.getMessage()]
    assert len(messages) == 1
    assert "sqlite" in messages[0]
