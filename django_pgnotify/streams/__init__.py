"""Events to browsers: server-sent events, websockets, and who may hear what."""

from .permission import Subscriber
from .view import event_stream

__all__ = ["Subscriber", "event_stream"]
