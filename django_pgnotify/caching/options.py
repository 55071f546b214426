"""What can be said of a NearCache in CACHES."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from ..conf import conf
from ..exceptions import InvalidSetting

DEFAULT_MAX_ENTRIES = 10_000

_ABSENT = object()
_OWN = ("SECOND_LEVEL", "MAX_STALENESS", "JITTER")


class NearOptions(NamedTuple):
    """The options of a NearCache, checked."""

    params: dict[str, Any]
    """What Django's BaseCache is to be given."""
    second_level: str | None
    max_staleness: float | None
    """Seconds; None for never bypassed."""
    jitter: float
    max_entries: int = DEFAULT_MAX_ENTRIES
    cull_frequency: int = 3

    @classmethod
    def of(cls, params: dict[str, Any]) -> Self:
        """Read them.

        Raises:
            InvalidSetting: one of them has a value that cannot work.
        """
        options = dict(params.get("OPTIONS", {}))
        second = options.pop("SECOND_LEVEL", params.get("SECOND_LEVEL"))
        staleness = options.pop("MAX_STALENESS", params.get("MAX_STALENESS", _ABSENT))
        jitter = options.pop("JITTER", params.get("JITTER", 0))
        options.setdefault("MAX_ENTRIES", DEFAULT_MAX_ENTRIES)
        if second is not None and (not isinstance(second, str) or not second):
            raise InvalidSetting(f"SECOND_LEVEL takes an alias of CACHES; got {second!r}.")
        if staleness is _ABSENT:
            staleness = conf.MAX_STALENESS
        elif staleness is not None and not (_is_number(staleness) and staleness > 0):
            raise InvalidSetting(
                f"MAX_STALENESS takes a number of seconds above 0, or None; got {staleness!r}."
            )
        if not (_is_number(jitter) and 0 <= jitter < 1):
            raise InvalidSetting(f"JITTER takes a fraction from 0 to below 1; got {jitter!r}.")
        rest = {name: value for name, value in params.items() if name not in _OWN}
        return cls(rest | {"OPTIONS": options}, second, staleness, float(jitter))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
