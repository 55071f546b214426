"""Keep the shop busy: customers order, the bench packs, the courier calls."""

from __future__ import annotations

import random
import signal
import threading
from types import FrameType
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from ... import orders
from ...models import Order, Status

# How often each thing happens, relative to the others.
ACTIONS = {"place": 4, Status.NEW: 4, Status.PAID: 4, Status.PACKED: 4, "cancel": 1}


class Command(BaseCommand):
    help = "Keep placing and advancing orders until it is stopped, so that the board lives."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--interval", type=float, default=2.0, help="seconds between changes, on average"
        )
        parser.add_argument("--count", type=int, help="stop after so many changes")

    def handle(self, *args: Any, **options: Any) -> None:
        stop = threading.Event()

        def request_stop(signum: int, frame: FrameType | None) -> None:
            stop.set()

        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, request_stop)
        done = 0
        while options["count"] is None or done < options["count"]:
            if stop.wait(options["interval"] * random.uniform(0.3, 1.7)):
                break
            order = self.step()
            if order is not None:
                done += 1
                self.stdout.write(f"simulate: {order.number} is {order.status}")

    def step(self) -> Order | None:
        action = random.choices(list(ACTIONS), weights=list(ACTIONS.values()))[0]
        if action == "place":
            return orders.place()
        status = Status.NEW if action == "cancel" else action
        # The oldest first, as a shop would.
        oldest = Order.objects.filter(status=status).order_by("changed_at").first()
        if oldest is None:
            return None
        try:
            return orders.cancel(oldest.pk) if action == "cancel" else orders.advance(oldest.pk)
        except orders.OrderRefusedError:
            return None  # a person was quicker
