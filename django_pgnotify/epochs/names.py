"""What has an epoch: tags, keys of caches, whole caches. Strings, the same on every node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..exceptions import InvalidArgument
from ..registry import is_model, model_label

INVALIDATIONS = "pgnotify.epochs"
"""The topic on which names travel that no event of somebody else's stands for."""

EVERYTHING = "*"
"""Among the names of such an event: all there are."""


def model_tag(model: Any, pk: Any = None) -> str:
    """The tag that every change of a model bumps, or that those of one row do.

    Args:
        model: a model class, or its label (``"shop.Order"``).
        pk: primary key of a row; also a template, as in ``model_tag(Order, "{pk}")``.
    """
    label = model_label(model) if is_model(model) else str(model).lower()
    return f"model:{label}" if pk is None else f"model:{label}:{pk_text(pk)}"


def pk_text(pk: Any) -> str:
    """A primary key as text: the same of its Python value and of what JSON makes of that."""
    if isinstance(pk, (tuple, list)):
        return ".".join(map(pk_text, pk))
    iso = getattr(pk, "isoformat", None)
    return str(pk) if iso is None else str(iso())


def check_tags(tags: object, what: str = "tags=") -> tuple[str, ...]:
    """``tags`` as a tuple of text.

    Raises:
        InvalidArgument: it is a single string, or one of them is none or empty.
    """
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise InvalidArgument(f"{what} takes a list of tags; got {tags!r}.")
    found = tuple(tags)
    for tag in found:
        if not isinstance(tag, str) or not tag:
            raise InvalidArgument(f"A tag is a non-empty string; {what} has {tag!r}.")
    return found


def tag_name(tag: str) -> str:
    return f"t:{tag}"


def key_name(space: str, key: str) -> str:
    """Bumped when somebody stores or deletes ``key`` in the cache called ``space``."""
    return f"k:{space}:{key}"


def derived_name(space: str, key: str) -> str:
    """Bumped when a value was made of the one that was there: ``incr``, ``touch``."""
    return f"d:{space}:{key}"


def space_name(space: str) -> str:
    """Bumped by ``clear()``."""
    return f"c:{space}"
