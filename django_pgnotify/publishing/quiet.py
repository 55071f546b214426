"""``no_notify()``: model changes that nobody is to hear of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, TypeVar, cast

from ..registry import is_coroutine_callable

F = TypeVar("F", bound=Callable[..., Any])

_quiet: ContextVar[bool] = ContextVar("django_pgnotify_quiet", default=False)


def is_quiet() -> bool:
    """Whether model changes are silenced in this thread or task."""
    return _quiet.get()


class no_notify:  # noqa: N801 - a context manager and decorator, named as a function is
    """Publish nothing of the model changes made inside, in this thread or task.

    Use it as ``with no_notify():`` or as a decorator of a sync or async function. What
    ``publish()`` is told to send, it still sends.
    """

    def __init__(self) -> None:
        self._tokens: list[Token[bool]] = []

    def __enter__(self) -> None:
        self._tokens.append(_quiet.set(True))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _quiet.reset(self._tokens.pop())

    def __call__(self, func: F) -> F:
        if is_coroutine_callable(func):

            @functools.wraps(func)
            async def quietly(*args: Any, **kwargs: Any) -> Any:
                with no_notify():
                    return await func(*args, **kwargs)
        else:

            @functools.wraps(func)
            def quietly(*args: Any, **kwargs: Any) -> Any:
                with no_notify():
                    return func(*args, **kwargs)

        return cast("F", quietly)
