"""Who may hear which group: asked whenever a browser names one, and no unless somebody says yes."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from asgiref.sync import sync_to_async
from django.db import close_old_connections
from django.utils.module_loading import import_string

from ..conf import conf
from ..exceptions import InvalidArgument, InvalidSetting
from ..registry import describe, is_coroutine_callable

logger = logging.getLogger("django_pgnotify.streams")

valid_group = re.compile(r"[a-zA-Z0-9._-]{1,99}", re.ASCII).fullmatch
"""Whether Channels takes a text as the name of a group."""

GROUP_NAMES = "a group's name has 1 to 99 ASCII letters, digits, hyphens, underscores or dots"


@dataclass(frozen=True, slots=True)
class Subscriber:
    """Who asks.

    Attributes:
        user: the user who is logged in, or an ``AnonymousUser``; None where there are no users.
        scope: the ASGI scope of the connection: headers, path, client.
        kwargs: what the URL pattern has captured.
    """

    user: Any
    scope: Mapping[str, Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


Rule = Callable[[Subscriber, str], bool | Awaitable[bool]]
Permit = Rule | Mapping[str, Rule | str | bool] | str | None


class Permission:
    """Answers whether a subscriber may hear a group.

    Args:
        permit: a function ``(subscriber, group) -> bool``, sync or async, or the dotted path of
            one; or a mapping of patterns to such functions, to True or to False. A pattern is a
            name, in which ``*`` stands for one or more characters other than a full stop; the
            first that fits decides. None asks ``PGNOTIFY_SUBSCRIBE_PERMISSION``.

    Raises:
        InvalidArgument: it is none of these.
    """

    def __init__(self, permit: Permit) -> None:
        self._rules = None if permit is None else _rules(permit, "permit=")

    async def allows(self, subscriber: Subscriber, group: str) -> bool:
        """Whether ``subscriber`` may hear ``group``. A rule that raises, or answers with anything
        but True, refuses; the error is logged."""
        rules = self._rules if self._rules is not None else _configured()
        for fits, rule in rules:
            if fits(group):
                return rule if isinstance(rule, bool) else await _ask(rule, subscriber, group)
        return False


def project_rules_problem() -> str | None:
    """What is wrong with what ``PGNOTIFY_SUBSCRIBE_PERMISSION`` names; None if nothing is.

    Raises:
        InvalidSetting: it is no name at all.
    """
    path = conf.SUBSCRIBE_PERMISSION
    try:
        if path is not None:
            _rules_at(path)
    except InvalidArgument as exc:
        return str(exc)
    return None


_Rules = tuple[tuple[Callable[[str], object], Rule | bool], ...]


def _configured() -> _Rules:
    path = conf.SUBSCRIBE_PERMISSION
    return () if path is None else _rules_at(path)


@lru_cache(maxsize=16)
def _rules_at(path: str) -> _Rules:
    try:
        return _rules(path, "it")
    except InvalidArgument as exc:
        raise InvalidSetting(f"PGNOTIFY_SUBSCRIBE_PERMISSION = {path!r}: {exc}") from exc


def _rules(permit: object, what: str) -> _Rules:
    permit = _imported(permit, what)
    if not isinstance(permit, Mapping):
        return ((lambda group: True, _check_rule(permit, what)),)
    rules = []
    for pattern, rule in permit.items():
        if not isinstance(pattern, str) or not re.fullmatch(r"[a-zA-Z0-9._*-]+", pattern):
            raise InvalidArgument(
                f"{what} has the pattern {pattern!r}; a pattern is a group's name, in which * "
                f"stands for a part without a full stop."
            )
        expression = re.escape(pattern).replace(r"\*", "[a-zA-Z0-9_-]+")
        if not isinstance(rule, bool):
            rule = _check_rule(_imported(rule, what), f"{what}[{pattern!r}]")  # noqa: PLW2901
        rules.append((re.compile(expression, re.ASCII).fullmatch, rule))
    return tuple(rules)


def _imported(value: object, what: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return import_string(value)
    except ImportError as exc:
        raise InvalidArgument(f"{what} names {value!r}, which cannot be imported: {exc}.") from exc


def _check_rule(rule: Any, what: str) -> Rule:
    if not callable(rule) or inspect.isclass(rule):
        raise InvalidArgument(
            f"{what} takes a function of a subscriber and a group's name; got {rule!r}."
        )
    try:
        inspect.signature(rule).bind(object(), "")
    except TypeError as exc:
        raise InvalidArgument(
            f"{describe(rule)} cannot be called with a subscriber and a group's name: {exc}."
        ) from None
    except ValueError:
        pass  # it has no signature to look at
    found: Rule = rule
    return found


async def _ask(rule: Rule, subscriber: Subscriber, group: str) -> bool:
    try:
        if is_coroutine_callable(rule):
            answer: Any = rule(subscriber, group)
        else:
            answer = await sync_to_async(_in_thread)(rule, subscriber, group)
        if inspect.isawaitable(answer):
            answer = await answer
            # There is no request whose end would do so.
            await sync_to_async(close_old_connections)()
        if not isinstance(answer, bool):
            raise TypeError(f"it returned {answer!r}; a permission is True or False")
    except Exception:
        logger.exception("Permission %s failed, so it refuses", describe(rule))
        return False
    return answer


def _in_thread(rule: Rule, subscriber: Subscriber, group: str) -> object:
    close_old_connections()
    try:
        return rule(subscriber, group)
    finally:
        close_old_connections()
