"""``forward(direct=True)``: each process with members hears the source itself, and nobody twice."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from channels.layers import channel_layers
from pytest_django import Settings

from django_pgnotify import Event, apublish, apublish_many, forward
from django_pgnotify.exceptions import InvalidArgument
from django_pgnotify.layers import PostgresChannelLayer
from django_pgnotify.listening.background import background_listener
from django_pgnotify.registry import registry
from django_pgnotify.testing import InMemoryBus, running_listener
from tests.integration.recording import aterminate, client, failures
from tests.integration.test_layer import port_of, stop_layers, take
from tests.testapp.models import Order, Shipment

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _receivers() -> Iterator[None]:
    """No receivers but those of the test."""
    with registry.isolated():
        yield


@pytest.fixture
async def layer(settings: Settings) -> AsyncIterator[PostgresChannelLayer]:
    settings.CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "django_pgnotify.layers.PostgresChannelLayer",
            "CONFIG": {"prefix": f"direct-{uuid.uuid4().hex[:8]}"},
        },
        "memory": {"BACKEND": "channels.layers.InMemoryChannelLayer"},
    }
    layer: PostgresChannelLayer = channel_layers["default"]
    yield layer
    await layer.close()
    await asyncio.to_thread(stop_layers)


async def member(layer: PostgresChannelLayer, *groups: str) -> str:
    """A channel that is in these groups."""
    channel = await layer.new_channel()
    for group in groups:
        await layer.group_add(group, channel)
    return channel


async def hears(layer: PostgresChannelLayer, channel: str, count: int) -> list[Any]:
    """The data of the next messages."""
    return [(await take(layer, channel))["event"]["data"] for _ in range(count)]


async def test_members_hear_what_is_published_right_after_joining_without_pglisten(
    layer: PostgresChannelLayer,
) -> None:
    for number in range(20):
        forward(f"fresh{number}", group=f"g.{number}", type="x", direct=True)
    for number in range(20):
        channel = await member(layer, f"g.{number}")
        await apublish(f"fresh{number}", number)
        assert await hears(layer, channel, 1) == [number]


async def test_a_change_of_a_row_reaches_the_group_of_that_row_only(
    layer: PostgresChannelLayer,
) -> None:
    forward(Order, group="order.{pk}", type="order.changed", direct=True)
    one, two = await Order.objects.acreate(), await Order.objects.acreate()
    channel, other = await member(layer, f"order.{one.pk}"), await member(layer, f"order.{two.pk}")
    for order in (one, two):
        order.status = "paid"
        await order.asave(update_fields=["status"])
    message = await take(layer, channel)
    assert message["type"] == "order.changed"
    assert (message["event"]["pk"], message["event"]["action"]) == (one.pk, "updated")
    assert (await take(layer, other))["event"]["pk"] == two.pk


async def test_with_pglisten_beside_it_everything_comes_once_and_in_order(
    layer: PostgresChannelLayer,
) -> None:
    forward("jobs", group="jobs", type="x", direct=True)
    forward("end", group="jobs", type="x")  # by pglisten, and so behind what it would send
    channel = await member(layer, "jobs")
    listener = running_listener()
    await asyncio.to_thread(listener.__enter__)
    try:
        await apublish_many("jobs", range(50))
        assert await hears(layer, channel, 50) == list(range(50))
        await apublish("end", "end")
        assert await hears(layer, channel, 1) == ["end"]
    finally:
        await asyncio.to_thread(listener.__exit__, None, None, None)


async def test_actions_models_and_data_count_as_they_do_for_pglisten(
    layer: PostgresChannelLayer,
) -> None:
    forward(
        Shipment,
        group=lambda event: ["all", "none"],
        type="x",
        actions=["created"],
        data=lambda event: {"data": event.data["status"]},
        direct=True,
    )
    channel = await member(layer, "all")
    order = await Order.objects.acreate()
    shipment = await Shipment.objects.acreate(order=order, status="one")
    shipment.status = "not this"
    await shipment.asave()
    await Shipment.objects.acreate(order=order, status="two")
    assert await hears(layer, channel, 2) == ["one", "two"]


async def test_nothing_is_made_for_groups_without_members_here(layer: PostgresChannelLayer) -> None:
    made = []

    def data(event: Event) -> dict[str, Any]:
        made.append(event.data)
        return {"data": event.data}

    forward("jobs", group="job.{data}", type="x", data=data, direct=True)
    channel = await member(layer, "job.2")
    await apublish_many("jobs", [1, 2, 3])
    assert await hears(layer, channel, 1) == [2]
    assert made == [2]


async def test_a_failure_is_reported_and_the_next_event_follows(
    layer: PostgresChannelLayer,
) -> None:
    def group(event: Event) -> str:
        if event.data == "bad":
            raise ValueError("no")
        return "a name with spaces" if event.data == "worse" else "jobs"

    forward("jobs", group=group, type="x", direct=True)
    channel = await member(layer, "jobs")
    with failures() as told:
        await apublish_many("jobs", ["bad", "worse", "good"])
        assert await hears(layer, channel, 1) == ["good"]
    assert [one["event"].data for one in told] == ["bad"]
    assert told[0]["will_retry"] is False


async def test_a_gap_of_the_listener_reaches_those_who_asked_for_it(
    layer: PostgresChannelLayer,
) -> None:
    forward("jobs", group="jobs", type="job", direct=True)
    forward("jobs", group="jobs", type="reload", actions=["gap"], direct=True)
    channel = await member(layer, "jobs")
    async with client() as other:
        await aterminate(other, background_listener("default").backend_pid)
    message = await take(layer, channel)
    assert (message["type"], message["event"]["action"]) == ("reload", "gap")
    await apublish("jobs", 1)
    assert (await take(layer, channel))["type"] == "job"


@pytest.mark.parametrize("wanted", [True, ["order.*"]])
async def test_a_gap_of_the_listener_is_a_gap_to_the_members_who_want_to_know(
    layer: PostgresChannelLayer, settings: Settings, wanted: Any
) -> None:
    """A template with {pk} has no name for the groups that missed something."""
    entry = settings.CHANNEL_LAYERS["default"]
    config = {**entry["CONFIG"], "gap_messages": wanted}
    settings.CHANNEL_LAYERS = {"default": {**entry, "CONFIG": config}}
    layer = channel_layers["default"]
    forward(Order, group="order.{pk}", type="order.changed", direct=True)
    order = await Order.objects.acreate()
    channel, chat = await member(layer, f"order.{order.pk}"), await member(layer, "chat")
    async with client() as other:
        await aterminate(other, background_listener("default").backend_pid)
    gap = await take(layer, channel)
    assert gap["type"] == "pgnotify.gap"
    assert gap["since"] < gap["until"]
    assert gap["cause"]
    order.status = "paid"
    await order.asave()
    assert (await take(layer, channel))["type"] == "order.changed"
    assert len(port_of(layer).local.boxes[chat].messages) == (1 if wanted is True else 0)
    await layer.close()


async def test_a_layer_that_is_closed_hears_no_more_and_begins_again_with_the_next_member(
    layer: PostgresChannelLayer,
) -> None:
    forward("jobs", group="jobs", type="x", direct=True)
    await member(layer, "jobs")
    assert background_listener("default")._subscriptions
    await layer.close()
    assert background_listener("default")._subscriptions == {}
    channel = await member(layer, "jobs")
    await apublish("jobs", 1)
    assert await hears(layer, channel, 1) == [1]


async def test_another_layer_is_served_by_pglisten_as_ever(layer: PostgresChannelLayer) -> None:
    forward("jobs", group="jobs", type="x", layer="memory", direct=True)
    memory = channel_layers["memory"]
    channel = await memory.new_channel()
    await memory.group_add("jobs", channel)
    listener = running_listener()
    running = await asyncio.to_thread(listener.__enter__)
    try:
        await apublish("jobs", 1)
        await asyncio.to_thread(running.wait_for, 1)
        await asyncio.to_thread(running.settle)
    finally:
        await asyncio.to_thread(listener.__exit__, None, None, None)
    assert memory.channels[channel].qsize() == 1


async def test_the_bus_of_tests_still_forwards(layer: PostgresChannelLayer) -> None:
    forward("jobs", group="jobs", type="x", direct=True)
    channel = await member(layer, "jobs")
    with InMemoryBus() as bus:
        await apublish("jobs", 1)
        await asyncio.to_thread(bus.deliver)
    assert await hears(layer, channel, 1) == [1]


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_a_direct_that_is_no_flag_is_refused(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="direct="):
        forward("jobs", group="jobs", type="x", direct=value)
