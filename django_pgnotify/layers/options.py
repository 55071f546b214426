"""What a layer was configured with, as its parts need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..stats import Stats
from ..wire import wire_channel
from .codec import Crypt

TOKEN_LENGTH = 16
"""Characters of what the names of the channels of one loop contain: hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class Options:
    """See :class:`django_pgnotify.layers.PostgresChannelLayer`; times are in seconds."""

    prefix: str
    channel_prefix: str
    """``PGNOTIFY_CHANNEL_PREFIX`` as it was when the layer was made."""
    expiry: float
    group_expiry: float
    capacity_of: Callable[[str], int]
    """Messages that may wait for a channel of this name."""
    shards: int
    gap_messages: bool | tuple[str, ...]
    """Whether members of groups are told of gaps, or patterns of the groups whose are."""
    crypt: Crypt | None
    stats: Stats

    @property
    def wire(self) -> str:
        """The wire channel that all processes listen to; it marks the layer's rows, too."""
        return wire_channel(f"pgnotify.layer.{self.prefix}", self.channel_prefix)

    def wire_of(self, part: int | str) -> str:
        """The wire channel of a shard, or of a process by its token."""
        # The part comes before the prefix, which may look like anything.
        return wire_channel(f"pgnotify.layer-{part}.{self.prefix}", self.channel_prefix)

    def wire_of_owner(self, channel: str) -> bytes | None:
        """The wire channel of the process whose channel this is; None if no process has such."""
        token = channel.partition("!")[0][-TOKEN_LENGTH:]
        if len(token) < TOKEN_LENGTH or not set(token) <= set("0123456789abcdef"):
            return None
        return self.wire_of(token).encode()


def patterns_of(gap_messages: bool | Iterable[str]) -> bool | tuple[str, ...]:
    """The option ``gap_messages``, checked; raises TypeError."""
    if isinstance(gap_messages, bool):
        return gap_messages
    patterns = None if isinstance(gap_messages, (str, bytes, Mapping)) else tuple(gap_messages)
    if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"gap_messages= is a bool or a list of patterns of group names; got {gap_messages!r}."
        )
    return patterns
