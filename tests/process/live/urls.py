"""What the site answers to, and its websocket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from django.utils.decorators import sync_only_middleware

from django_pgnotify import Topic
from django_pgnotify.listening import background
from django_pgnotify.streams import Subscriber, event_stream
from django_pgnotify.streams.websocket import SubscriptionConsumer

LEDGER = Topic("ledger", delivery="durable")
PERMIT = {"room.*": True}

PAGE = """<!doctype html>
<title>live</title>
<script type="module">
  import * as pgnotify from "/static/django_pgnotify/pgnotify.js";
  window.pgnotify = pgnotify;
  window.log = [];
  window.record = (link) => ({
    onMessage: (data) => note(link, "message", data),
    onGap: (gap) => note(link, "gap", gap),
    onOpen: (first) => note(link, "open", first),
    onState: (state) => note(link, "state", state),
    onRefused: (refused) => note(link, "refused", refused),
    onSubscribed: (groups) => note(link, "subscribed", groups),
    firstPause: 50, longestPause: 500,
  });
  function note(link, kind, value) {
    log.push({link, kind, value});
    document.body.dataset.entries = log.length;
  }
  document.body.dataset.ready = "yes";
</script>
<body></body>
"""


@sync_only_middleware
def SyncMiddleware(get_response: Callable[..., Any]) -> Callable[..., Any]:  # noqa: N802
    """One that knows nothing of async, as many do."""

    def middleware(request: HttpRequest) -> Any:
        response = get_response(request)
        response["X-Sync"] = "yes"
        return response

    return middleware


def permit(subscriber: Subscriber, group: str) -> bool:
    """Asks the database, as permissions do."""
    from tests.testapp.models import Order

    return group.startswith("room.") and not Order.objects.filter(note=f"closed {group}").exists()


def own(subscriber: Subscriber, group: str) -> bool:
    return group == f"user.{subscriber.user.get_username()}" and subscriber.user.is_authenticated


class MailConsumer(SubscriptionConsumer):
    permit = own


class RoomConsumer(SubscriptionConsumer):
    permit = permit


async def page(request: HttpRequest) -> HttpResponse:
    return HttpResponse(PAGE)


async def status(request: HttpRequest) -> JsonResponse:
    """What this process holds on to for its streams."""
    from django_pgnotify.streams.hub import stream_stats

    listeners = list(background._listeners.values())
    return JsonResponse(
        {
            "channels": sorted(
                channel for listener in listeners for channel in listener._subscriptions
            ),
            "tasks": sorted(
                task.get_name()
                for task in asyncio.all_tasks()
                if task.get_name().startswith("pgnotify")
            ),
            "stats": stream_stats.snapshot(),
        }
    )


urlpatterns = [
    path("", page),
    path("status/", status),
    path("jobs/", event_stream("jobs", heartbeat=0.5, retry=0.1)),
    path("ledger/", event_stream(LEDGER, heartbeat=0.5, retry=0.1)),
    path("slow/", event_stream("slow", max_waiting=20)),
    path("slow-ledger/", event_stream(LEDGER, max_waiting=20)),
    path("rooms/", event_stream("rooms", group="room.{data[room]}", permit=permit)),
    path("mail/", event_stream("mail", group="user.{data[to]}", permit=own)),
    path("mine/", login_required(event_stream("jobs"))),
    path("silent/", event_stream("silent", heartbeat=3600)),
]
