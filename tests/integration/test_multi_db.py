"""Several databases: an event follows the transaction of its row, and leaves where it is told."""

# ruff: noqa: PT012  a block that is rolled back is more than one statement

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import transaction
from pytest_django import Settings

from django_pgnotify import apublish, publish
from django_pgnotify.exceptions import UnsupportedDatabase
from django_pgnotify.models import StoredEvent
from django_pgnotify.publishing import handlers
from django_pgnotify.registry import registry
from django_pgnotify.testing import running_listener
from tests.integration.hearing import Ear, hearing, statements
from tests.testapp.models import Order, Remote, Sku

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

TOPICS = ("jobs", "testapp.order", "testapp.remote", "testapp.sku")


@pytest.fixture
def here() -> Iterator[Ear]:
    with hearing(*TOPICS) as one:
        yield one


@pytest.fixture
def there() -> Iterator[Ear]:
    with hearing(*TOPICS, using="other") as one:
        yield one


class Undo(Exception):
    pass


def test_an_event_is_heard_on_the_database_it_is_published_on(here: Ear, there: Ear) -> None:
    publish("jobs", 1)
    publish("jobs", 2, using="other")
    assert (here.data(), there.data()) == ([1], [2])


async def test_apublish_takes_an_alias_too() -> None:
    there = await sync_to_async(Ear)("other", TOPICS)
    try:
        await apublish("jobs", 1, using="other")
        assert await sync_to_async(there.data)() == [1]
    finally:
        there.close()


def test_the_setting_names_the_database_that_publish_uses(
    settings: Settings, here: Ear, there: Ear
) -> None:
    settings.PGNOTIFY_DATABASE = "other"
    publish("jobs", 1)
    publish("jobs", 2, using="default")
    assert (here.data(), there.data()) == ([2], [1])


def test_a_row_is_heard_on_the_database_it_was_saved_on(here: Ear, there: Ear) -> None:
    remote = Remote.objects.create(name="a")
    order = Order.objects.using("other").create()
    assert here.events() == []
    events = there.events()
    assert [(event.model, event.pk) for event in events] == [
        ("testapp.remote", remote.pk), ("testapp.order", order.pk),
    ]  # fmt: skip
    assert events[0].using == "other"
    assert events[1].instance() == order
    assert events[1].instance(using="default") is None


def test_an_event_waits_for_the_transaction_of_its_own_database(here: Ear, there: Ear) -> None:
    with transaction.atomic("default"):
        publish("jobs", "at once", using="other")
        Remote.objects.create(name="a")
        assert [event.action for event in there.events()] == ["published", "created"]
        publish("jobs", "later")
        with transaction.atomic("other"):
            publish("jobs", "with other", using="other")
            assert there.events() == []
        assert there.data() == ["with other"]
        assert here.events() == []
    assert here.data() == ["later"]


@pytest.mark.parametrize("lost", ["default", "other"])
def test_a_rollback_on_one_database_leaves_the_other_one_alone(
    here: Ear, there: Ear, lost: str
) -> None:
    kept = "other" if lost == "default" else "default"
    with transaction.atomic(kept), pytest.raises(Undo), transaction.atomic(lost):
        publish("jobs", 1, using="default")
        publish("jobs", 2, using="other")
        raise Undo
    assert here.data() == ([] if lost == "default" else [1])
    assert there.data() == ([] if lost == "other" else [2])


@contextmanager
def published_on(label: str, using: str, **options: Any) -> Iterator[None]:
    before = registry.publications[label]
    registry.publications[label] = replace(before, using=using, **options)
    try:
        yield
    finally:
        registry.publications[label] = before


@pytest.mark.parametrize("delivery", ["after_commit", "atomic"])
def test_a_model_that_publishes_elsewhere_follows_the_transaction_of_its_row(
    here: Ear, there: Ear, delivery: str
) -> None:
    """No tier can be atomic across two databases; the row's commit decides."""
    with published_on("testapp.order", "other", delivery=delivery):
        with pytest.raises(Undo), transaction.atomic():
            Order.objects.create()
            raise Undo
        with transaction.atomic():
            order = Order.objects.create()
            with pytest.raises(Undo), transaction.atomic():
                Order.objects.create()
                raise Undo
            assert there.events() == []
    assert here.events() == []
    assert [event.pk for event in there.events()] == [order.pk]


def test_events_for_two_databases_in_one_transaction_keep_their_order(
    here: Ear, there: Ear
) -> None:
    with published_on("testapp.order", "other"), transaction.atomic():
        pks = []
        for number in range(3):
            publish("jobs", number)
            pks.append(Order.objects.create().pk)
    assert here.data() == [0, 1, 2]
    assert [event.pk for event in there.events()] == pks


def test_a_row_that_stands_for_a_big_event_is_on_the_database_that_tells_of_it(
    there: Ear,
) -> None:
    publish("jobs", "x" * 10_000, using="other")
    assert there.data() == ["x" * 10_000]
    assert StoredEvent.objects.using("other").count() == 1
    assert StoredEvent.objects.using("default").count() == 0


def test_each_database_gets_statements_of_its_own(here: Ear, there: Ear) -> None:
    with statements("default") as one, statements("other") as two:
        publish("jobs", 1, using="other")
    assert one.all == []
    assert len(two.notify) == 1


@pytest.mark.parametrize("alias", ["lite", "nowhere"])
def test_an_alias_without_notify_is_refused_by_name(settings: Settings, alias: str) -> None:
    with pytest.raises(UnsupportedDatabase, match=f"'{alias}'"):
        publish("jobs", 1, using=alias)
    settings.PGNOTIFY_DATABASE = alias
    with pytest.raises(UnsupportedDatabase, match=f"'{alias}'"):
        publish("jobs", 1)


def test_a_model_that_publishes_on_a_wrong_alias_is_saved_and_each_such_model_is_reported(
    here: Ear, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "_unsupported", set())
    with published_on("testapp.order", "nowhere"), published_on("testapp.sku", "nohow"):
        for number in range(3):
            Order.objects.create()
            Sku.objects.create(code=str(number))
    assert (Order.objects.count(), Sku.objects.count()) == (3, 3)
    assert here.events() == []
    errors = [one for one in caplog.records if one.levelname == "ERROR"]
    assert len(errors) == 2
    assert "'nowhere'" in errors[0].getMessage()
    assert "'nohow'" in errors[1].getMessage()


def test_a_listener_of_another_database_hears_that_one_only() -> None:
    with running_listener(topics=["jobs", "testapp.remote"], using="other") as listener:
        publish("jobs", "not heard")
        publish("jobs", 1, using="other")
        remote = Remote.objects.create(name="a")
        publish("jobs", "x" * 10_000, using="other")
        events = listener.wait_for(3)
    assert [event.data for event in events] == [1, {}, "x" * 10_000]
    assert events[1].using == "other"
    assert events[1].instance() == remote
