"""Django signals that tell what the bus itself does. Connect to them to report or to measure."""

from django.dispatch import Signal

receiver_failed = Signal()
"""A receiver raised. Sender: the function. Arguments: ``event``, ``exception``, ``attempt``
(1 for the first), ``will_retry``."""

cache_invalidated = Signal()
"""Keys were deleted from a cache. Sender: the source given to ``invalidates``. Arguments:
``event``, ``cache`` (alias), ``keys`` (list; None where a gap cleared the whole alias), ``tags``
(list)."""

listener_established = Signal()
"""A listener is proven to hear its topics. Sender: the listener. Arguments: ``using`` (alias)."""

listener_gap = Signal()
"""A listener may have missed frames. Sender: the listener. Arguments: ``since``, ``until``
(aware datetimes; since may be None), ``cause`` (text)."""
