"""What JSON has no word for, as JSON values."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder

from ..strict_json import Encoder

_django_json = DjangoJSONEncoder()


def to_plain(value: Any) -> Any:
    """``value`` as DjangoJSONEncoder writes it, but with microseconds kept; or a TypeError."""
    if isinstance(value, datetime):
        return value.isoformat()
    return _django_json.default(value)


ENCODER = Encoder(to_plain)
