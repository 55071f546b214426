"""The admin of durable topics: the log, consumers with their lag, dead letters to act on."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.core.paginator import Paginator
from django.db import connections
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.functional import cached_property
from django.utils.html import format_html

from . import consumers
from .conf import conf
from .durable.lag import lag_of
from .models import Consumer, DeadLetter, LoggedEvent


class EstimatingPaginator(Paginator):
    """Counts up to a limit, so that a page of a log of millions is a page."""

    LIMIT = 10_000

    @cached_property
    def count(self) -> int:
        rows = self.object_list
        assert isinstance(rows, QuerySet)
        return rows.order_by()[: self.LIMIT].count()


class Topics(admin.SimpleListFilter):
    """The topics in the log, found by jumping from one to the next in the index."""

    title = "topic"
    parameter_name = "topic"

    _SKIP = """
        WITH RECURSIVE topics AS (
            (SELECT topic FROM pgnotify_event_log ORDER BY topic LIMIT 1)
            UNION ALL
            SELECT (SELECT e.topic FROM pgnotify_event_log AS e WHERE e.topic > topics.topic
                    ORDER BY e.topic LIMIT 1)
            FROM topics WHERE topics.topic IS NOT NULL
        )
        SELECT topic FROM topics WHERE topic IS NOT NULL LIMIT 200
    """

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        using = model_admin.get_queryset(request).db
        with connections[using].cursor() as cursor:
            cursor.execute(self._SKIP)
            return [(topic, topic) for (topic,) in cursor.fetchall()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset if self.value() is None else queryset.filter(topic=self.value())


class ReadOnly(admin.ModelAdmin):
    """Nothing of the bus is edited by hand. It is read where it is: on ``PGNOTIFY_DATABASE``."""

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        # As the commands do: no router knows of that setting.
        return super().get_queryset(request).using(conf.DATABASE)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        """Write nothing: a row as it was read would undo what a listener has stored since."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return [field.name for field in self.model._meta.fields]


@admin.register(LoggedEvent)
class LoggedEventAdmin(ReadOnly):
    list_display = ("id", "topic", "key", "source", "created_at")
    list_filter = (Topics, "created_at")
    search_fields = ("=key", "=id")
    ordering = ("-id",)
    show_full_result_count = False
    paginator = EstimatingPaginator

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(Consumer)
class ConsumerAdmin(ReadOnly):
    list_display = (
        *("name", "topic_list", "state", "events_behind", "seconds_behind", "dead_letters"),
        "holder",
    )
    list_filter = ("paused",)
    search_fields = ("name",)
    ordering = ("name",)
    actions = ("pause", "resume", "skip_to_now")

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        # Django deletes row by row, and asks about related rows: pgnotify_consumers --delete.
        return False

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        shown = super().get_changelist_instance(request)
        consumers.look_who_holds(shown.result_list)
        return shown

    @admin.display(description="topics")
    def topic_list(self, consumer: Consumer) -> str:
        return ", ".join(consumer.topics)

    @admin.display(description="state")
    def state(self, consumer: Consumer) -> str:
        return consumers.state_of(consumer)

    @admin.display(description="events behind")
    def events_behind(self, consumer: Consumer) -> str:
        lag = lag_of(consumer)
        return f"{lag.events}{'+' if lag.more else ''}"

    @admin.display(description="seconds behind")
    def seconds_behind(self, consumer: Consumer) -> str:
        return f"{lag_of(consumer).seconds:.1f}"

    @admin.display(description="dead letters")
    def dead_letters(self, consumer: Consumer) -> int:
        return consumer.dead_letters.filter(retry_at=None).count()

    @admin.action(description="Pause", permissions=["change"])
    def pause(self, request: HttpRequest, chosen: QuerySet[Consumer]) -> None:
        for consumer in chosen:
            consumers.pause(consumer.name, chosen.db)
        self._say(request, f"Paused: {_names(chosen)}.")

    @admin.action(description="Resume", permissions=["change"])
    def resume(self, request: HttpRequest, chosen: QuerySet[Consumer]) -> None:
        for consumer in chosen:
            consumers.resume(consumer.name, chosen.db)
        self._say(request, f"Resumed: {_names(chosen)}.")

    @admin.action(description="Go on from now, skipping what is behind", permissions=["change"])
    def skip_to_now(self, request: HttpRequest, chosen: QuerySet[Consumer]) -> None:
        for consumer in chosen:
            consumers.reset(consumer.name, "now", chosen.db)
        self._say(request, f"Set to go on from now: {_names(chosen)}.")

    def _say(self, request: HttpRequest, text: str) -> None:
        self.message_user(request, text, messages.SUCCESS)


def _names(chosen: QuerySet[Consumer]) -> str:
    return ", ".join(consumer.name for consumer in chosen)


class Waiting(admin.SimpleListFilter):
    """Dead letters, or also those that wait to be tried again."""

    title = "state"
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("dead", "given up"), ("waiting", "will be tried again")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.value() is None:
            return queryset
        return queryset.filter(retry_at__isnull=self.value() == "dead")


class OfConsumer(admin.RelatedFieldListFilter):
    """The consumers that there are where the letters are."""

    def field_choices(self, field: Any, request: HttpRequest, model_admin: Any) -> Any:
        using = model_admin.get_queryset(request).db
        known = Consumer.objects.using(using).order_by("name").values_list("pk", "name")
        return [(str(pk), name) for pk, name in known]


@admin.register(DeadLetter)
class DeadLetterAdmin(ReadOnly):
    list_display = (
        *("event_id", "consumer", "topic", "key", "attempts", "failed_at", "retry_at"),
        "last_error",
    )
    list_filter = (Waiting, ("consumer", OfConsumer), "failed_at")
    list_select_related = ("consumer",)
    search_fields = ("=key", "error")
    ordering = ("event_id",)
    exclude = ("error",)  # shown as traceback
    actions = ("requeue", "discard")

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False  # "discard" says what it is

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        # Beside the event's id, that of the row is only mistaken for it.
        shown = super().get_readonly_fields(request, obj)
        return [*(name for name in shown if name not in ("id", "error")), "traceback"]

    @admin.display(description="error")
    def traceback(self, letter: DeadLetter) -> str:
        return format_html("<pre>{}</pre>", letter.error)

    @admin.display(description="error")
    def last_error(self, letter: DeadLetter) -> str:
        return consumers.error_line(letter)

    @admin.action(description="Requeue: try again", permissions=["change"])
    def requeue(self, request: HttpRequest, chosen: QuerySet[DeadLetter]) -> None:
        count = consumers.requeue(chosen)
        self.message_user(request, f"{count} event(s) will be tried again.", messages.SUCCESS)

    @admin.action(description="Discard: give up for good", permissions=["change"])
    def discard(self, request: HttpRequest, chosen: QuerySet[DeadLetter]) -> None:
        count = consumers.discard(chosen)
        self.message_user(request, f"{count} event(s) discarded.", messages.SUCCESS)
