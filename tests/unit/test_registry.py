"""Receivers and publishing models: refused when they are written wrong, and registered once."""

from __future__ import annotations

import functools
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import models
from django.test.utils import isolate_apps

from django_pgnotify import Event, Topic, notify_changes, receiver
from django_pgnotify.exceptions import (
    DuplicateReceiver,
    InvalidAction,
    InvalidArgument,
    InvalidDelivery,
    InvalidFields,
    InvalidReceiver,
    InvalidTopic,
)
from django_pgnotify.registry import (
    Receiver,
    Registry,
    Subscription,
    accepts,
    check_signature,
    describe,
    model_label,
    registry,
)
from tests.testapp.models import Article, Car, Invoice, Order, Place, Restaurant, Tag, Vehicle


@pytest.fixture(autouse=True)
def fresh() -> Iterator[Registry]:
    with registry.isolated() as one:
        yield one


def only() -> Receiver:
    [one] = registry.receivers
    return one


# -- what may be registered ------------------------------------------------------------------


def takes_one(event: Event) -> None: ...
def takes_defaults(event: Event, verbose: bool = False, *rest: int, **more: int) -> None: ...
def takes_anything(*args: Any) -> None: ...
async def takes_one_async(event: Event) -> None: ...


class Called:
    def __call__(self, event: Event) -> None: ...

    def method(self, event: Event) -> None: ...

    @classmethod
    def of_class(cls, event: Event) -> None: ...

    @staticmethod
    def static(event: Event) -> None: ...


class CalledAsync:
    async def __call__(self, event: Event) -> None: ...


GOOD: list[Any] = [
    takes_one,
    takes_defaults,
    takes_anything,
    takes_one_async,
    lambda event: None,
    Called(),
    CalledAsync(),
    Called().method,
    Called.of_class,
    Called.static,
    functools.partial(takes_defaults, verbose=True),
    functools.partial(takes_one_async),
    print,
]


@pytest.mark.parametrize("func", GOOD, ids=describe)
def test_whatever_can_be_called_with_one_event_is_a_receiver(func: Any) -> None:
    assert receiver("jobs")(func) is func
    assert only().func is func


@pytest.mark.parametrize(
    ("func", "is_async"),
    [
        (takes_one, False),
        (takes_one_async, True),
        (Called(), False),
        (CalledAsync(), True),
        (functools.partial(takes_one_async), True),
    ],
)
def test_an_async_receiver_is_recognised_however_it_is_written(func: Any, is_async: bool) -> None:
    receiver("jobs")(func)
    assert only().is_async is is_async


def takes_none() -> None: ...
def takes_two(event: Event, other: int) -> None: ...
def takes_a_keyword(*, event: Event) -> None: ...
def takes_a_keyword_more(event: Event, *, other: int) -> None: ...
async def takes_two_async(event: Event, other: int) -> None: ...
def generates(event: Event) -> Iterator[int]:
    yield 1


async def generates_async(event: Event) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    "func",
    [takes_none, takes_two, takes_a_keyword, takes_a_keyword_more, takes_two_async],
    ids=describe,
)
def test_a_receiver_of_the_wrong_signature_is_refused_by_name(func: Any) -> None:
    with pytest.raises(InvalidReceiver) as caught:
        receiver("jobs")(func)
    assert describe(func) in str(caught.value)
    assert "one event" in str(caught.value)
    assert registry.receivers == []


@pytest.mark.parametrize("func", [generates, generates_async, Called, Event], ids=describe)
def test_what_would_never_run_is_refused(func: Any) -> None:
    with pytest.raises(InvalidReceiver, match=func.__name__):
        receiver("jobs")(func)
    assert registry.receivers == []


@pytest.mark.parametrize("func", [None, 7, "takes_one", []])
def test_what_is_no_function_is_refused(func: Any) -> None:
    with pytest.raises(InvalidReceiver, match="function of one event"):
        check_signature(func)


# -- options ---------------------------------------------------------------------------------


def test_a_decorator_without_a_source_says_what_to_write() -> None:
    with pytest.raises(InvalidTopic, match=r"above .*takes_one has no source: write @receiver\(so"):
        receiver(takes_one)
    with pytest.raises(InvalidTopic, match=r"write @receiver\(source\)"):
        receiver(takes_one_async)
    assert registry.receivers == []


@pytest.mark.parametrize("source", [None, 7, "", " ", b"jobs", "a\x00b", [], ["jobs", ""], [None]])
def test_a_bad_source_is_refused_before_anything_is_registered(source: Any) -> None:
    with pytest.raises(InvalidTopic):
        receiver(source)(takes_one)
    assert registry.receivers == []


@pytest.mark.parametrize("actions", [["create"], "created", [], [7]])
def test_a_bad_action_is_refused(actions: Any) -> None:
    with pytest.raises(InvalidAction):
        receiver("jobs", actions=actions)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "4", None, True])
def test_a_bad_concurrency_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidReceiver, match="concurrency="):
        receiver("jobs", concurrency=bad)


@pytest.mark.parametrize("bad", [-1, 1.5, "4", None, False])
def test_a_bad_number_of_retries_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidReceiver, match="retries="):
        receiver("jobs", retries=bad)


@pytest.mark.parametrize("bad", [0, -1, "5", True, []])
def test_a_bad_timeout_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidReceiver, match="timeout="):
        receiver("jobs", timeout=bad)(takes_one_async)


def test_a_timeout_of_a_receiver_that_nobody_can_cancel_is_refused() -> None:
    with pytest.raises(InvalidReceiver, match="timeout="):
        receiver("jobs", timeout=5)(takes_one)
    receiver("jobs", timeout=5)(takes_one_async)
    assert only().timeout == 5


@pytest.mark.parametrize("bad", ["", 7, []])
def test_a_bad_dispatch_uid_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidReceiver, match="dispatch_uid="):
        receiver("jobs", dispatch_uid=bad)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="every_nodes"):
        receiver("jobs", every_nodes=True)  # type: ignore[call-arg]


def test_options_arrive_as_they_were_given() -> None:
    receiver(
        "jobs",
        actions=["published", "gap"],
        every_node=True,
        concurrency=4,
        retries=3,
        dispatch_uid="mine",
    )(takes_one)
    one = only()
    assert (one.uid, one.concurrency, one.retries, one.every_node) == ("mine", 4, 3, True)
    assert one.actions == {"published", "gap"}


def test_whoever_asks_for_the_action_gap_is_told_of_gaps() -> None:
    receiver("jobs", actions=["gap"], dispatch_uid="a")(takes_one)
    receiver("jobs", on_gap=True, dispatch_uid="b")(takes_one)
    receiver("jobs", dispatch_uid="c")(takes_one)
    assert [one.on_gap for one in registry.receivers] == [True, True, False]


# -- identity --------------------------------------------------------------------------------


def test_the_same_dispatch_uid_twice_is_refused_and_both_are_named() -> None:
    receiver("jobs", dispatch_uid="mine")(takes_one)
    with pytest.raises(DuplicateReceiver) as caught:
        receiver("others", dispatch_uid="mine")(takes_one_async)
    assert "'mine'" in str(caught.value)
    assert describe(takes_one) in str(caught.value)
    assert describe(takes_one_async) in str(caught.value)
    assert only().func is takes_one


def test_the_same_function_for_the_same_source_is_registered_once() -> None:
    for _ in range(3):
        receiver("jobs")(takes_one)
    assert len(registry.receivers) == 1


def test_one_function_may_receive_several_sources() -> None:
    receiver("jobs")(takes_one)
    receiver("others")(takes_one)
    receiver(["jobs", "others"])(takes_one)
    assert len({one.uid for one in registry.receivers}) == 3


def test_two_functions_of_one_name_are_two_receivers() -> None:
    def make(number: int) -> Any:
        def work(event: Event) -> int:
            return number

        return work

    first, second = make(1), make(2)
    receiver("jobs")(first)
    receiver("jobs")(second)
    assert [one.func for one in registry.receivers] == [first, second]
    assert len({one.uid for one in registry.receivers}) == 2


def test_receivers_keep_the_order_in_which_they_were_registered() -> None:
    for number in range(20):
        receiver("jobs", dispatch_uid=f"uid-{number}")(takes_one)
    assert [one.uid for one in registry.receivers] == [f"uid-{number}" for number in range(20)]


def test_a_uid_is_given_once_however_many_threads_ask() -> None:
    outcomes: list[str] = []
    together = threading.Barrier(8)

    def register() -> None:
        together.wait()
        try:
            receiver("jobs", dispatch_uid="mine")(lambda event: None)
        except DuplicateReceiver:
            outcomes.append("refused")
        else:
            outcomes.append("registered")

    threads = [threading.Thread(target=register) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 7 + ["registered"]
    assert len(registry.receivers) == 1


def test_a_receiver_can_be_removed() -> None:
    receiver("jobs")(takes_one)
    receiver("others")(takes_one)
    assert registry.remove(takes_one)
    assert registry.receivers == []
    assert not registry.remove(takes_one)


def test_isolation_ends_and_what_was_registered_before_is_back() -> None:
    receiver("jobs")(takes_one)
    with pytest.raises(RuntimeError), registry.isolated():  # noqa: PT012
        assert registry.receivers == []
        receiver("jobs")(takes_anything)
        raise RuntimeError
    assert only().func is takes_one


# -- streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "subscription"),
    [
        ("jobs", Subscription("jobs")),
        (Topic("jobs", delivery="atomic"), Subscription("jobs")),
        (Order, Subscription("testapp.order", "testapp.order")),
        (Invoice, Subscription("billing", "testapp.invoice")),
        (Car, Subscription("testapp.vehicle", "testapp.vehicle")),
        (Restaurant, Subscription("testapp.restaurant", "testapp.restaurant")),
        (Tag, Subscription("testapp.tag", "testapp.tag")),
    ],
)
def test_a_source_is_heard_on_its_topic(source: Any, subscription: Subscription) -> None:
    assert registry.subscription(source) == subscription


def test_a_model_of_another_app_is_heard_on_the_topic_its_setting_names() -> None:
    from django.contrib.auth.models import User

    assert registry.subscription(User) == Subscription("people", "auth.user")


def test_several_sources_are_several_streams() -> None:
    receiver([Order, "jobs", Invoice])(takes_one)
    assert [one.topic for one in registry.subscriptions(only())] == [
        "testapp.order", "jobs", "billing",
    ]  # fmt: skip


def test_a_proxy_shares_the_label_of_its_table() -> None:
    assert model_label(Car) == model_label(Vehicle) == "testapp.vehicle"
    assert model_label(Place) == "testapp.place"


def test_actions_let_through_what_they_name() -> None:
    def one(actions: Any) -> Receiver:
        return Receiver("uid", takes_one, ("jobs",), actions=actions)

    class Happened:
        action = "updated"

    happened: Any = Happened()
    assert accepts(one(None), happened)
    assert accepts(one(frozenset({"updated"})), happened)
    assert not accepts(one(frozenset({"created", "deleted"})), happened)


# -- what a model publishes ------------------------------------------------------------------


@contextmanager
def registry_restored() -> Iterator[None]:
    """Models made by a test publish nothing after it."""
    before = dict(registry.publications)
    try:
        yield
    finally:
        registry.publications.clear()
        registry.publications.update(before)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"fields": ["status", "nope"]}, InvalidFields, "'nope'"),
        ({"fields": ["nope"]}, InvalidFields, "choose from id, status"),
        ({"fields": ["shipments"]}, InvalidFields, "'shipments'"),
        ({"fields": "status"}, InvalidFields, "list of field names"),
        ({"fields": 7}, InvalidFields, "7"),
        ({"fields": [None]}, InvalidFields, "None"),
        ({"fields": [["status"]]}, InvalidFields, "status"),
        ({"topic": ""}, InvalidTopic, "non-empty"),
        ({"topic": "a\x00"}, InvalidTopic, "NUL"),
        ({"topic": 7}, InvalidTopic, "7"),
        ({"actions": ["create"]}, InvalidAction, "'create'"),
        ({"actions": ["published"]}, InvalidAction, "'published'"),
        ({"actions": "created"}, InvalidAction, "list"),
        ({"actions": []}, InvalidAction, "empty"),
        ({"delivery": "immediate"}, InvalidDelivery, "'immediate'"),
    ],
)
def test_a_bad_option_is_refused_and_nothing_is_half_done(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with isolate_apps("tests.testapp"), registry_restored():

        class Fresh(models.Model):  # noqa: DJ008
            status = models.CharField(max_length=20)

            class Meta:
                app_label = "testapp"

        with pytest.raises(error, match=says):
            notify_changes(**options)(Fresh)
        assert "testapp.fresh" not in registry.publications


def test_a_many_to_many_field_cannot_be_carried() -> None:
    with registry_restored():
        del registry.publications["testapp.article"]
        with pytest.raises(InvalidFields, match="'tags'"):
            notify_changes(fields=["tags"])(Article)


def test_an_unknown_option_of_a_model_is_refused() -> None:
    with pytest.raises(TypeError, match="fieds"):
        notify_changes(fieds=["status"])  # type: ignore[call-overload]


@pytest.mark.parametrize("bad", [7, "testapp.Order", object, lambda: None])
def test_what_is_no_model_cannot_be_decorated(bad: Any) -> None:
    with pytest.raises(InvalidArgument, match="model class"):
        notify_changes(bad)
    with pytest.raises(InvalidArgument, match="model class"):
        notify_changes(fields=["status"])(bad)


@pytest.mark.parametrize("model", [Order, Car, Vehicle])
def test_a_model_is_decorated_once(model: Any) -> None:
    before = dict(registry.publications)
    with pytest.raises(InvalidArgument, match="already"):
        notify_changes(fields=[])(model)
    assert registry.publications == before
