"""The channel layers that one suite runs against, and in what each falls short of it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest

Message = dict[str, Any]
F = TypeVar("F", bound=Callable[..., Any])

OURS = "ours"
MEMORY = "in-memory"
CORE = "channels_redis core"
PUBSUB = "channels_redis pubsub"
KINDS = (OURS, MEMORY, CORE, PUBSUB)

#: Seconds until a message must be there. Generous: spent only by a test that fails.
DEADLINE = 20.0
#: The same for a peer that is known to fail, which would spend all of it.
DEADLINE_OF_THE_LATE = 0.15

_SHORT_NAMES = {"memory": MEMORY, "core": CORE, "pubsub": PUBSUB}


def falls_short(**reasons: str) -> Callable[[F], F]:
    """Say which peers do not do what the specification asks for, and why.

    They are expected to fail: one that passes fails the suite, so that this stays true.
    """
    return _noting("shortfalls", reasons)


def may_fall_short(**reasons: str) -> Callable[[F], F]:
    """As :func:`falls_short`, of what goes wrong only in an unlucky moment."""
    return _noting("races", reasons)


def _noting(attribute: str, reasons: dict[str, str]) -> Callable[[F], F]:
    def mark(function: F) -> F:
        setattr(function, attribute, {_SHORT_NAMES[name]: why for name, why in reasons.items()})
        return function

    return mark


def expected_to_fail(function: Callable[..., Any]) -> dict[str, tuple[str, bool]]:
    """By kind: why, and whether it always does."""
    return {
        **{kind: (why, False) for kind, why in getattr(function, "races", {}).items()},
        **{kind: (why, True) for kind, why in getattr(function, "shortfalls", {}).items()},
    }


def parameters(function: Callable[..., Any]) -> list[Any]:
    """Each kind, and an expected failure where the test says so.

    A peer has more than one try, for what goes wrong in it once in a hundred runs is no fault of
    ours; what we do has to go well each time.
    """
    marks: dict[str, list[pytest.MarkDecorator]] = {
        kind: [pytest.mark.flaky(reruns=2)] for kind in KINDS if kind != OURS
    }
    for kind, (why, always) in expected_to_fail(function).items():
        marks[kind].append(pytest.mark.xfail(strict=always, reason=why))
    # Normal channels and large messages are rows, which a test's own transaction would hide.
    marks[OURS] = [pytest.mark.django_db(transaction=True)]
    return [
        pytest.param(kind, marks=marks.get(kind, []), id=kind.replace(" ", "-")) for kind in KINDS
    ]


@dataclass
class Backend:
    """One kind of layer, in a place of its own that no other test sees.

    Each call of ``layer()`` gives another layer in that place, as another process would have it;
    the in-memory layer has but one process, and gives the same one again.
    """

    kind: str
    new: Callable[..., Any]
    close: Callable[[Any], Any]
    stack: AsyncExitStack
    #: A short expiry in seconds, and how long one has to wait to be past it. The peers count
    #: whole seconds.
    short: float = 0.1
    past: float = 0.3
    deadline: float = DEADLINE
    _one: dict[str, Any] = field(default_factory=dict)

    def layer(self, **config: Any) -> Any:
        key = repr(sorted(config.items()))
        if self.kind == MEMORY and key in self._one:
            return self._one[key]
        layer = self._one[key] = self.new(**config)
        self.stack.push_async_callback(self.close, layer)
        return layer

    async def take(self, layer: Any, channel: str) -> Message:
        """The next message of a channel."""
        async with asyncio.timeout(self.deadline):
            message: Message = await layer.receive(channel)
            return message

    async def take_all(self, layer: Any, channel: str, count: int) -> list[Message]:
        return [await self.take(layer, channel) for _ in range(count)]

    async def member(self, layer: Any, *groups: str) -> str:
        """A new channel in these groups."""
        channel: str = await layer.new_channel()
        for group in groups:
            await layer.group_add(group, channel)
        return channel

    async def nothing_for(self, layer: Any, channel: str, sender: Any) -> None:
        """Assert that ``sender`` has sent nothing that is still on its way to a channel.

        What it sends now comes after that, on the same way, and has to be the first to arrive.
        """
        group, mark = f"fence.{secrets.token_hex(4)}", secrets.token_hex(4)
        await layer.group_add(group, channel)
        await sender.group_send(group, {"type": "fence", "mark": mark})
        assert await self.take(layer, channel) == {"type": "fence", "mark": mark}
        await layer.group_discard(group, channel)


@asynccontextmanager
async def backend(kind: str, redis_url: Callable[[], str]) -> AsyncIterator[Backend]:
    """A place for layers of a kind; what has been made in it ends with the block."""
    place = f"suite-{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        if kind == OURS:
            from django_pgnotify.layers import PostgresChannelLayer

            def ours(**config: Any) -> Any:
                return PostgresChannelLayer(**{"prefix": place, **config})

            async def close(layer: Any) -> None:
                await layer.close()

            yield Backend(kind, ours, close, stack)
        elif kind == MEMORY:
            from channels.layers import InMemoryChannelLayer

            def in_memory(**config: Any) -> Any:
                config.pop("prefix", None)
                return InMemoryChannelLayer(**config)

            yield Backend(kind, in_memory, close_nothing, stack, 1, 2.2)
        elif kind == CORE:
            from channels_redis.core import RedisChannelLayer

            def core(**config: Any) -> Any:
                return RedisChannelLayer(**{"hosts": hosts(redis_url()), "prefix": place, **config})

            async def close_pools(layer: Any) -> None:
                await layer.close_pools()

            yield Backend(kind, core, close_pools, stack, 1, 2.2)
        else:
            from channels_redis.pubsub import RedisPubSubChannelLayer

            def pubsub(**config: Any) -> Any:
                return RedisPubSubChannelLayer(
                    **{"hosts": hosts(redis_url()), "prefix": place, **config}
                )

            async def flush(layer: Any) -> None:
                await layer.flush()

            yield Backend(kind, pubsub, flush, stack)


def hosts(url: str) -> list[dict[str, Any]]:
    # redis-py 8 gives up reading after 5 s, which is how long channels_redis' core has it wait.
    return [{"address": url, "socket_timeout": None}]


async def close_nothing(layer: Any) -> None:
    """It has nothing open."""
