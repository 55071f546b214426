"""The commit buffer: events follow their savepoint, keep their order, leave in few statements."""

# ruff: noqa: PT012  a block that is rolled back is more than one statement

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction
from django.test import TestCase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytest_django import DjangoCaptureOnCommitCallbacks

from django_pgnotify import publish
from django_pgnotify.publishing.buffer import pending
from django_pgnotify.publishing.sender import transport_in_use
from django_pgnotify.stats import publishing_stats
from django_pgnotify.wire import Outgoing
from tests.integration.hearing import (
    Ear,
    before_anything_else,
    by_hook,
    hearing,
    statements,
    terminate_own_backend,
)
from tests.testapp.models import Order

HANDFUL = 5

committing = pytest.mark.django_db(transaction=True)


@pytest.fixture
def ear() -> Iterator[Ear]:
    with hearing("jobs", "others", "testapp.order") as one:
        yield one


class Undo(Exception):
    pass


def rolled_back() -> Any:
    """A savepoint whose block is undone."""
    return pytest.raises(Undo)


# -- savepoints ------------------------------------------------------------------------------


@committing
def test_an_event_of_a_savepoint_that_rolls_back_vanishes_and_the_others_do_not(ear: Ear) -> None:
    with transaction.atomic():
        publish("jobs", 1)
        with rolled_back(), transaction.atomic():
            publish("jobs", 2)
            raise Undo
        publish("jobs", 3)
        with transaction.atomic():
            publish("jobs", 4)
        publish("jobs", 5)
    assert ear.data() == [1, 3, 4, 5]


@committing
def test_a_savepoint_takes_those_within_it_along(ear: Ear) -> None:
    with transaction.atomic():
        publish("jobs", 1)
        with rolled_back(), transaction.atomic():
            publish("jobs", 2)
            with transaction.atomic():
                publish("jobs", 3)
                with transaction.atomic():
                    publish("jobs", 4)
            publish("jobs", 5)
            raise Undo
        publish("jobs", 6)
    assert ear.data() == [1, 6]


@committing
def test_a_savepoint_inside_that_rolls_back_leaves_the_one_around_it_alone(ear: Ear) -> None:
    with transaction.atomic(), transaction.atomic():
        publish("jobs", 1)
        with rolled_back(), transaction.atomic():
            publish("jobs", 2)
            raise Undo
        publish("jobs", 3)
    assert ear.data() == [1, 3]


@committing
def test_a_first_event_that_vanishes_does_not_take_the_later_ones_along(ear: Ear) -> None:
    with transaction.atomic():
        with rolled_back(), transaction.atomic():
            publish("jobs", 1)
            raise Undo
        publish("jobs", 2)
    assert ear.data() == [2]


@committing
def test_a_last_event_that_vanishes_does_not_keep_the_earlier_ones_back(ear: Ear) -> None:
    with transaction.atomic():
        publish("jobs", 1)
        with rolled_back(), transaction.atomic():
            publish("jobs", 2)
            raise Undo
    assert ear.data() == [1]


@committing
def test_a_block_without_a_savepoint_of_its_own_goes_with_its_transaction(ear: Ear) -> None:
    with transaction.atomic():
        publish("jobs", 1)
        with transaction.atomic(savepoint=False):
            publish("jobs", 2)
        with transaction.atomic(savepoint=False):
            publish("jobs", 3)
    assert ear.data() == [1, 2, 3]
    with rolled_back(), transaction.atomic():
        publish("jobs", 4)
        with transaction.atomic(savepoint=False):
            publish("jobs", 5)
            raise Undo
    assert ear.events() == []


@committing
def test_an_integrity_error_caught_around_a_savepoint_loses_only_what_was_in_it(ear: Ear) -> None:
    with transaction.atomic():
        publish("jobs", 1)
        with pytest.raises(DatabaseError), transaction.atomic():
            publish("jobs", 2)
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1/0")
        publish("jobs", 3)
    assert ear.data() == [1, 3]


@committing
def test_after_a_full_rollback_the_next_transaction_sends_only_its_own(ear: Ear) -> None:
    for _ in range(3):
        with rolled_back(), transaction.atomic():
            publish("jobs", "lost")
            with transaction.atomic():
                publish("jobs", "lost too")
            raise Undo
        assert pending(connection) == []
    with transaction.atomic():
        publish("jobs", "kept")
    publish("jobs", "at once")
    assert ear.data() == ["kept", "at once"]


step: st.SearchStrategy[Any] = st.deferred(
    lambda: (
        st.tuples(st.just("publish"), st.sampled_from(["jobs", "others"]))
        | st.tuples(st.sampled_from(["keep", "undo", "join"]), st.lists(step, max_size=4))
        | st.tuples(st.just("hook"), st.just("jobs"))
    )
)


@committing
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(step, max_size=8), commit=st.booleans())
def test_whatever_the_nesting_exactly_the_kept_events_leave_in_order(
    ear: Ear, steps: list[Any], commit: bool
) -> None:
    """Against the simplest model: one commit hook of Django's own for each event.

    What a hook publishes, it publishes after the commit: behind all of the transaction's own.
    """
    expected: list[tuple[str, int]] = []
    by_hooks: list[tuple[str, int]] = []
    count = 0

    def run(steps: list[Any]) -> None:
        nonlocal count
        for kind, what in steps:
            count += 1
            number = count
            if kind == "publish":
                publish(what, number)
                transaction.on_commit(partial(expected.append, (what, number)))
            elif kind == "hook":

                def hook(number: int = number) -> None:
                    publish("jobs", -number)
                    by_hooks.append(("jobs", -number))

                transaction.on_commit(hook)
            elif kind == "undo":
                with rolled_back(), transaction.atomic():
                    run(what)
                    raise Undo
            else:
                with transaction.atomic(savepoint=kind == "keep"):
                    run(what)

    with nullcontext() if commit else rolled_back(), transaction.atomic():
        run(steps)
        if not commit:
            raise Undo
    events = ear.events()
    for topic in ("jobs", "others"):
        assert [event.data for event in events if event.topic == topic] == [
            number for chosen, number in expected + by_hooks if chosen == topic
        ]


# -- few statements --------------------------------------------------------------------------


@committing
@pytest.mark.parametrize("savepoint", [None, True, False], ids=["plain", "savepoint", "joined"])
def test_a_thousand_saves_in_one_transaction_leave_in_a_handful_of_statements(
    ear: Ear, savepoint: bool | None
) -> None:
    with statements() as ran, transaction.atomic():
        for number in range(1000):
            with nullcontext() if savepoint is None else transaction.atomic(savepoint=savepoint):
                Order.objects.create(note=str(number))
    assert 1 <= len(ran.notify) <= HANDFUL
    events = ear.events()
    assert [event.pk for event in events] == list(
        Order.objects.order_by("pk").values_list("pk", flat=True)
    )
    assert len(events) == 1000


@committing
def test_a_thousand_nested_blocks_of_which_half_roll_back_leave_in_a_handful_of_statements(
    ear: Ear,
) -> None:
    with statements() as ran, transaction.atomic():
        for number in range(1000):
            with nullcontext() if number % 2 else rolled_back(), transaction.atomic():
                publish("jobs", number)
                if number % 2 == 0:
                    raise Undo
    assert 1 <= len(ran.notify) <= HANDFUL
    assert ear.data() == list(range(1, 1000, 2))


@committing
def test_a_thousand_deep_and_shallow_blocks_leave_in_a_handful_of_statements(ear: Ear) -> None:
    def nest(level: int) -> None:
        publish("jobs", level)
        if level < 100:
            with transaction.atomic():
                nest(level + 1)
        publish("jobs", -level)

    with statements() as ran, transaction.atomic():
        nest(0)
    assert 1 <= len(ran.notify) <= HANDFUL
    assert ear.data() == [*range(101), *range(-100, 1)]


@committing
def test_ten_thousand_events_are_not_quadratic_in_hooks(ear: Ear) -> None:
    with transaction.atomic():
        for number in range(10_000):
            publish("jobs", number)
        assert len(connection.run_on_commit) < 10
    assert ear.data() == list(range(10_000))


@committing
def test_topics_that_alternate_still_share_statements(ear: Ear) -> None:
    with statements() as ran, transaction.atomic():
        for number in range(500):
            publish("jobs", number)
            publish("others", number)
    assert 1 <= len(ran.notify) <= HANDFUL
    events = ear.events()
    for topic in ("jobs", "others"):
        assert [event.data for event in events if event.topic == topic] == list(range(500))


@committing
def test_one_key_on_two_topics_leaves_in_the_order_it_was_published(ear: Ear) -> None:
    topics = [("jobs", "others")[number % 2] for number in range(20)]
    with transaction.atomic():
        for number, topic in enumerate(topics):
            publish(topic, number, key="k")
    assert [(event.topic, event.data) for event in ear.events()] == list(
        zip(topics, range(20), strict=True)
    )


# -- commit hooks ----------------------------------------------------------------------------


@committing
def test_a_commit_hook_that_publishes_does_not_overtake_the_transaction(ear: Ear) -> None:
    with transaction.atomic():
        transaction.on_commit(lambda: publish("jobs", "hook before"))
        publish("jobs", 1)
        transaction.on_commit(lambda: publish("jobs", "hook between"))
        publish("jobs", 2)
        transaction.on_commit(lambda: publish("jobs", "hook behind"))
    assert ear.data() == [1, 2, "hook before", "hook between", "hook behind"]


@committing
def test_a_transaction_inside_a_commit_hook_sends_its_own(ear: Ear) -> None:
    def hook() -> None:
        with transaction.atomic():
            publish("jobs", "inner")
            with rolled_back(), transaction.atomic():
                publish("jobs", "lost")
                raise Undo
            transaction.on_commit(lambda: publish("jobs", "hook of the hook"))
        publish("jobs", "behind inner")
        with rolled_back(), transaction.atomic():
            publish("jobs", "lost too")
            raise Undo

    with transaction.atomic():
        publish("jobs", 1)
        transaction.on_commit(hook)
        publish("jobs", 2)
    assert ear.data() == [1, 2, "inner", "hook of the hook", "behind inner"]


@committing
def test_a_commit_hook_that_saves_is_an_event_of_its_own(ear: Ear) -> None:
    with transaction.atomic():
        order = Order.objects.create()
        transaction.on_commit(lambda: Order.objects.get().save())
    assert [(event.action, event.pk) for event in ear.events()] == [
        ("created", order.pk), ("updated", order.pk),
    ]  # fmt: skip


@committing
def test_a_commit_hook_that_raises_does_not_keep_back_what_was_published_before_it(
    ear: Ear,
) -> None:
    def hook() -> None:
        raise Undo

    with rolled_back(), transaction.atomic():
        publish("jobs", 1)
        transaction.on_commit(hook)
    assert ear.data() == [1]
    with rolled_back(), transaction.atomic():
        publish("jobs", 2)
        transaction.on_commit(hook)
        publish("jobs", 3)  # Django runs no hook behind one that raised
    assert ear.data()[:1] == [2]


@committing
def test_what_a_raising_hook_cut_off_does_not_turn_up_in_a_later_transaction(ear: Ear) -> None:
    def hook() -> None:
        raise Undo

    with rolled_back(), transaction.atomic():
        publish("jobs", 1)
        transaction.on_commit(hook)
        publish("jobs", 2)
    at_once = ear.data()
    with transaction.atomic():
        publish("jobs", "later")
    assert ear.data() == ["later"]
    assert at_once in ([1], [1, 2])


@committing
def test_a_robust_hook_that_raises_keeps_nothing_back(ear: Ear) -> None:
    def hook() -> None:
        raise Undo

    with transaction.atomic():
        publish("jobs", 1)
        transaction.on_commit(hook, robust=True)
        publish("jobs", 2)
    assert ear.data() == [1, 2]


# -- failures --------------------------------------------------------------------------------


class Failing:
    def send(self, events: Any, using: str) -> None:
        raise DatabaseError("could not be sent")


@committing
def test_a_failing_flush_does_not_break_the_save_or_the_next_flush(
    ear: Ear, caplog: pytest.LogCaptureFixture
) -> None:
    failed = publishing_stats["publish_failed"]
    ran = []
    with caplog.at_level(logging.ERROR, "django_pgnotify.publishing"):
        with transport_in_use(Failing()), transaction.atomic():
            order = Order.objects.create()
            publish("jobs", 1)
            transaction.on_commit(lambda: ran.append(True))
        assert ran == [True]
        order.save()
    assert publishing_stats["publish_failed"] == failed + 2
    assert "could not be sent" in caplog.text
    assert [event.action for event in ear.events()] == ["updated"]


@committing
def test_a_connection_that_dies_between_commit_and_flush_costs_the_events_not_the_save(
    ear: Ear, caplog: pytest.LogCaptureFixture
) -> None:
    failed = publishing_stats["publish_failed"]
    try:
        with (
            caplog.at_level(logging.ERROR, "django_pgnotify.publishing"),
            by_hook(),
            transaction.atomic(),
        ):
            Order.objects.create(note="s3cret-payload")
            before_anything_else(terminate_own_backend)
    finally:
        connection.close()
    assert publishing_stats["publish_failed"] == failed + 1
    assert Order.objects.count() == 1
    assert "s3cret-payload" not in caplog.text
    assert ear.events() == []
    with transaction.atomic():
        Order.objects.create()
    assert [event.action for event in ear.events()] == ["created"]


@committing
def test_a_connection_that_dies_inside_a_transaction_leaves_nothing_behind(ear: Ear) -> None:
    try:
        with pytest.raises(DatabaseError), transaction.atomic():
            publish("jobs", "lost")
            terminate_own_backend()
            Order.objects.count()
    finally:
        connection.close()
    with transaction.atomic():
        publish("jobs", "kept")
    assert ear.data() == ["kept"]


@committing
def test_a_closed_connection_forgets_what_it_never_committed(ear: Ear) -> None:
    with transaction.atomic():
        publish("jobs", "lost")
        transaction.set_rollback(True)
    connection.close()
    publish("jobs", "kept")
    assert ear.data() == ["kept"]


# -- by hand ---------------------------------------------------------------------------------


@committing
def test_atomic_blocks_without_autocommit_follow_the_commit_by_hand(ear: Ear) -> None:
    transaction.set_autocommit(False)
    try:
        with transaction.atomic():
            publish("jobs", 1)
            with rolled_back(), transaction.atomic():
                publish("jobs", 2)
                raise Undo
        assert ear.events() == []
        transaction.commit()
    finally:
        transaction.set_autocommit(True)
    assert ear.data() == [1]


@committing
def test_atomic_blocks_without_autocommit_follow_the_rollback_by_hand(ear: Ear) -> None:
    transaction.set_autocommit(False)
    try:
        with transaction.atomic():
            publish("jobs", 1)
        transaction.rollback()
    finally:
        transaction.set_autocommit(True)
    publish("jobs", 2)
    assert ear.data() == [2]


# -- inside TestCase -------------------------------------------------------------------------


class Recording:
    def __init__(self) -> None:
        self.sent: list[Outgoing] = []
        self.times = 0

    def send(self, events: Any, using: str) -> None:
        self.times += 1
        self.sent += events

    @property
    def topics(self) -> list[str]:
        return [event.topic for event in self.sent]


@pytest.mark.django_db
def test_in_a_test_that_never_commits_nothing_leaves(
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    with transport_in_use(recording := Recording()):
        publish("outside", 1)
        assert recording.sent == []
        with django_capture_on_commit_callbacks() as callbacks:
            publish("captured", 1)
        assert recording.sent == []
        for callback in callbacks:
            callback()
    assert recording.topics == ["captured"]


@pytest.mark.django_db
@pytest.mark.parametrize("rounds", [1, 3])
def test_callbacks_that_a_test_executes_send_what_was_published_inside(
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks, rounds: int
) -> None:
    with transport_in_use(recording := Recording()):
        for number in range(rounds):
            publish("before", number)
            with django_capture_on_commit_callbacks(execute=True):
                publish(f"a{number}", 1)
                with transaction.atomic():
                    publish(f"b{number}", 1)
                with rolled_back(), transaction.atomic():
                    publish("lost", 1)
                    raise Undo
                transaction.on_commit(lambda number=number: publish(f"hook{number}", 1))
            assert recording.topics[-3:] == [f"a{number}", f"b{number}", f"hook{number}"]
    assert len(recording.sent) == 3 * rounds


class InATestCase(TestCase):
    @classmethod
    def setUpTestData(cls) -> None:
        Order.objects.create(note="of the class")

    def test_callbacks_are_captured_and_executed(self) -> None:
        with transport_in_use(recording := Recording()):
            with self.captureOnCommitCallbacks(execute=True) as callbacks:
                Order.objects.create()
                Order.objects.create()
                assert recording.sent == []
            assert recording.topics == ["testapp.order"] * 2
            assert callbacks
            with self.captureOnCommitCallbacks(execute=True):
                publish("jobs", 1)
            assert recording.topics[2:] == ["jobs"]

    def test_callbacks_that_are_not_executed_send_nothing(self) -> None:
        with transport_in_use(recording := Recording()):
            with self.captureOnCommitCallbacks():
                Order.objects.create()
            with self.captureOnCommitCallbacks(execute=True):
                publish("jobs", 1)
        assert recording.topics == ["jobs"]
