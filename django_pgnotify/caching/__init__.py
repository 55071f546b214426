"""Django caches that are told when what they hold has changed."""

from ..epochs.names import model_tag
from ..epochs.table import EpochTable
from .cached import aget_or_set, cached, get_or_set
from .fragments import fragment_key
from .loading import alookup, lookup, take_lease
from .near import NearCache
from .reporting import cache_counts
from .tags import ainvalidate_tags, invalidate_keys, invalidate_tags
from .views import cached_view

__all__ = [
    "EpochTable",
    "NearCache",
    "aget_or_set",
    "ainvalidate_tags",
    "alookup",
    "cache_counts",
    "cached",
    "cached_view",
    "fragment_key",
    "get_or_set",
    "invalidate_keys",
    "invalidate_tags",
    "lookup",
    "model_tag",
    "take_lease",
]
