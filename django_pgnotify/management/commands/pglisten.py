"""``manage.py pglisten``: the one process that listens and runs receivers."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.utils import autoreload

from django_pgnotify import systemd
from django_pgnotify.conf import conf
from django_pgnotify.dispatching.service import Service, routes_of
from django_pgnotify.durable.log import missing_tables
from django_pgnotify.events import Event, check_topic
from django_pgnotify.exceptions import InvalidTopic, UnsupportedDatabase
from django_pgnotify.listening.probe import probe
from django_pgnotify.management.arguments import count, seconds
from django_pgnotify.management.durable import has_tables
from django_pgnotify.publishing.announcer import announcer
from django_pgnotify.publishing.background import sender
from django_pgnotify.publishing.sender import check_alias
from django_pgnotify.registry import registry

SWITCH_INTERVAL = 0.001
"""Seconds after which a thread that computes lets another one run."""


class Command(BaseCommand):
    help = "Listen for PostgreSQL notifications and run the registered receivers."

    _waiting = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--database",
            metavar="ALIAS",
            help="database alias to listen on (default: PGNOTIFY_LISTEN_DATABASE, "
            "else PGNOTIFY_DATABASE)",
        )
        parser.add_argument(
            "--topic",
            action="append",
            dest="topics",
            metavar="TOPIC",
            help="listen to this topic only; may be repeated (default: all that have a receiver)",
        )
        parser.add_argument(
            "--check",
            action="store_true",
            help="prove that a NOTIFY gets through, and exit: 0 if it does, 1 with the cause",
        )
        parser.add_argument(
            "--once", action="store_true", help="handle the first events that arrive, and exit"
        )
        parser.add_argument(
            "--concurrency",
            type=count,
            metavar="N",
            help="receivers that may run at once (default: PGNOTIFY_CONCURRENCY)",
        )
        parser.add_argument(
            "--shutdown-timeout",
            type=seconds,
            metavar="SECONDS",
            help="what running receivers get to finish after the first signal "
            "(default: PGNOTIFY_SHUTDOWN_TIMEOUT)",
        )
        parser.add_argument(
            "--health-file", metavar="FILE", help="keep the listener's state in FILE, as JSON"
        )
        parser.add_argument(
            "--reload", action="store_true", help="restart when code changes, for development"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            using = check_alias(options["database"] or conf.listen_database)
            for topic in options["topics"] or ():
                check_topic(topic)
        except (UnsupportedDatabase, InvalidTopic) as exc:
            raise CommandError(str(exc)) from exc
        if options["health_file"]:
            folder = Path(options["health_file"]).absolute().parent
            if not os.access(folder, os.W_OK):
                raise CommandError(f"--health-file: {str(folder)!r} is no folder to write to.")
        if options["check"]:
            problem = asyncio.run(probe(using))
            if problem is not None:
                raise CommandError(f"pglisten: {problem}")
            rows = conf.rows_database(using)
            if _reads_log(options["topics"]) and not has_tables(rows):
                raise CommandError(f"pglisten: it would not get ready: {missing_tables(rows)}.")
            self._say(f"pglisten: ok, a NOTIFY gets through on database {using!r}")
        elif options["reload"]:
            autoreload.run_with_reloader(self._listen, using, options)
        else:
            sys.exit(self._listen(using, options))

    def _listen(self, using: str, options: dict[str, Any]) -> int:
        # The reader and the receivers' threads share this process: with Python's 5 ms a receiver
        # waits for the reader, and the reader for it, longer than most events take altogether.
        sys.setswitchinterval(SWITCH_INTERVAL)
        return asyncio.run(self._run(using, options))

    async def _run(self, using: str, options: dict[str, Any]) -> int:
        first = asyncio.Event()
        service = Service(
            using,
            topics=options["topics"],
            concurrency=options["concurrency"],
            observe=(lambda events: _note(events, first)) if options["once"] else None,
            on_ready=lambda: self._ready(service),
            on_lost=lambda cause, _: self._lost(using, cause),
            health_file=options["health_file"],
        )
        if service.feed is not None and service.feed.table.problem:
            raise CommandError(service.feed.table.problem)
        if not service.topics and service.feed is None:
            self._warn("no receivers are registered, so there is nothing to listen to")
        if not options["reload"]:  # where the reloader handles signals
            self._stop_on_signals(service)
        if options["once"]:
            waiting = asyncio.create_task(_stop_after(first, service), name="pgnotify-once")
        watchdog = asyncio.create_task(_feed_watchdog(), name="pgnotify-watchdog")
        drained = await service.run(options["shutdown_timeout"])
        watchdog.cancel()
        if options["once"]:
            waiting.cancel()
        if not drained:
            running = service.dispatcher.running + len(service.durable.held)
            what = f"{running} receiver(s)" if running else "stored events or receivers"
            self._warn(f"gave up on {what} that did not finish in time")
            self.stdout.flush()
            # Their threads cannot be stopped, and a normal exit would wait for them. So nobody but
            # us does what a normal exit does for what they have published.
            sender.close()
            announcer.close()
            os._exit(1)
        self._say("pglisten: stopped")
        return 0

    def _stop_on_signals(self, service: Service) -> None:
        loop = asyncio.get_running_loop()
        seen: list[signal.Signals] = []

        def on_signal(number: signal.Signals) -> None:
            if seen:
                self._warn(f"{number.name} again, leaving at once")
                os._exit(128 + number)
            seen.append(number)
            service.stop()  # first: once it is said, nothing more is begun
            self._say(f"pglisten: {number.name}, finishing what runs")
            systemd.tell("STOPPING=1")

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)

    def _ready(self, service: Service) -> None:
        self._waiting = False
        self._say(
            f"pglisten: ready (database {service.using!r}, {_topics_of(service)}, "
            f"{len(service.routes)} receiver(s), {service.role})"
        )
        systemd.tell(f"READY=1\nSTATUS={service.role} on database {service.using}")

    def _lost(self, using: str, cause: str) -> None:
        if not self._waiting:  # once for each outage; the log has every attempt
            self._waiting = True
            self._warn(f"waiting for database {using!r}: {cause}")
            systemd.tell(f"STATUS=waiting for database {using}: {cause}")

    def _say(self, line: str) -> None:
        self.stdout.write(line)
        self.stdout.flush()

    def _warn(self, line: str) -> None:
        self.stderr.write(self.style.WARNING(f"pglisten: {line}"))
        self.stderr.flush()


def _reads_log(topics: Sequence[str] | None) -> bool:
    """Whether a listener of these topics would run a durable consumer."""
    return any(
        stream.topic in registry.durable_topics(route.receiver, conf.DELIVERY)
        for route in routes_of(registry, topics)
        for stream in route.subscriptions
    )


async def _feed_watchdog() -> None:
    """A sign of life for systemd for as long as the loop turns, database or not."""
    interval = systemd.watchdog_interval()
    while interval is not None:
        systemd.tell("WATCHDOG=1")
        await asyncio.sleep(interval)


def _topics_of(service: Service) -> str:
    told = f"{len(service.topics)} topic(s)"
    feed = service.feed
    beside = set() if feed is None else feed.topics - set(service.topics)
    return f"{told}, {len(beside)} more for caches" if beside else told


def _note(events: Sequence[Event], first: asyncio.Event) -> None:
    first.set()


async def _stop_after(first: asyncio.Event, service: Service) -> None:
    await first.wait()
    service.stop()
