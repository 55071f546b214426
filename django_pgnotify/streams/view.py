"""``event_stream()``: an async view that sends events to browsers as server-sent events."""

from __future__ import annotations

import asyncio
import inspect
import logging
import weakref
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, InterfaceError
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed, StreamingHttpResponse
from django.http.response import HttpResponseBase

from ..conf import conf
from ..events import check_actions
from ..exceptions import InvalidArgument, ListenError, PgNotifyError
from ..forwarding import Group, check_group
from ..listening.connection import first_line
from ..publishing.sender import check_alias
from ..registry import Source, check_signature, check_sources, describe
from .hub import Hub, stream_stats
from .permission import GROUP_NAMES, Permission, Permit, Subscriber, valid_group
from .stream import BrowserStream, Data, Filter, Options

logger = logging.getLogger("django_pgnotify.streams")

View = Callable[..., Coroutine[Any, Any, HttpResponseBase]]

_PARAMETER = "group"


def event_stream(
    source: Source | Iterable[Source],
    *,
    group: Group | None = None,
    filter: Filter | None = None,
    data: Data | None = None,
    actions: Iterable[str] | None = None,
    permit: Permit = None,
    durable: bool | None = None,
    using: str | None = None,
    heartbeat: float = 15.0,
    retry: float = 2.0,
    max_waiting: int = 1000,
    max_groups: int = 100,
    max_age: float | None = None,
) -> View:
    """An async view that streams the events of a source to a browser (``text/event-stream``).

    ::

        path("events/", login_required(event_stream(Order)))

    All streams of a process share its one listening connection. Each block is the JSON of an
    event; ``event: gap`` stands where some may be missing. Of durable topics a browser that comes
    back gets what it has missed, from the event log; of others it gets a gap.

    Args:
        source: a model class, a topic, or a list of them.
        group: which groups an event is of, as for ``forward``. The browser then has to name the
            ones it wants (``?group=order.7&group=order.8``), and ``permit`` has to allow each.
            None sends every event to whoever may open the view.
        filter: a function of an event and a :class:`Subscriber`; False keeps the event from it.
        data: returns what to send instead of the event's fields, as for ``forward``.
        actions: only these actions; gaps are told in any case.
        permit: who may hear which group (see :class:`Permission`); None asks
            ``PGNOTIFY_SUBSCRIBE_PERMISSION``, and where that is not set nobody may.
        durable: as for ``receiver``: None reads durable topics from the event log, False hears
            them live, True reads all topics from the log.
        using: alias to listen on; default ``PGNOTIFY_LISTEN_DATABASE`` or ``PGNOTIFY_DATABASE``.
        heartbeat: seconds without an event after which a sign of life is sent.
        retry: seconds that a browser is told to wait before it comes back.
        max_waiting: events that may wait for one slow browser. When there are more, a durable
            stream goes back to the log; another ends, with a gap.
        max_groups: how many groups one stream may name.
        max_age: seconds after which a stream ends, so that its browser comes back and is asked
            for its permission again; None for never.

    ``filter``, ``group`` and ``data`` run on the event loop, so they must not block: no queries.

    Raises:
        InvalidTopic, InvalidAction, InvalidTemplate, InvalidReceiver, InvalidArgument: bad
            arguments.
        UnsupportedDatabase: (at the first request) the alias is not a PostgreSQL one.
        PgNotifyError: (at a request) it is served by WSGI, which cannot stream for long.
    """
    sources = check_sources(source)
    if group is not None:
        check_group(group)
    if data is not None:
        check_signature(data)
    if filter is not None:
        _check_filter(filter)
    if durable not in (None, True, False):
        raise InvalidArgument(f"durable= takes None, True or False; got {durable!r}.")
    _check_count("max_groups", max_groups)
    _check_count("max_waiting", max_waiting)
    options = Options(
        group=group,
        filter=filter,
        data=data,
        actions=check_actions(actions),
        heartbeat=_seconds("heartbeat", heartbeat),
        retry=_seconds("retry", retry),
        max_waiting=max_waiting,
        max_age=None if max_age is None else _seconds("max_age", max_age),
    )
    permission = Permission(permit)
    hubs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = weakref.WeakKeyDictionary()

    def hub_here() -> Hub:
        loop = asyncio.get_running_loop()
        if loop not in hubs:
            alias = check_alias(conf.listen_database if using is None else using)
            hubs[loop] = Hub(sources, durable, alias)
        return hubs[loop]

    async def stream(request: HttpRequest, **kwargs: Any) -> HttpResponseBase:
        if request.method != "GET":
            return HttpResponseNotAllowed(["GET"])
        scope = getattr(request, "scope", None)
        if scope is None:
            raise PgNotifyError(
                f"{request.path} is a stream of events, which needs ASGI: a WSGI server would "
                f"keep a worker for each browser. Serve it with daphne, uvicorn or hypercorn."
            )
        subscriber = Subscriber(await _user_of(request), scope, kwargs)
        groups = None
        if group is not None:
            groups = frozenset(request.GET.getlist(_PARAMETER))
            refusal = await _refusal(permission, subscriber, groups, max_groups)
            if refusal is not None:
                return refusal
        hub = hub_here()
        try:
            await hub.enter()
        except (ListenError, DatabaseError, InterfaceError) as exc:
            logger.warning("%s cannot be streamed: %s", request.path, first_line(exc))
            return HttpResponse(
                "The events cannot be heard now.\n",
                status=503,
                content_type="text/plain",
                headers={"Retry-After": "5", "Cache-Control": "no-store"},
            )
        last_id = request.headers.get("Last-Event-ID", "")
        position = hub.positions.decode(last_id) if last_id else None
        body = BrowserStream(hub, options, subscriber, groups, position, bool(last_id))
        return StreamingHttpResponse(
            body,
            content_type="text/event-stream",
            headers={
                # Neither kept, nor put together into larger pieces: by nobody on the way.
                "Cache-Control": "no-store, no-transform",
                "X-Accel-Buffering": "no",
                # Django's GZipMiddleware would wait until there is enough to compress.
                "Content-Encoding": "identity",
            },
        )

    stream.__name__ = stream.__qualname__ = "event_stream"
    return stream


async def _user_of(request: Any) -> Any:
    if hasattr(request, "auser"):
        return await request.auser()
    return getattr(request, "user", None) or anonymous()


def anonymous() -> Any:
    """The user who is nobody; None where there are no users at all."""
    try:
        from django.contrib.auth.models import AnonymousUser
    except (ImproperlyConfigured, RuntimeError):
        return None
    return AnonymousUser()


async def _refusal(
    permission: Permission, subscriber: Subscriber, groups: frozenset[str], most: int
) -> HttpResponse | None:
    """What to answer instead of a stream; None if it may be given."""
    if not groups:
        problem = f"Name the groups to hear: ?{_PARAMETER}=name&{_PARAMETER}=other"
    elif len(groups) > most:
        problem = f"At most {most} groups in one stream; these are {len(groups)}."
    elif not all(map(valid_group, groups)):
        wrong = next(name for name in sorted(groups) if not valid_group(name))
        problem = f"{wrong[:99]!a} is no group: {GROUP_NAMES}."
    else:
        for name in sorted(groups):
            if not await permission.allows(subscriber, name):
                stream_stats.add("refused")
                return _plain(403, f"Not permitted: {name}")
        return None
    return _plain(400, problem)


def _plain(status: int, text: str) -> HttpResponse:
    headers = {"Cache-Control": "no-store"}
    return HttpResponse(f"{text}\n", status=status, content_type="text/plain", headers=headers)


def _check_filter(filter: object) -> None:
    if not callable(filter) or inspect.iscoroutinefunction(filter):
        raise InvalidArgument(
            f"filter= takes a plain function of an event and a subscriber; got {filter!r}."
        )
    try:
        inspect.signature(filter).bind(object(), object())
    except TypeError as exc:
        raise InvalidArgument(
            f"{describe(filter)} cannot be called with an event and a subscriber: {exc}."
        ) from None


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgument(f"{name}= takes a whole number of at least 1; got {value!r}.")


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise InvalidArgument(f"{name}= takes a number of seconds above 0; got {value!r}.")
    return float(value)
