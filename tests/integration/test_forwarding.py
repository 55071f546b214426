"""``forward()``: what reaches a channel layer, from whom, in which order, and what never can."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgpack
import pytest
from channels.layers import BaseChannelLayer, channel_layers
from channels.testing import WebsocketCommunicator
from django.db import transaction

from django_pgnotify import Event, Topic, forward, no_notify, publish
from django_pgnotify.exceptions import (
    DuplicateReceiver,
    InvalidAction,
    InvalidArgument,
    InvalidReceiver,
    InvalidTemplate,
    InvalidTopic,
    PgNotifyError,
)
from django_pgnotify.forwarding import group_name, plain_event
from django_pgnotify.registry import Registry, registry
from django_pgnotify.signals import receiver_failed
from django_pgnotify.testing import InMemoryBus, running_listener
from tests.integration.test_layer import RoomConsumer, stop_layers
from tests.testapp.models import Article, Document, Membership, Order, Shipment, Sku, Tag

DEADLINE = 10.0

pytestmark = pytest.mark.django_db(transaction=True)


class RecordingLayer(BaseChannelLayer):
    """Keeps what is sent as a layer over a network would: packed, name checked."""

    extensions = ["groups"]  # noqa: RUF012

    def __init__(self, fail_for: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fail_for = fail_for
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        self.require_valid_group_name(group)
        packed = msgpack.packb(message)
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        for _ in range(3):
            await asyncio.sleep(0)  # whoever does not wait for us would overtake here
        with self._lock:
            self._at_once -= 1
            if group == self.fail_for:
                raise ConnectionError("the layer is away")
            self.sent.append((group, msgpack.unpackb(packed, strict_map_key=False)))

    @property
    def events(self) -> list[dict[str, Any]]:
        return [message["event"] for _, message in self.sent]

    @property
    def groups(self) -> list[str]:
        return [group for group, _ in self.sent]


@pytest.fixture(autouse=True)
def receivers() -> Iterator[Registry]:
    """No receivers but those of the test."""
    with registry.isolated() as isolated:
        yield isolated


@pytest.fixture
def layer(settings: Any) -> RecordingLayer:
    settings.CHANNEL_LAYERS = {
        "default": {"BACKEND": f"{__name__}.RecordingLayer"},
        "second": {"BACKEND": f"{__name__}.RecordingLayer"},
        "failing": {
            "BACKEND": f"{__name__}.RecordingLayer",
            "CONFIG": {"fail_for": "order.bad"},
        },
    }
    layer: RecordingLayer = channel_layers["default"]
    return layer


@pytest.fixture
def bus() -> Iterator[InMemoryBus]:
    with InMemoryBus() as bus:
        yield bus


@contextlib.contextmanager
def failures() -> Iterator[list[dict[str, Any]]]:
    """What ``receiver_failed`` tells."""
    found: list[dict[str, Any]] = []

    def note(**kwargs: Any) -> None:
        found.append(kwargs)

    receiver_failed.connect(note)
    try:
        yield found
    finally:
        receiver_failed.disconnect(note)


# -- which group -------------------------------------------------------------------------------


def test_a_template_names_the_group_by_fields_of_the_event(
    layer: RecordingLayer, bus: InMemoryBus
) -> None:
    forward(Order, group="order.{pk}", type="order.changed")
    forward(Shipment, group="{model}.{data[status]}", type="shipment.changed")
    order = Order.objects.create()
    Shipment.objects.create(order=order, status="sent")
    assert layer.groups == [f"order.{order.pk}", "testapp.shipment.sent"]


def test_unsafe_values_name_the_group_that_group_name_tells_consumers(
    layer: RecordingLayer, bus: InMemoryBus
) -> None:
    forward(Sku, group="sku.{pk}", type="sku.changed")
    codes = ["plain-1.x", "O'Brien", "two words", "größe/XL", "x" * 80, "a\nb", "{pk}", "%s"]
    for code in codes:
        Sku.objects.create(code=code)
    assert layer.groups == [group_name("sku.{pk}", pk=code) for code in codes]
    assert len(set(layer.groups)) == len(codes)
    assert layer.groups[0] == "sku.plain-1.x"


def test_keys_that_are_no_text_name_the_group_that_group_name_tells_consumers(
    layer: RecordingLayer, bus: InMemoryBus
) -> None:
    forward([Document, Membership], group="row.{pk}", type="row.changed")
    document = Document.objects.create()
    badge = uuid.uuid4()
    member = Membership.objects.create(team=3, person="Ann O'Hara", badge=badge)
    assert layer.groups == [
        group_name("row.{pk}", pk=document.pk),
        group_name("row.{pk}", pk=member.pk),
    ]
    assert layer.groups[0] == group_name("row.{pk}", pk=str(document.pk))


def test_a_function_names_one_group_several_or_none(
    layer: RecordingLayer, bus: InMemoryBus
) -> None:
    def groups(event: Event) -> Any:
        return event.data["to"]

    forward("news", group=groups, type="news")
    for to in ("one", ["two", "three"], ("four",), None, [], ""):
        publish("news", {"to": to})
    assert layer.groups == ["one", "two", "three", "four"]


def test_a_lambda_and_a_generator_name_groups_too(layer: RecordingLayer, bus: InMemoryBus) -> None:
    forward("news", group=lambda event: (f"room.{n}" for n in event.data), type="news")
    publish("news", [1, 2])
    assert layer.groups == ["room.1", "room.2"]


def test_a_list_of_sources_is_forwarded_by_one_declaration(
    layer: RecordingLayer, bus: InMemoryBus
) -> None:
    forward([Order, "jobs", Topic("news")], group="all", type="anything")
    Order.objects.create()
    publish("jobs", 1)
    publish("news", 2)
    publish("other", 3)
    assert [event["topic"] for event in layer.events] == ["testapp.order", "jobs", "news"]


# -- which message -----------------------------------------------------------------------------


def test_the_message_carries_the_fields_of_the_event_as_plain_values(
    layer: RecordingLayer, bus: InMemoryBus
) -> None:
    forward(Shipment, group="shipments", type="shipment.changed")
    order = Order.objects.create()
    sent_at = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    with no_notify():
        shipment = Shipment.objects.create(order=order)
    shipment.weight, shipment.sent_at, shipment.status = Decimal("1.250"), sent_at, "sent"
    shipment.save(update_fields=["weight", "sent_at", "status"])
    [(group, message)] = layer.sent
    [event] = [event for event in bus.events if event.model == "testapp.shipment"]
    assert group == "shipments"
    assert message.keys() == {"type", "event"}
    assert message["type"] == "shipment.changed"
    body = message["event"]
    assert body["id"] == event.id
    assert (body["topic"], body["action"], body["model"], body["pk"]) == (
        "testapp.shipment",
        "updated",
        "testapp.shipment",
        shipment.pk,
    )
    assert body["data"] == {
        "order": order.pk,
        "status": "sent",
        "weight": "1.250",
        "sent_at": event.data["sent_at"],
    }
    assert set(body["changed"]) == {"weight", "sent_at", "status"}
    assert datetime.fromisoformat(body["published_at"]) == event.published_at
    assert body["key"] == event.key


def test_keys_of_every_type_are_plain_in_the_message(
    layer: RecordingLayer, bus: InMemoryBus
) -> None:
    forward([Document, Membership, Sku, Order], group="rows", type="row.changed")
    document, badge = Document.objects.create(), uuid.uuid4()
    Membership.objects.create(team=3, person="ann", badge=badge)
    Sku.objects.create(code="x")
    order = Order.objects.create()
    assert [event["pk"] for event in layer.events] == [
        str(document.pk),
        [3, "ann", str(badge)],
        "x",
        order.pk,
    ]


@pytest.mark.parametrize(
    ("pk", "plain"),
    [
        (7, 7),
        ("a", "a"),
        (None, None),
        (1.5, 1.5),
        (uuid.UUID(int=1), str(uuid.UUID(int=1))),
        (Decimal("1.50"), "1.50"),
        (datetime(2030, 1, 2, tzinfo=UTC), "2030-01-02T00:00:00+00:00"),
        (datetime(2030, 1, 2, tzinfo=UTC).date(), "2030-01-02"),
        ((1, uuid.UUID(int=2)), [1, str(uuid.UUID(int=2))]),
        (2**70, str(2**70)),
    ],
    ids=str,
)
def test_a_key_of_any_type_can_be_packed(pk: object, plain: object) -> None:
    event = Event(
        id="a-1",
        topic="t",
        action="updated",
        model="shop.order",
        pk=pk,
        data={},
        key=None,
        source="node:1",
        published_at=datetime(2030, 1, 2, tzinfo=UTC),
    )
    message = msgpack.unpackb(msgpack.packb(plain_event(event)))
    assert message["pk"] == plain
    assert message["changed"] is None


@pytest.mark.parametrize(
    "data",
    [
        None,
        "do job 1001",
        [1, [2, {"a": None}]],
        {"nested": {"deep": [True, 1.5, "ü"]}},
        {"number": 2**63},
        {"number": 2**70},
        {"number": -(2**70)},
    ],
    ids=str,
)
def test_whatever_was_published_can_be_forwarded(
    layer: RecordingLayer, bus: InMemoryBus, data: Any
) -> None:
    """JSON has numbers of any size; what a layer cannot carry must not cost the event."""
    forward("news", group="news", type="news")
    publish("news", data)
    [event] = layer.events
    if data in ({"number": 2**70}, {"number": -(2**70)}):
        assert str(data["number"]) == str(event["data"]["number"])
    else:
        assert event["data"] == data


def test_the_type_is_the_declared_one_whatever_the_event_says(
    layer: RecordingLayer, bus: InMemoryBus
) -> None:
    forward("news", group="news", type="news.item")
    publish("news", {"type": "websocket.close", "event": "x"})
    bus.notify("news", '{"type": "websocket.close"}')
    assert [message["type"] for _, message in layer.sent] == ["news.item", "news.item"]


def test_a_function_of_the_event_can_choose_what_is_sent(
    layer: RecordingLayer, bus: InMemoryBus
) -> None:
    forward(Order, group="orders", type="order", data=lambda event: {"n": event.pk})
    order = Order.objects.create()
    assert layer.sent == [("orders", {"type": "order", "event": {"n": order.pk}})]


def test_only_the_chosen_actions_are_forwarded(layer: RecordingLayer, bus: InMemoryBus) -> None:
    forward(Order, group="orders", type="order", actions=["deleted", "created"])
    order = Order.objects.create()
    order.save()
    order.delete()
    assert [event["action"] for event in layer.events] == ["created", "deleted"]


def test_changes_of_a_many_to_many_relation_are_forwarded(
    layer: RecordingLayer, bus: InMemoryBus
) -> None:
    forward(Article, group="article.{pk}", type="article", actions=["m2m_changed"])
    article, tag = Article.objects.create(title="a"), Tag.objects.create(name="t")
    article.tags.add(tag)
    [event] = layer.events
    assert event["data"] == {"field": "tags", "operation": "add", "pks": [tag.pk]}
    assert layer.groups == [f"article.{article.pk}"]


def test_a_foreign_notify_is_forwarded_as_it_is(layer: RecordingLayer, bus: InMemoryBus) -> None:
    forward("jobs", group="jobs", type="job")
    bus.notify("jobs", "do job 1001")
    [event] = layer.events
    assert event["data"] == "do job 1001"
    assert event["action"] == "published"


def test_another_layer_can_be_named(layer: RecordingLayer, bus: InMemoryBus) -> None:
    forward("jobs", group="jobs", type="job", layer="second")
    publish("jobs", 1)
    assert layer.sent == []
    assert channel_layers["second"].groups == ["jobs"]


def test_nothing_of_a_transaction_that_rolled_back_is_forwarded(
    layer: RecordingLayer, bus: InMemoryBus
) -> None:
    forward(Order, group="orders", type="order")
    with contextlib.suppress(ZeroDivisionError), transaction.atomic():
        Order.objects.create()
        raise ZeroDivisionError
    with transaction.atomic():
        Order.objects.create()
        assert layer.sent == []
    assert len(layer.sent) == 1


# -- through PostgreSQL ------------------------------------------------------------------------


def test_events_are_forwarded_one_at_a_time_and_in_order(layer: RecordingLayer) -> None:
    forward("jobs", group="job.{data[n]}", type="job")
    with running_listener() as listener:
        with transaction.atomic():
            for number in range(200):
                publish("jobs", {"n": number}, key=f"key {number % 7}")
        for number in range(200, 300):
            publish("jobs", {"n": number})
        listener.wait_for(300)
    assert layer.groups == [f"job.{number}" for number in range(300)]
    assert layer.most_at_once == 1


def test_only_the_leader_forwards(layer: RecordingLayer) -> None:
    forward("jobs", group="jobs", type="job")
    with running_listener() as leader, running_listener() as standby:
        for number in range(50):
            publish("jobs", {"n": number})
        leader.wait_for(50)
        standby.wait_for(50)
    assert [event["data"]["n"] for event in layer.events] == list(range(50))


def test_a_layer_that_fails_costs_one_event_and_is_reported(
    layer: RecordingLayer, caplog: pytest.LogCaptureFixture
) -> None:
    forward("jobs", group="order.{data}", type="job", layer="failing")
    with failures() as failed, running_listener() as listener:
        for name in ("good", "bad", "better"):
            publish("jobs", name)
        listener.wait_for(3)
    assert channel_layers["failing"].groups == ["order.good", "order.better"]
    [failure] = failed
    assert isinstance(failure["exception"], ConnectionError)
    assert failure["event"].data == "bad"
    assert "forward(jobs -> order.{data}) failed on event" in caplog.text


def test_a_layer_that_is_missing_is_reported_with_what_to_do(layer: RecordingLayer) -> None:
    forward("jobs", group="jobs", type="job", layer="nowhere")
    with failures() as failed, running_listener() as listener:
        publish("jobs", 1)
        listener.wait_for(1)
    [failure] = failed
    assert isinstance(failure["exception"], PgNotifyError)
    assert "'nowhere'" in str(failure["exception"])
    assert "CHANNEL_LAYERS" in str(failure["exception"])


def test_an_event_that_does_not_fit_the_template_is_reported_and_skipped(
    layer: RecordingLayer,
) -> None:
    forward("jobs", group="job.{data[room]}", type="job")
    data = [{"room": 1}, {}, "text", None, [1], {"room": 2}]
    with failures() as failed, running_listener() as listener:
        for one in data:
            publish("jobs", one)
        listener.wait_for(len(data))
    assert layer.groups == ["job.1", "job.2"]
    assert [failure["event"].data for failure in failed] == data[1:5]


def test_a_group_that_channels_refuses_is_reported(layer: RecordingLayer) -> None:
    forward("jobs", group=lambda event: event.data, type="job")
    with failures() as failed, running_listener() as listener:
        for name in ("fine", "no good", 7):
            publish("jobs", name)
        listener.wait_for(3)
    assert layer.groups == ["fine"]
    assert [failure["event"].data for failure in failed] == ["no good", 7]


def test_a_gap_is_not_forwarded(layer: RecordingLayer, bus: InMemoryBus) -> None:
    """A consumer that wants to know of it forwards ``actions=["gap"]`` with a receiver."""
    forward("jobs", group="jobs", type="job")
    bus.gap()
    assert layer.sent == []


async def test_a_change_of_a_row_reaches_a_websocket(settings: Any) -> None:
    settings.CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "django_pgnotify.layers.PostgresChannelLayer",
            "CONFIG": {"prefix": f"forward-{uuid.uuid4().hex[:8]}"},
        }
    }
    forward(Order, group="room", type="chat.said", data=lambda event: {"status": event.action})
    socket = WebsocketCommunicator(OrderConsumer.as_asgi(), "/ws/")
    try:
        assert await socket.connect(timeout=DEADLINE) == (True, None)
        listener = running_listener()
        await asyncio.to_thread(listener.__enter__)
        try:
            await Order.objects.acreate()
            assert await socket.receive_json_from(timeout=DEADLINE) == {"text": "created"}
        finally:
            await asyncio.to_thread(listener.__exit__, None, None, None)
        await socket.disconnect(timeout=DEADLINE)
    finally:
        await asyncio.to_thread(stop_layers)


class OrderConsumer(RoomConsumer):
    async def chat_said(self, message: dict[str, Any]) -> None:
        await self.send_json({"text": message["event"]["status"]})


# -- what can never work -----------------------------------------------------------------------


def a_class_is_no_function() -> type:
    class Group:
        pass

    return Group


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ("order.{number}", "'number'"),
        ("order.{pk.real}", "no field"),
        ("order.{}", "no field"),
        ("order.{pk", "malformed"),
        ("order:{pk}", "ASCII"),
        ("order {pk}", "ASCII"),
        ("x" * 100, "longer than"),
        ("", "non-empty"),
        (None, "non-empty"),
        (7, "non-empty"),
        (["orders"], "non-empty"),
    ],
)
def test_a_group_that_could_never_be_named_is_refused(
    receivers: Registry, group: Any, words: str
) -> None:
    with pytest.raises(InvalidTemplate, match=words):
        forward(Order, group=group, type="order.changed")
    assert receivers.receivers == []


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda: "x", "event"),
        (lambda event, other: "x", "event"),
        (a_class_is_no_function(), "class"),
    ],
)
def test_a_function_that_does_not_take_one_event_is_refused(
    function: Callable[..., Any], word: str
) -> None:
    with pytest.raises(InvalidReceiver, match=word):
        forward(Order, group=function, type="order.changed")
    with pytest.raises(InvalidReceiver, match=word):
        forward(Order, group="orders", type="order.changed", data=function)


@pytest.mark.parametrize("name", ["", "order changed", "_private", "7days", None, 7, "a-b"])
def test_a_type_that_names_no_handler_is_refused(name: Any) -> None:
    with pytest.raises(InvalidArgument, match="handler"):
        forward(Order, group="orders", type=name)


def test_a_bad_source_or_action_is_refused(receivers: Registry) -> None:
    bad: list[Any] = ["", 7, None, []]
    for source in bad:
        with pytest.raises(InvalidTopic):
            forward(source, group="orders", type="order")
    with pytest.raises(InvalidAction, match="'renamed'"):
        forward(Order, group="orders", type="order", actions=["renamed"])
    assert receivers.receivers == []


def test_the_same_declaration_twice_is_refused_and_a_name_of_its_own_is_not() -> None:
    forward(Order, group="orders", type="order")
    forward(Order, group="order.{pk}", type="order")
    forward(Order, group="orders", type="order.other")
    forward(Order, group="orders", type="order", layer="second")
    forward(Order, group="orders", type="order", dispatch_uid="again")
    with pytest.raises(DuplicateReceiver, match="dispatch_uid"):
        forward(Order, group="orders", type="order")


def test_two_functions_of_the_same_name_are_two_declarations(
    layer: RecordingLayer, bus: InMemoryBus
) -> None:
    """Lambdas all have one name."""
    forward("jobs", group=lambda event: "first", type="job")
    forward("jobs", group=lambda event: "second", type="job")
    publish("jobs", 1)
    assert sorted(layer.groups) == ["first", "second"]
