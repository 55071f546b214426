"""A websocket whose client says which groups it wants, and is asked whether it may.

Not part of the façade of ``streams``: it needs Django Channels.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

from channels.consumer import get_handler_name
from channels.generic.websocket import AsyncJsonWebsocketConsumer

from .hub import stream_stats
from .permission import GROUP_NAMES, Permission, Permit, Subscriber, valid_group
from .view import anonymous

Message = dict[str, Any]


class SubscriptionConsumer(AsyncJsonWebsocketConsumer):  # type: ignore[misc]
    """Joins the groups that its client asks for, if ``permit`` allows each of them.

    A client sends ``{"subscribe": "order.7"}`` or a list of names, ``{"unsubscribe": …}``, and
    ``{"ping": anything}``. It is answered with ``{"subscribed": [names]}``, ``{"refused": [names],
    "reason": text}``, ``{"unsubscribed": [names]}``, ``{"pong": the same}`` or ``{"error": text}``.
    What is sent to a group reaches it as it is, unless the consumer has a method for its type.

    Groups in the class's own ``groups`` are joined without being asked for: the server chose them.

    Attributes:
        permit: who may join which group (see ``Permission``); None asks
            ``PGNOTIFY_SUBSCRIBE_PERMISSION``, and where that is not set nobody may join any.
        max_groups: how many groups a client may have joined at once.
    """

    permit: ClassVar[Permit] = None
    max_groups: ClassVar[int] = 100

    _permission: ClassVar[Permission] = Permission(None)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A function that is an attribute of a class would be a method of its instances.
        permit = cls.__dict__.get("permit", cls.permit)
        cls._permission = Permission(
            permit.__func__ if isinstance(permit, staticmethod) else permit
        )

    def __init__(self) -> None:
        super().__init__()
        self.subscribed: set[str] = set()
        """The groups that the client has asked for and joined."""

    @property
    def subscriber(self) -> Subscriber:
        """Who the client is, as permissions see it."""
        user = self.scope.get("user")
        kwargs = self.scope.get("url_route", {}).get("kwargs", {})
        return Subscriber(anonymous() if user is None else user, self.scope, kwargs)

    # -- from the client ----------------------------------------------------------------------

    async def receive(
        self, text_data: str | None = None, bytes_data: bytes | None = None, **kwargs: Any
    ) -> None:
        try:
            content = json.loads(text_data or "")
        except (ValueError, RecursionError):
            await self.send_json({"error": "A message is a JSON object in a text frame."})
        else:
            await self.receive_json(content, **kwargs)

    async def receive_json(self, content: Any, **kwargs: Any) -> None:
        """Do what the client asks. Override it for messages of your own, and call ``super()``."""
        if isinstance(content, dict) and "subscribe" in content:
            await self.subscribe(content["subscribe"])
        elif isinstance(content, dict) and "unsubscribe" in content:
            await self.unsubscribe(content["unsubscribe"])
        elif isinstance(content, dict) and "ping" in content:
            await self.send_json({"pong": content["ping"]})
        else:
            await self.send_json({"error": "A message says subscribe, unsubscribe or ping."})

    async def subscribe(self, names: Any) -> None:
        """Join the groups of these names that the client may, and tell it which."""
        asked = await self._listed(names)
        joined: list[str] = []
        refused: dict[str, list[str]] = {}
        for name in asked:
            if name not in self.subscribed:
                reason = await self._reason_to_refuse(name)
                if reason is not None:
                    refused.setdefault(reason, []).append(name)
                    continue
                await self.channel_layer.group_add(name, self.channel_name)
                self.subscribed.add(name)
            joined.append(name)
        for reason, of_it in refused.items():
            stream_stats.add("refused", len(of_it))
            await self.send_json({"refused": of_it, "reason": reason})
        if joined:
            await self.send_json({"subscribed": joined})

    async def _reason_to_refuse(self, name: str) -> str | None:
        if not valid_group(name):
            return GROUP_NAMES
        if len(self.subscribed) >= self.max_groups:
            return f"at most {self.max_groups} groups"
        if not await self._permission.allows(self.subscriber, name):
            return "not permitted"
        return None

    async def unsubscribe(self, names: Any) -> None:
        """Leave these groups, if the client had asked for them."""
        left = [name for name in await self._listed(names) if name in self.subscribed]
        for name in left:
            self.subscribed.discard(name)
            if name not in self.groups:
                await self.channel_layer.group_discard(name, self.channel_name)
        if left:
            await self.send_json({"unsubscribed": left})

    async def _listed(self, names: Any) -> list[str]:
        """The names that a client has sent, each once; none if they cannot be names."""
        listed = names if isinstance(names, list) else [names]
        if len(listed) > self.max_groups or not all(isinstance(name, str) for name in listed):
            await self.send_json(
                {"error": f"Name a group, or a list of at most {self.max_groups}."}
            )
            return []
        return list(dict.fromkeys(listed))

    # -- from the groups ----------------------------------------------------------------------

    async def dispatch(self, message: Message) -> None:
        if getattr(self, get_handler_name(message), None) is None:
            await self.group_message(message)
        else:
            await super().dispatch(message)

    async def group_message(self, message: Message) -> None:
        """Called with each message that the consumer has no method for: passes it to the client.

        One of the type ``pgnotify.gap`` says that the layer may have missed messages.
        """
        await self.send_json(message)

    async def websocket_disconnect(self, message: Message) -> None:
        for name in self.subscribed.difference(self.groups):
            await self.channel_layer.group_discard(name, self.channel_name)
        self.subscribed.clear()
        await super().websocket_disconnect(message)
