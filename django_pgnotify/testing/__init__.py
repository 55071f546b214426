"""For the tests of projects that use the bus."""

from .bus import InMemoryBus
from .capture import CapturedEvents, capture_events
from .listener import RunningListener, running_listener

__all__ = [
    "CapturedEvents",
    "InMemoryBus",
    "RunningListener",
    "capture_events",
    "running_listener",
]
