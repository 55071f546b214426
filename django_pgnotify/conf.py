"""The ``PGNOTIFY_*`` settings: read live, with types and defaults. Nothing else reads them."""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

from django.conf import settings
from django.utils.functional import empty

from .events import DELIVERIES, Delivery, check_delivery
from .exceptions import InvalidSetting, PgNotifyError

T = TypeVar("T")

PREFIX = "PGNOTIFY_"

_ABSENT = object()

AUTO = "auto"
"""The epoch table in a file of its own for each listen database, user and channel prefix."""


class Setting(Generic[T]):
    """One setting: a descriptor that reads ``settings.PGNOTIFY_<NAME>`` at each access.

    Args:
        default: value where the setting is absent; a function is called for it.
        parse: returns the value if it is valid, raises ValueError or TypeError otherwise.
    """

    name: str

    def __init__(self, default: T | Callable[[], T], parse: Callable[[Any], T]) -> None:
        self._default = default
        self._parse = parse

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = PREFIX + name

    @overload
    def __get__(self, instance: None, owner: type) -> Setting[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Setting[T] | T:
        if instance is None:
            return self
        # Past the lazy object and its Python-level attribute look-up: some are read at each event.
        wrapped = object.__getattribute__(settings, "_wrapped")
        value = getattr(settings if wrapped is empty else wrapped, self.name, _ABSENT)
        if value is _ABSENT:
            return self._default() if callable(self._default) else self._default
        try:
            return self._parse(value)
        except (TypeError, ValueError) as exc:
            raise InvalidSetting(f"{self.name} = {value!r}: {exc}") from exc


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a non-empty string.")
    return value


def _text_or_empty(value: Any) -> str:
    if not isinstance(value, str) or "\x00" in value:
        raise ValueError("expected a string without NUL.")
    if len(value.encode()) > 24:
        raise ValueError("longer than 24 bytes; a channel name has 63 for prefix and topic.")
    return value


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _table(value: Any) -> str | None:
    if value is None or value == AUTO:
        return None if value is None else AUTO
    if not isinstance(value, (str, os.PathLike)) or not os.path.isabs(value):
        raise ValueError("expected an absolute path, None (in each process) or 'auto'.")
    return str(os.fspath(value))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected True or False.")
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise ValueError("expected a number of seconds above 0.")
    return float(value)


def _optional_seconds(value: Any) -> float | None:
    return None if value is None else _seconds(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("expected a whole number of at least 1.")
    return value


def _models(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise ValueError("expected a dict such as {'auth.User': {'fields': ['email']}}.")
    for label, options in value.items():
        if not isinstance(label, str) or label.count(".") != 1:
            raise ValueError(f"{label!r} is not a model label such as 'auth.User'.")
        if not isinstance(options, dict):
            raise ValueError(f"the options of {label!r} are {options!r}; expected a dict.")
        unknown = set(options) - MODEL_OPTIONS
        if unknown:
            raise ValueError(
                f"{label!r} has the unknown option {min(unknown)!r}; "
                f"choose from {', '.join(sorted(MODEL_OPTIONS))}."
            )
    return value


MODEL_OPTIONS = frozenset({"fields", "topic", "actions", "delivery", "using"})


class Conf:
    """All settings of django-pgnotify, by name without the prefix."""

    DATABASE = Setting("default", _text)
    """Alias that ``publish()`` sends on."""
    LISTEN_DATABASE = Setting(None, _optional_text)
    """Alias that listeners connect to, past a pooler; None means ``DATABASE``."""
    DELIVERY: Setting[Delivery] = Setting("after_commit", check_delivery)
    """Tier of every topic that does not name its own."""
    MODELS = Setting[dict[str, dict[str, Any]]](dict, _models)
    """Models of other apps that publish their changes: label to ``notify_changes`` options."""
    CHANNEL_PREFIX = Setting("", _text_or_empty)
    """Put before every wire channel, so that several deployments can share a database."""
    SIGNING = Setting(False, _flag)
    """Sign frames with SECRET_KEY, and drop those that are not."""
    BACKGROUND_SENDER = Setting(False, _flag)
    """Send ``after_commit`` events from a thread of their own, on a connection of their own."""
    PUBLISH_RAW = Setting(False, _flag)
    """Publish rows saved by ``loaddata`` too."""
    SUBSCRIBE_PERMISSION = Setting(None, _optional_text)
    """Dotted path of what decides which groups a browser may hear; None refuses them all."""
    GAP_ON_START = Setting(False, _flag)
    """Tell of a gap when ``pglisten`` starts, because nobody knows who listened before."""
    NODE = Setting(socket.gethostname, _text)
    """Name of this machine or container."""
    HEARTBEAT_INTERVAL = Setting(10.0, _seconds)
    """Seconds between two proofs that the listening connection is alive."""
    HEARTBEAT_TIMEOUT = Setting(5.0, _seconds)
    """Seconds within which a proof, or any statement of the listener, must be answered."""
    CONNECT_TIMEOUT = Setting(10.0, _seconds)
    """Seconds that one attempt to connect may take."""
    RECONNECT_MAX_DELAY = Setting(30.0, _seconds)
    """Upper bound, in seconds, of the pause between two attempts to connect."""
    LEADER_POLL_INTERVAL = Setting(1.0, _seconds)
    """Seconds between two attempts of a standby to become the leader."""
    CONCURRENCY = Setting(8, _count)
    """Receivers that may run at once in one listener."""
    SHUTDOWN_TIMEOUT = Setting(30.0, _seconds)
    """Seconds that running receivers get to finish after the first signal."""
    QUEUE_MAX_EVENTS = Setting(100_000, _count)
    """Events that may wait for one receiver, or for the background sender of a process."""
    QUEUE_MAX_BYTES = Setting(64 * 1024 * 1024, _count)
    """Bytes of payload that may wait for one receiver; beyond it events are dropped likewise."""
    STORED_RETENTION = Setting(3600.0, _seconds)
    """Seconds for which an event too big for NOTIFY is kept in its table."""
    SWEEP_INTERVAL = Setting(5.0, _seconds)
    """Seconds after which a durable consumer looks into the log though nothing woke it."""
    LOG_RETENTION = Setting(7 * 86400.0, _seconds)
    """Seconds for which an event stays in the log, also when every consumer has passed it."""
    LOG_LIMIT = Setting(30 * 86400.0, _optional_seconds)
    """Seconds after which it is removed though a consumer has not passed it; None for never."""

    EPOCH_TABLE = Setting[str | None](AUTO, _table)
    """File of the node's epoch table; None keeps one in each process, with a listener for it."""
    EPOCH_SLOTS = Setting(65_536, _count)
    """Slots of the epoch table: names that can be invalidated apart from each other, about."""
    MAX_STALENESS = Setting(30.0, _optional_seconds)
    """Seconds without a heartbeat after which caches are bypassed; None for never."""

    CLOCK_SKEW = Setting(1.0, _seconds)
    """Seconds by which the clocks of two nodes may differ, for what one of them has cached."""

    @property
    def listen_database(self) -> str:
        """The alias that listeners connect to."""
        return self.LISTEN_DATABASE or self.DATABASE

    def rows_database(self, using: str) -> str:
        """The alias to read rows from for what is heard on ``using``.

        The direct alias past a pooler is for listening connections alone.
        """
        return self.DATABASE if using == self.listen_database else using

    @property
    def source(self) -> str:
        """``node:pid`` of this process."""
        return f"{self.NODE}:{os.getpid()}"


conf = Conf()

SETTINGS: dict[str, Setting[Any]] = {
    setting.name: setting for setting in vars(Conf).values() if isinstance(setting, Setting)
}


def problems() -> list[str]:
    """What is wrong with the settings of this project, one sentence each."""
    found = []
    for name in dir(settings):
        if name.startswith(PREFIX) and name not in SETTINGS:
            known = [setting.removeprefix(PREFIX) for setting in SETTINGS]
            near = difflib.get_close_matches(name.removeprefix(PREFIX), known, n=1)
            hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
            found.append(f"Unknown setting {name}.{hint}")
    for setting in SETTINGS.values():
        try:
            setting.__get__(conf, Conf)
        except PgNotifyError as exc:
            found.append(str(exc))
    return found


__all__ = ["DELIVERIES", "SETTINGS", "Conf", "conf", "problems"]
