"""System checks: what is wrong with a project's use of the bus, before it runs.

========== ========================================================================
E001       A ``PGNOTIFY_*DATABASE`` alias is missing or not PostgreSQL.
E002       psycopg is missing or too old.
E003       A ``PGNOTIFY_*`` setting is unknown or invalid.
E004       ``PGNOTIFY_MODELS`` cannot be applied.
E005       Something is forwarded and there is no such channel layer.
E006       ``invalidates`` or ``cached`` names a cache alias that is not in CACHES.
E007       An option of a NearCache cannot work.
E008       A ``cached`` function depends on what it cannot depend on.
E009       The file of the epoch table cannot be used.
E010       ``PGNOTIFY_SUBSCRIBE_PERMISSION`` names nothing that can be asked.
W001       Something is forwarded through InMemoryChannelLayer, which is per process.
W002       ``invalidates`` names a LocMemCache or DummyCache, which is per process.
W003       A receiver of a model that publishes nothing.
W004       A topic that looks like a model's label and is not that model's topic.
W005       The listening alias looks as if it went through a pooler.
W006       The log's hard limit is shorter than its retention.
W007       A durable consumer that is named after its function.
W008       The second level of a NearCache is per process.
W009       A MAX_STALENESS that asks for very frequent heartbeats.
========== ========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage

from .caching.checks import PER_PROCESS, check_caches
from .conf import conf, problems
from .exceptions import PgNotifyError, UnsupportedDatabase
from .publishing import model_signals
from .publishing.sender import check_alias
from .registry import describe, is_model, registry
from .streams.permission import project_rules_problem

MINIMUM_PSYCOPG = (3, 2, 10)

_PER_PROCESS_LAYER = "channels.layers.InMemoryChannelLayer"


def register() -> None:
    """Add the checks to Django's; called once the apps are ready."""
    for check in (
        check_settings,
        check_permission,
        check_psycopg,
        check_databases,
        check_receivers,
        check_retention,
        check_consumers,
        check_caches,
    ):
        checks.register(_listed(check), "pgnotify")


def _listed(check: Callable[[], Iterator[CheckMessage]]) -> Callable[..., list[CheckMessage]]:
    def run(**kwargs: Any) -> list[CheckMessage]:
        return list(check())

    run.__qualname__ = check.__qualname__
    return run


def check_settings() -> Iterator[CheckMessage]:
    for problem in problems():
        yield checks.Error(
            problem,
            hint="docs/reference/settings lists the settings and their types.",
            id="pgnotify.E003",
        )
    for problem in model_signals.configuration_errors:
        yield checks.Error(
            problem,
            hint="Keys are model labels ('auth.User'); options are those of notify_changes().",
            id="pgnotify.E004",
        )


def check_permission() -> Iterator[CheckMessage]:
    try:
        problem = project_rules_problem()
    except PgNotifyError:
        return  # E003 says so
    if problem is not None:
        yield checks.Error(
            problem,
            hint="Name a function of a subscriber and a group's name, or a dict of patterns. "
            "Until then every group that a browser names is refused.",
            id="pgnotify.E010",
        )


def check_retention() -> Iterator[CheckMessage]:
    try:
        limit, retention = conf.LOG_LIMIT, conf.LOG_RETENTION
    except PgNotifyError:
        return  # E003 says so
    if limit is not None and limit < retention:
        yield checks.Warning(
            f"PGNOTIFY_LOG_LIMIT = {limit:g} s is shorter than PGNOTIFY_LOG_RETENTION = "
            f"{retention:g} s: events go before it, whether consumers have passed them or not.",
            hint="Make the limit the longer one, or None.",
            id="pgnotify.W006",
        )


def check_consumers() -> Iterator[CheckMessage]:
    try:
        default = conf.DELIVERY
    except PgNotifyError:
        return  # E003 says so
    for receiver in registry.receivers:
        named_after_it = receiver.uid.startswith(f"{describe(receiver.func)}:")
        if named_after_it and registry.durable_topics(receiver, default):
            yield checks.Warning(
                f"Durable consumer {receiver.uid} is named after its function: when that is "
                f"renamed or moved, a new consumer begins and the old one's place is lost.",
                hint="Give the receiver a dispatch_uid.",
                id="pgnotify.W007",
            )


def check_psycopg() -> Iterator[CheckMessage]:
    try:
        import psycopg
    except ImportError:
        yield checks.Error(
            "psycopg 3 is not installed.",
            hint="pip install 'django-pgnotify[binary]'",
            id="pgnotify.E002",
        )
        return
    found = tuple(int(part) for part in psycopg.__version__.split(".")[:3] if part.isdigit())
    if found < MINIMUM_PSYCOPG:
        yield checks.Error(
            f"psycopg {psycopg.__version__} loses or leaks notifications.",
            hint=f"Upgrade to {'.'.join(map(str, MINIMUM_PSYCOPG))} or later.",
            id="pgnotify.E002",
        )


def check_databases() -> Iterator[CheckMessage]:
    try:
        named = {"PGNOTIFY_DATABASE": conf.DATABASE}
        if conf.LISTEN_DATABASE is not None:
            named["PGNOTIFY_LISTEN_DATABASE"] = conf.LISTEN_DATABASE
    except PgNotifyError:
        return  # E003 says so
    for name, alias in named.items():
        try:
            check_alias(alias)
        except UnsupportedDatabase as exc:
            yield checks.Error(
                f"{name}: {exc}",
                hint="Name a DATABASES alias with ENGINE django.db.backends.postgresql.",
                id="pgnotify.E001",
            )
    config = settings.DATABASES.get(conf.listen_database, {})
    if conf.LISTEN_DATABASE is None and config.get("DISABLE_SERVER_SIDE_CURSORS"):
        yield checks.Warning(
            f"Database {conf.listen_database!r} disables server-side cursors, as one does behind "
            f"a transaction pooler; LISTEN does not work through one.",
            hint="Add an alias that goes to the server itself and name it in "
            "PGNOTIFY_LISTEN_DATABASE. 'manage.py pglisten --check' tells for sure.",
            id="pgnotify.W005",
        )


def check_receivers() -> Iterator[CheckMessage]:
    labels = {model._meta.label_lower: model for model in apps.get_models()}
    for receiver in registry.receivers:
        for source, subscription in zip(
            receiver.sources, registry.subscriptions(receiver), strict=True
        ):
            if is_model(source):
                if subscription.model not in registry.publications:
                    yield checks.Warning(
                        f"Receiver {receiver.uid} waits for changes of {source._meta.label}, "
                        f"which publishes none in this project.",
                        hint="Decorate the model with @notify_changes or add it to "
                        "PGNOTIFY_MODELS.",
                        id="pgnotify.W003",
                    )
                continue
            model = labels.get(subscription.topic.lower())
            if model is not None and registry.subscription(model).topic != subscription.topic:
                yield checks.Warning(
                    f"Receiver {receiver.uid} listens to the topic {subscription.topic!r}; the "
                    f"changes of {model._meta.label} are published on "
                    f"{registry.subscription(model).topic!r}.",
                    hint="Pass the model class, or its topic.",
                    id="pgnotify.W004",
                )
        if "layer" in receiver.purpose:
            yield from _check_layer(receiver.uid, receiver.purpose["layer"])
        if "cache" in receiver.purpose:
            yield from _check_cache(receiver.uid, receiver.purpose["cache"])


def _check_layer(uid: str, alias: str) -> Iterator[CheckMessage]:
    try:
        import channels  # noqa: F401
    except ImportError:
        yield checks.Error(
            f"{uid}: Django Channels is not installed.",
            hint="pip install 'django-pgnotify[channels]'",
            id="pgnotify.E005",
        )
        return
    config = getattr(settings, "CHANNEL_LAYERS", {}).get(alias)
    if config is None:
        yield checks.Error(
            f"{uid}: CHANNEL_LAYERS has no layer {alias!r}.",
            hint="Add one; django_pgnotify.layers.PostgresChannelLayer needs no other server.",
            id="pgnotify.E005",
        )
    elif config.get("BACKEND") == _PER_PROCESS_LAYER:
        yield checks.Warning(
            f"{uid}: layer {alias!r} is InMemoryChannelLayer, which stays in one process; what "
            f"pglisten forwards never reaches a browser.",
            hint="Use django_pgnotify.layers.PostgresChannelLayer or channels_redis.",
            id="pgnotify.W001",
        )


def _check_cache(uid: str, alias: str) -> Iterator[CheckMessage]:
    config = settings.CACHES.get(alias)
    if config is None:
        yield checks.Error(
            f"{uid}: CACHES has no alias {alias!r}.",
            hint=f"Choose from {', '.join(map(repr, settings.CACHES))}.",
            id="pgnotify.E006",
        )
    elif config.get("BACKEND") in PER_PROCESS:
        yield checks.Warning(
            f"{uid}: cache {alias!r} is {config['BACKEND'].rpartition('.')[2]}; another process's "
            f"memory cannot be reached, so nothing would be invalidated there.",
            hint="Name a cache that processes share: Redis, memcached, file or database; or a "
            "NearCache.",
            id="pgnotify.W002",
        )
