"""Group and key templates: format strings over the fields of an event, checked when written."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from .events import EVENT_FIELDS, Event
from .exceptions import InvalidTemplate

_formatter = string.Formatter()
_NAME = re.compile(r"\w+(\[[^\[\]]+\])*")


def check_template(template: object, what: str) -> str:
    """Return ``template`` if it is a format string that names fields of an event only.

    Args:
        what: how to call it in the message, such as ``"group="``.

    Raises:
        InvalidTemplate: it is no string, is empty, malformed, or names something else.
    """
    if not isinstance(template, str) or not template:
        raise InvalidTemplate(
            f"{what} takes a non-empty format string or a function of one event; got {template!r}."
        )
    try:
        parts = list(_formatter.parse(template))
    except ValueError as exc:
        raise InvalidTemplate(f"{what} {template!r} is malformed: {exc}.") from None
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if conversion not in (None, "r", "s", "a"):
            raise InvalidTemplate(f"{what} {template!r} is malformed: !{conversion} is unknown.")
        root = name.split("[", 1)[0]
        if root not in EVENT_FIELDS or not _NAME.fullmatch(name) or "{" in (spec or ""):
            raise InvalidTemplate(
                f"{what} {template!r} names {name!r}, which is no field of an event; "
                f"choose from {', '.join(EVENT_FIELDS)} (and data[name])."
            )
    return template


def literal_parts(template: str) -> list[str]:
    """The parts of a template that are the same for every event."""
    return [literal for literal, _, _, _ in _formatter.parse(template) if literal]


def literal_head(template: str) -> str:
    """What a template begins with, up to its first field."""
    head = []
    for literal, name, _, _ in _formatter.parse(template):
        head.append(literal)
        if name is not None:
            break
    return "".join(head)


def fields_in(template: str) -> set[str]:
    """Names of the event's fields that a template mentions."""
    return {name.split("[", 1)[0] for _, name, _, _ in _formatter.parse(template) if name}


def fields_of(event: Event) -> dict[str, Any]:
    """What a template may name, of one event."""
    return {name: getattr(event, name) for name in EVENT_FIELDS}


def fill(
    template: str,
    fields: Mapping[str, Any],
    escape: Callable[[str], str] = lambda text: text,
) -> str:
    """Format a template; the text of each field passes through ``escape``, the rest does not."""
    out = []
    for literal, name, spec, conversion in _formatter.parse(template):
        out.append(literal)
        if name is not None:
            value, _ = _formatter.get_field(name, (), fields)
            value = _formatter.convert_field(value, conversion)
            if isinstance(value, tuple):
                out.append(_join_composite([str(part) for part in value], escape))
            else:
                out.append(escape(format(value, spec or "")))
    return "".join(out)


def _join_composite(parts: list[str], escape: Callable[[str], str]) -> str:
    """The parts of a composite key with full stops between them, in a way that only it has."""
    if any("." in part for part in parts):
        return escape(repr(tuple(parts)))
    return ".".join(map(escape, parts))
