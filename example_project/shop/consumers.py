"""The board's websocket. Everything it sends is rendered from the rows as they are at that moment.

A browser that connects, for the first time or again, joins the group first and gets the whole
board after: what happens in between comes twice, which does no harm, and nothing is missed.
"""

from __future__ import annotations

from typing import Any

from channels.db import database_sync_to_async

from django_pgnotify.streams.websocket import SubscriptionConsumer

from . import board
from .receivers import BOARD_GROUP
from .summary import summary

Message = dict[str, Any]


class BoardConsumer(SubscriptionConsumer):
    """Its one group is chosen here; a client that asks for another is refused."""

    groups = (BOARD_GROUP,)

    async def connect(self) -> None:
        await self.accept()
        await self.send_snapshot()

    async def receive_json(self, content: Any, **kwargs: Any) -> None:
        """The page asks for the whole board when it was asleep, and once in a while to be sure."""
        if isinstance(content, dict) and content.get("type") == "snapshot":
            await self.send_snapshot()
        else:
            await super().receive_json(content, **kwargs)

    async def pgnotify_gap(self, message: Message) -> None:
        """The layer may have missed something."""
        await self.send_snapshot()

    async def order_changed(self, message: Message) -> None:
        event = message["event"]
        await self.send_card(event["pk"], event)

    async def slip_printed(self, message: Message) -> None:
        event = message["event"]
        await self.send_card(event["data"]["order"], event)

    async def activity_added(self, message: Message) -> None:
        event = message["event"]
        html = await database_sync_to_async(board.ticker_entry)(event["pk"])
        if html is not None:
            await self.send_json({"type": "activity", "pk": event["pk"], "html": html})

    async def summary_changed(self, message: Message) -> None:
        if message["event"]["data"].get("whole_board"):
            await self.send_snapshot()
            return
        figures, _ = await database_sync_to_async(summary)()
        await self.send_json({"type": "summary", "summary": figures})

    async def send_snapshot(self) -> None:
        figures, _ = await database_sync_to_async(summary)()
        content = await database_sync_to_async(board.snapshot)(figures["by_status"])
        await self.send_json({"type": "snapshot", "summary": figures, **content})

    async def send_card(self, order_pk: int, event: Message) -> None:
        card = await database_sync_to_async(board.card)(order_pk)
        status, html = card or (None, None)
        await self.send_json(
            {
                "type": "order",
                "pk": order_pk,
                "status": status,
                "html": html,
                "published_at": event["published_at"],
            }
        )
