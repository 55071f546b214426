"""Sends numbered news to the crowd, and waits between one part and the next until it may go on."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.core.management.base import BaseCommand
from django.db import connection

from tests.process.crowd.asgi import GROUP


class Command(BaseCommand):
    """It prints a line for each message: its number, and the times before and after it left.

    Between parts it waits for the advisory lock whose number is that of the part that comes next,
    on a connection that it has already.
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("parts", nargs="+", type=int, help="messages of each part")
        parser.add_argument("--first", type=int, default=0, help="number of the first message")

    def handle(self, *args: Any, **options: Any) -> None:
        send = async_to_sync(get_channel_layer().group_send)
        number = options["first"]
        for part, count in enumerate(options["parts"]):
            with connection.cursor() as cursor:
                self.stdout.write(f"waiting for {part}")
                self.stdout.flush()
                cursor.execute("SELECT pg_advisory_lock_shared(%s)", [part])
            for n in range(number, number + count):
                before = time.time()
                send(GROUP, {"type": "crowd.news", "n": n})
                self.stdout.write(f"sent {json.dumps([n, before, time.time()])}")
            self.stdout.flush()
            number += count
        self.stdout.write("done")
