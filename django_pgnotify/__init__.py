"""PostgreSQL LISTEN/NOTIFY as the event bus of a Django project."""

from .caching.invalidation import invalidates
from .events import Event, Topic
from .forwarding import forward
from .listening.subscribe import subscribe
from .publishing.model_signals import notify_changes
from .publishing.publisher import apublish, apublish_many, publish, publish_many
from .publishing.quiet import no_notify
from .registry import receiver

__version__ = "0.1.0"

__all__ = [
    "Event",
    "Topic",
    "apublish",
    "apublish_many",
    "forward",
    "invalidates",
    "no_notify",
    "notify_changes",
    "publish",
    "publish_many",
    "receiver",
    "subscribe",
]
