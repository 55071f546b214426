"""Strict JSON text: what cannot be carried is refused by name, what is read never surprises."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from .exceptions import EventDataError

try:
    import msgspec
except ImportError:  # the extra "fast"
    msgspec = None  # type: ignore[assignment]

MAX_DEPTH = 200
"""Levels of nesting that are accepted; Python's own decoder gives up not far above."""

MAX_INT_BITS = 8192
"""Python itself refuses to read a number of more than 4300 digits (14,284 bits) from text."""

ToPlain = Callable[[Any], Any]

text_of = json.encoder.encode_basestring
"""A string as JSON text, quoted, without escapes for what UTF-8 can carry."""


class Encoder:
    """Encodes values with one ``to_plain``.

    Attributes:
        to_plain: turns a value that JSON does not know into one that it does, or raises TypeError.
        quick: encodes a value that is probably sound. It raises what the standard library raises,
            and lets through what :func:`dumps` refuses or escapes: deep nesting, lone surrogates.
            (``json.dumps`` builds two encoders at each call, for more than the encoding costs.)
    """

    def __init__(self, to_plain: ToPlain) -> None:
        self.to_plain = to_plain
        self.quick: Callable[[Any], str] = json.JSONEncoder(
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
            default=to_plain,
            check_circular=False,
        ).encode
        make = json.encoder.c_make_encoder  # type: ignore[attr-defined]
        if make is not None:  # an interpreter may lack the accelerator
            chunks = make(None, to_plain, text_of, None, ":", ",", False, False, False)
            self.quick = lambda value: "".join(chunks(value, 0))


def dumps(value: dict[str, Any], to_plain: ToPlain) -> str:
    """Encode ``value`` as compact JSON text.

    Args:
        to_plain: turns a value that JSON does not know into one that it does, or raises TypeError.

    Raises:
        EventDataError: something in it cannot be carried; the message names its path.
    """
    try:
        text = json.dumps(
            value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=to_plain
        )
    except (TypeError, ValueError, RecursionError) as exc:
        raise EventDataError(_why_not_json(value, to_plain) or str(exc)) from exc
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate: only an escape can carry it
            text = json.dumps(value, allow_nan=False, separators=(",", ":"), default=to_plain)
    if text.count("[") + text.count("{") > MAX_DEPTH:
        problem = _why_not_json(value, to_plain)
        if problem:
            raise EventDataError(problem)
    return text


def loads(text: str) -> Any:
    """Decode JSON text.

    Raises:
        NestedTooDeeply: it has more than ``MAX_DEPTH`` levels, and the three of a frame around
            them; Python's own limit differs from version to version.
        ValueError: it is not JSON, NaN and numbers of thousands of digits included. The error
            never holds the text; JSONDecodeError would, in its ``doc``.
    """
    try:
        value = _decode(text)
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth_exceeds(value, MAX_DEPTH + 3):
            raise RecursionError
        return value
    except RecursionError:
        raise NestedTooDeeply("nested too deeply") from None
    except ValueError as exc:
        raise ValueError(f"not JSON ({type(exc).__name__})") from None


class NestedTooDeeply(ValueError):
    """JSON, but no decoder here can hold it."""


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one.values()
            elif isinstance(one, list):
                below += one
        level = [one for one in below if isinstance(one, (dict, list))]
        if not level:
            return False
    return True


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_standard: Callable[[str], Any] = json.JSONDecoder(parse_constant=_refuse_constant).decode


def _with_msgspec(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError:
        # It refuses what the standard library reads (a lone surrogate's escape, 1e999), and that
        # one's errors are what callers know.
        return _standard(text)


_decode = _standard if msgspec is None else _with_msgspec


def _why_not_json(fields: Mapping[str, Any], to_plain: ToPlain) -> str | None:
    """The first thing in ``fields`` that JSON cannot carry, with its path; None if all is well.

    Iterative, because the very thing it looks for may be nested too deeply to recurse into.
    """
    stack: list[tuple[str, Any, tuple[int, ...]]] = [
        (name, value, ()) for name, value in reversed(list(fields.items()))
    ]
    while stack:
        path, value, above = stack.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return f"{path} is {value!r}, which JSON has no word for. Send None or a string."
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            return f"{path} is a number of more than {MAX_INT_BITS} bits. Send it as a string."
        if isinstance(value, (str, int, float)) or value is None:
            continue
        if isinstance(value, (dict, list, tuple)):
            if id(value) in above:
                return f"{path} contains itself, so JSON cannot carry it."
            if len(above) >= MAX_DEPTH:
                return f"{_shorten(path)} is nested deeper than {MAX_DEPTH} levels."
            inside = (*above, id(value))
            if isinstance(value, dict):
                for name in value:
                    if not isinstance(name, (str, int, float)) and name is not None:
                        return f"{path} has the key {name!r}; the keys of a JSON object are text."
                    if isinstance(name, float) and not math.isfinite(name):
                        return f"{path} has the key {name!r}, which JSON has no word for."
                members = [(f"{path}[{name!r}]", member) for name, member in value.items()]
            else:
                members = [(f"{path}[{index}]", member) for index, member in enumerate(value)]
            stack.extend((where, member, inside) for where, member in reversed(members))
            continue
        try:
            stack.append((path, to_plain(value), above))
        except (TypeError, ValueError):
            return (
                f"{path} is {_shorten(repr(value))} ({type(value).__name__}), "
                f"which JSON cannot carry. Send plain values: text, numbers, lists, dicts."
            )
    return None


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"
