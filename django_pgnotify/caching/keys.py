"""Keys and tags of ``cached`` functions: templates over their arguments, or made of all of them."""

from __future__ import annotations

import datetime
import decimal
import enum
import functools
import hashlib
import inspect
import string
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from ..exceptions import InvalidArgument, InvalidTemplate
from ..registry import describe

_formatter = string.Formatter()

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, decimal.Decimal, uuid.UUID,
    datetime.datetime, datetime.date, datetime.time, datetime.timedelta,
)  # fmt: skip

KeyMaker = Callable[..., str]


class Arguments:
    """The parameters of a function, and the values that a call gives them."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func
        self.name = describe(func)
        self.signature = inspect.signature(func)
        self.parameters = tuple(self.signature.parameters)

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Values by parameter, defaults included. Raises TypeError as a call would."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def template(self, text: object, what: str) -> str:
        """``text`` if it is a format string over the parameters.

        Raises:
            InvalidTemplate: it is not a string, is empty or malformed, or names something else.
        """
        if not isinstance(text, str) or not text:
            raise InvalidTemplate(f"{what} takes a non-empty format string; got {text!r}.")
        try:
            parts = list(_formatter.parse(text))
        except ValueError as exc:
            raise InvalidTemplate(f"{what} {text!r} is malformed: {exc}.") from None
        for _, name, _, _ in parts:
            root = None if name is None else name.split(".")[0].split("[")[0]
            if root is not None and root not in self.parameters:
                raise InvalidTemplate(
                    f"{what} {text!r} names {name!r}, which is no parameter of {self.name}; "
                    f"choose from {', '.join(self.parameters) or 'none: it has no parameters'}."
                )
        return text


def key_maker(arguments: Arguments, key: object) -> KeyMaker:
    """What makes the key of a call: of a template, a function of the same arguments, or of all.

    Raises:
        InvalidTemplate: the template cannot be filled.
        InvalidArgument: ``key`` is neither, a method's key would have to be made of ``self``, or
            the function's name does not stand for it alone.
    """
    if key is None:
        if arguments.parameters[:1] in (("self",), ("cls",)):
            raise InvalidArgument(
                f"{arguments.name} is a method: what of {arguments.parameters[0]!r} belongs into "
                f"the key only you know. Give key=, such as 'report:{{self.pk}}'."
            )
        _check_name(arguments)
        return lambda *args, **kwargs: default_key(arguments, arguments.of(args, kwargs))
    if callable(key):
        return lambda *args, **kwargs: _checked(arguments, key(*args, **kwargs))
    template = arguments.template(key, "key=")
    if not any(name is not None for _, name, _, _ in _formatter.parse(template)):
        if arguments.parameters:
            raise InvalidTemplate(
                f"key= {template!r} of {arguments.name} names none of its parameters "
                f"({', '.join(arguments.parameters)}): all calls would share one value."
            )
        return lambda *args, **kwargs: template
    return lambda *args, **kwargs: template.format_map(arguments.of(args, kwargs))


def _check_name(arguments: Arguments) -> None:
    """Raise InvalidArgument if the function has a name that another may have which does another
    thing: their values would be taken for each other's, across processes too."""
    what = _nameless(arguments.func)
    if what is not None:
        raise InvalidArgument(
            f"{arguments.name} is {what}, so its name does not tell it from others, which would "
            f"share its values. Give key=, such as 'total:{{pk}}', or decorate a function that a "
            f"module defines."
        )


def _nameless(func: Any) -> str | None:
    """What ``func`` is, or what it wraps, where that has no name of its own."""
    while True:
        owner = getattr(func, "__self__", None)
        if isinstance(func, functools.partial):
            return "a partial()"
        if owner is not None and not inspect.ismodule(owner):
            return f"a method of {owner!r}"
        if not hasattr(func, "__wrapped__"):
            break
        func = func.__wrapped__  # a decorator's own closure holds no more than this, as a rule
    name = getattr(func, "__qualname__", None)
    if not isinstance(name, str):
        return "an object that can be called"
    if name.endswith("<lambda>"):
        return "a lambda"
    if "<locals>" in name and getattr(func, "__closure__", None):
        names = ", ".join(func.__code__.co_freevars)
        return f"made anew with each {names} around it"
    return None


def _checked(arguments: Arguments, key: object) -> str:
    if not isinstance(key, str) or not key:
        raise InvalidArgument(
            f"The key= function of {arguments.name} returned {key!r}, and not a non-empty string."
        )
    return key


def default_key(arguments: Arguments, values: Mapping[str, Any]) -> str:
    """Module and name of the function, and a digest of the values.

    Raises:
        InvalidArgument: a value has no text that surely stands for it alone, as an object has not.
    """
    text = ",".join(f"{name}={_text(arguments, name, value)}" for name, value in values.items())
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return f"{arguments.name[-180:]}:{digest}"


def _text(arguments: Arguments, name: str, value: Any) -> str:
    """Text that no other value has; its type is part of it, so that 1, 1.0 and True differ."""
    kind = type(value)
    if kind in _PLAIN:
        return f"{kind.__name__}({value!r})"
    if isinstance(value, enum.Enum):
        return f"{kind.__module__}.{kind.__qualname__}.{value.name}"
    if kind in (tuple, list):
        return f"{kind.__name__}({','.join(_text(arguments, name, one) for one in value)})"
    if kind in (set, frozenset):
        return f"{kind.__name__}({','.join(sorted(_text(arguments, name, one) for one in value))})"
    if kind is dict:
        pairs = sorted(
            f"{_text(arguments, name, one)}:{_text(arguments, name, other)}"
            for one, other in value.items()
        )
        return f"dict({','.join(pairs)})"
    raise InvalidArgument(
        f"{arguments.name} was called with {name}= of type {kind.__qualname__}, which has no text "
        f"that surely stands for it alone. Pass its primary key, or give key= to cached()."
    )
