"""What a worker does of its own, without a listener."""

from __future__ import annotations

import pytest

from django_pgnotify import Event
from django_pgnotify.dispatching.lane import Lane
from django_pgnotify.dispatching.runner import Runner
from django_pgnotify.registry import Receiver
from django_pgnotify.stats import Stats
from tests.unit.test_lane import PLENTY, event


async def test_a_failure_is_told_though_a_shutdown_has_just_cut_its_event_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``Lane.clear`` reads how many have been handled, and the worker goes on before it cuts."""

    def fail_when_cut(one: Event) -> None:
        if one.data == 2:
            [batch] = lane._in_hand
            del batch.events[1:]
            raise ValueError("as asked")

    lane = Lane(Receiver("uid", fail_when_cut, ("jobs",)), PLENTY, PLENTY)
    lane.put([event(0), event(1), event(2)])
    assert lane.hire() == 1
    stats = Stats()
    assert Runner(1, stats, lambda lane: None)._handle(lane, None) == "empty"
    assert (stats["handled"], stats["failed"]) == (2, 1)
    assert "failed on event 2 " in caplog.text
    assert lane.idle
