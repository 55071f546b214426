"""``forward(direct=True)`` between processes: each hears for itself, and nobody passes it on."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer

from django_pgnotify import publish, publish_many
from tests.integration.test_layer import stop_layers
from tests.processes import Process, database_environ, python

pytestmark = pytest.mark.django_db(transaction=True)

# Joins the groups it is told, says its channel, then what it hears, up to an "end".
PEER = """
import asyncio, json, sys
import django
django.setup()
from channels.layers import get_channel_layer
from django_pgnotify import forward

forward("jobs", group="jobs", type="job", data=lambda event: event.data, direct=True)

async def main():
    layer = get_channel_layer()
    channel = await layer.new_channel()
    for group in sys.argv[1:]:
        await layer.group_add(group, channel)
    print("channel", channel, flush=True)
    message = {}
    while message.get("event") != "end":
        message = await layer.receive(channel)
        print("heard", json.dumps(message["event"]), flush=True)

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def _stopped() -> Iterator[None]:
    yield
    stop_layers()


def peer(*groups: str) -> Process:
    return python("-c", PEER, *groups, env=database_environ())


def channel_of(process: Process) -> str:
    return process.wait_for_line(r"^channel (\S+)$")[1]


def heard(process: Process) -> list[object]:
    assert process.wait() == 0, process.report()
    return [json.loads(line[6:]) for line in process.stdout.splitlines() if line[:6] == "heard "]


def test_members_in_two_processes_hear_each_event_once_and_in_order() -> None:
    with peer("jobs") as one, peer("jobs") as two:
        for process in (one, two):
            channel_of(process)
        # Together fewer than a channel's capacity: a busy member may not have taken any so far.
        publish_many("jobs", range(50))
        publish("jobs", "x" * 20_000)
        publish("jobs", "end")
        for process in (one, two):
            assert heard(process) == [*range(50), "x" * 20_000, "end"]


def test_a_channel_that_another_process_has_added_hears_too() -> None:
    with peer() as process:
        async_to_sync(get_channel_layer().group_add)("jobs", channel_of(process))
        publish("jobs", 1)
        publish("jobs", "end")
        assert heard(process) == [1, "end"]
