"""``SubscriptionConsumer``: which groups a websocket's client may join, and what it is sent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from channels.layers import channel_layers, get_channel_layer
from channels.testing import WebsocketCommunicator
from django.contrib.auth.models import User
from pytest_django import Settings

from django_pgnotify.exceptions import InvalidArgument
from django_pgnotify.streams import Subscriber
from django_pgnotify.streams.websocket import SubscriptionConsumer
from tests.integration.recording import DEADLINE


@pytest.fixture(autouse=True)
def _fresh_layer() -> None:
    channel_layers.backends.pop("memory", None)


class Room(SubscriptionConsumer):
    """Of a layer that needs no database."""

    channel_layer_alias = "memory"
    permit = {"room.*": True, "secret.*": False}  # noqa: RUF012
    max_groups = 3


class Closed(SubscriptionConsumer):
    channel_layer_alias = "memory"


@asynccontextmanager
async def connected(
    consumer: type[SubscriptionConsumer] = Room, **scope: Any
) -> AsyncIterator[WebsocketCommunicator]:
    communicator = WebsocketCommunicator(consumer.as_asgi(), "/ws/")
    communicator.scope.update(scope)
    accepted, _ = await communicator.connect(DEADLINE)
    assert accepted
    try:
        yield communicator
    finally:
        await communicator.disconnect()


async def ask(communicator: WebsocketCommunicator, message: Any) -> Any:
    """Send a message; its answer."""
    await communicator.send_json_to(message)
    return await communicator.receive_json_from(DEADLINE)


async def nothing_waits(communicator: WebsocketCommunicator) -> None:
    """What has been sent to it so far has been looked at: answers come in order."""
    assert await ask(communicator, {"ping": "end"}) == {"pong": "end"}


async def group_send(group: str, message: dict[str, Any]) -> None:
    await get_channel_layer("memory").group_send(group, message)


def members(group: str) -> set[str]:
    return set(get_channel_layer("memory").groups.get(group, {}))


async def test_a_client_hears_the_group_that_it_asks_for_until_it_leaves() -> None:
    async with connected() as socket:
        assert await ask(socket, {"subscribe": "room.1"}) == {"subscribed": ["room.1"]}
        message = {"type": "order.changed", "event": {"pk": 7}}
        await group_send("room.1", message)
        assert await socket.receive_json_from(DEADLINE) == message
        assert await ask(socket, {"unsubscribe": "room.1"}) == {"unsubscribed": ["room.1"]}
        await group_send("room.1", message)
        await nothing_waits(socket)


async def test_a_group_that_is_not_permitted_is_refused_and_the_others_are_joined() -> None:
    async with connected() as socket:
        refused = await ask(socket, {"subscribe": ["room.1", "other", "secret.1"]})
        assert refused == {"refused": ["other", "secret.1"], "reason": "not permitted"}
        assert await socket.receive_json_from(DEADLINE) == {"subscribed": ["room.1"]}
        await group_send("other", {"type": "x"})
        await group_send("secret.1", {"type": "x"})
        await nothing_waits(socket)


async def test_every_group_is_refused_where_nobody_has_permitted_any() -> None:
    async with connected(Closed) as socket:
        answer = await ask(socket, {"subscribe": "room.1"})
        assert answer == {"refused": ["room.1"], "reason": "not permitted"}
        assert members("room.1") == set()


async def test_the_projects_permission_counts_where_the_consumer_has_none(
    settings: Settings,
) -> None:
    settings.PGNOTIFY_SUBSCRIBE_PERMISSION = "tests.process.live.urls.PERMIT"
    async with connected(Closed) as socket:
        assert await ask(socket, {"subscribe": "room.1"}) == {"subscribed": ["room.1"]}


@pytest.mark.parametrize("name", ["", "a b", "room.ü", "x" * 100, "room.1\n", "room.1!x"])
async def test_a_name_that_cannot_be_a_groups_is_refused_and_told_why(name: str) -> None:
    async with connected() as socket:
        answer = await ask(socket, {"subscribe": name})
        assert answer["refused"] == [name]
        assert answer["reason"].startswith("a group's name has 1 to 99 ASCII letters")


async def test_each_name_is_refused_for_its_own_reason() -> None:
    async with connected() as socket:
        why = await ask(socket, {"subscribe": ["a b", "other", "room.1"]})
        assert why["refused"] == ["a b"]
        assert await socket.receive_json_from(DEADLINE) == {
            "refused": ["other"],
            "reason": "not permitted",
        }
        assert await socket.receive_json_from(DEADLINE) == {"subscribed": ["room.1"]}


async def test_no_more_groups_than_the_limit_and_room_again_after_leaving() -> None:
    async with connected() as socket:
        await ask(socket, {"subscribe": ["room.1", "room.2", "room.3"]})
        answer = await ask(socket, {"subscribe": "room.4"})
        assert answer == {"refused": ["room.4"], "reason": "at most 3 groups"}
        assert await ask(socket, {"subscribe": "room.1"}) == {"subscribed": ["room.1"]}
        await ask(socket, {"unsubscribe": "room.1"})
        assert await ask(socket, {"subscribe": "room.4"}) == {"subscribed": ["room.4"]}


@pytest.mark.parametrize(
    "message",
    [
        7,
        [],
        "subscribe",
        None,
        {},
        {"join": "room.1"},
        {"subscribe": 7},
        {"subscribe": [["room.1"]]},
        {"subscribe": {"room.1": 1}},
        {"subscribe": [f"room.{number}" for number in range(4)]},
        {"unsubscribe": [None]},
    ],
)
async def test_what_a_client_may_not_say_is_answered_with_an_error(message: Any) -> None:
    async with connected() as socket:
        assert list(await ask(socket, message)) == ["error"]
        await nothing_waits(socket)


@pytest.mark.parametrize("text", [" ", "{", "[" * 100_000, "nul", '{"a": "\\ud800'])
async def test_what_is_no_json_is_answered_with_an_error(text: str) -> None:
    async with connected() as socket:
        await socket.send_to(text_data=text)
        assert list(await socket.receive_json_from(DEADLINE)) == ["error"]
        await socket.send_to(bytes_data=b"\xff\x00")
        assert list(await socket.receive_json_from(DEADLINE)) == ["error"]
        await nothing_waits(socket)


async def test_leaving_what_was_not_joined_says_nothing_and_harms_nobody() -> None:
    async with connected() as socket:
        await socket.send_json_to({"unsubscribe": "room.1"})
        await nothing_waits(socket)


async def test_a_client_that_goes_is_in_no_group_any_more() -> None:
    async with connected() as socket:
        await ask(socket, {"subscribe": ["room.1", "room.2"]})
        assert len(members("room.1")) == 1
    assert members("room.1") == members("room.2") == set()


async def test_groups_of_the_class_are_joined_unasked_and_cannot_be_left() -> None:
    class Board(Room):
        groups = ("room.all",)

        async def disconnect(self, code: int) -> None:
            pass  # without super(), as many do

    async with connected(Board) as socket:
        await ask(socket, {"subscribe": "room.all"})
        await ask(socket, {"unsubscribe": "room.all"})
        await group_send("room.all", {"type": "x", "n": 1})
        assert await socket.receive_json_from(DEADLINE) == {"type": "x", "n": 1}
        await ask(socket, {"subscribe": "room.1"})
    assert members("room.all") == members("room.1") == set()


async def test_a_method_for_a_type_takes_the_place_of_passing_it_on() -> None:
    class Shouting(Room):
        async def order_changed(self, message: dict[str, Any]) -> None:
            await self.send_json({"shouted": message["event"]})

    async with connected(Shouting) as socket:
        await ask(socket, {"subscribe": "room.1"})
        await group_send("room.1", {"type": "order.changed", "event": 7})
        await group_send("room.1", {"type": "pgnotify.gap", "cause": "x"})
        assert await socket.receive_json_from(DEADLINE) == {"shouted": 7}
        gap = {"type": "pgnotify.gap", "cause": "x"}
        assert await socket.receive_json_from(DEADLINE) == gap


async def test_messages_of_the_consumers_own_are_its_own() -> None:
    class Talking(Room):
        async def receive_json(self, content: Any, **kwargs: Any) -> None:
            if content == "hello":
                await self.send_json("hello to you")
            else:
                await super().receive_json(content, **kwargs)

    async with connected(Talking) as socket:
        assert await ask(socket, "hello") == "hello to you"
        assert await ask(socket, {"subscribe": "room.1"}) == {"subscribed": ["room.1"]}


@pytest.mark.django_db(transaction=True)
async def test_a_permission_sees_who_asks_and_may_ask_the_database() -> None:
    asked: list[Subscriber] = []

    def owns(subscriber: Subscriber, group: str) -> bool:
        asked.append(subscriber)
        return User.objects.filter(pk=subscriber.user.pk, username=group).exists()

    class Mine(Room):
        permit = staticmethod(owns)  # type: ignore[assignment]

    user = await User.objects.acreate_user("ann")
    async with connected(Mine, user=user, url_route={"kwargs": {"pk": 7}}) as socket:
        assert await ask(socket, {"subscribe": "ann"}) == {"subscribed": ["ann"]}
        assert (await ask(socket, {"subscribe": "bob"}))["refused"] == ["bob"]
    async with connected(Mine) as socket:
        assert (await ask(socket, {"subscribe": "ann"}))["refused"] == ["ann"]
    assert asked[0].kwargs == {"pk": 7}
    assert asked[0].scope["path"] == "/ws/"
    assert asked[-1].user.is_anonymous


async def test_a_permission_that_fails_refuses_and_the_socket_lives(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Room):
        async def permit(subscriber: Subscriber, group: str) -> bool:  # type: ignore[override]  # noqa: N805
            raise LookupError(group)

    with caplog.at_level(logging.ERROR):
        async with connected(Broken) as socket:
            assert (await ask(socket, {"subscribe": "room.1"}))["refused"] == ["room.1"]
            await nothing_waits(socket)
    assert "LookupError" in caplog.text


async def test_a_permission_that_takes_its_time_holds_up_nobody_else() -> None:
    reached, free = asyncio.Event(), asyncio.Event()

    class Slow(Room):
        async def permit(subscriber: Subscriber, group: str) -> bool:  # type: ignore[override]  # noqa: N805
            reached.set()
            await free.wait()
            return True

    async with connected(Slow) as slow, connected() as other:
        await slow.send_json_to({"subscribe": "room.1"})
        async with asyncio.timeout(DEADLINE):
            await reached.wait()
        await nothing_waits(other)
        free.set()
        assert await slow.receive_json_from(DEADLINE) == {"subscribed": ["room.1"]}


def test_a_consumer_whose_permission_cannot_be_one_is_refused_at_once() -> None:
    with pytest.raises(InvalidArgument, match="permit="):
        type("Wrong", (SubscriptionConsumer,), {"permit": 7})
