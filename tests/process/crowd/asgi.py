"""For daphne and uvicorn."""

from __future__ import annotations

import json
import os
from typing import Any

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.process.crowd.settings")
django.setup()

from channels.generic.websocket import AsyncWebsocketConsumer  # noqa: E402
from channels.routing import ProtocolTypeRouter  # noqa: E402

GROUP = "crowd"


class Visitor(AsyncWebsocketConsumer):
    """Joins at once, leaves and joins again when told to, and passes everything on as JSON."""

    async def connect(self) -> None:
        await self.accept()
        await self.receive("join")

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if text_data == "join":
            await self.channel_layer.group_add(GROUP, self.channel_name)
            await self._tell("joined")
        else:
            await self.channel_layer.group_discard(GROUP, self.channel_name)
            await self._tell("left")

    async def disconnect(self, code: int) -> None:
        await self.channel_layer.group_discard(GROUP, self.channel_name)

    async def crowd_news(self, message: dict[str, Any]) -> None:
        await self._tell("news", message["n"])

    async def pgnotify_gap(self, message: dict[str, Any]) -> None:
        await self._tell("gap", [message["since"], message["until"]])

    async def _tell(self, kind: str, value: object = None) -> None:
        await self.send(text_data=json.dumps([kind, value]))


application = ProtocolTypeRouter({"websocket": Visitor.as_asgi()})
