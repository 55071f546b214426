"""Receivers that fail: isolated, reported, retried."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from pytest_django import Settings

from django_pgnotify import Event, publish, receiver, signals
from django_pgnotify.backoff import Backoff
from django_pgnotify.dispatching import runner
from django_pgnotify.registry import Registry, registry
from django_pgnotify.testing import running_listener
from tests.integration.recording import (
    DEADLINE,
    Recorder,
    failures,
    stats,
)

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _registry() -> Iterator[Registry]:
    with registry.isolated() as isolated:
        yield isolated


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_receiver_that_raises_is_isolated_logged_without_payload_and_signalled(
    kind: str, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("as asked")

    async def abroken(event: Event) -> None:
        raise RuntimeError("as asked")

    func = broken if kind == "sync" else abroken
    receiver("jobs", dispatch_uid="first")(func)
    receiver("jobs", dispatch_uid="second")(recorder)
    with running_listener() as listener, failures() as told:
        publish("jobs", {"secret": "s3cr3t payload"})
        publish("jobs", "next")
        listener.wait_for(2)
        assert stats(listener)["failed"] == 2
        assert stats(listener)["handled"] == 2
    assert recorder.data == [{"secret": "s3cr3t payload"}, "next"]
    assert [entry["sender"] for entry in told] == [func, func]
    assert [entry["event"].data for entry in told] == recorder.data
    assert all(isinstance(entry["exception"], RuntimeError) for entry in told)
    assert {(entry["attempt"], entry["will_retry"]) for entry in told} == {(1, False)}
    records = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert {record.name for record in records} == {"django_pgnotify.dispatching"}
    assert func.__name__ in records[0].getMessage()
    assert recorder.events[0].id in records[0].getMessage()
    assert records[0].exc_info
    assert "s3cr3t" not in caplog.text


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError])
def test_what_is_raised_past_exception_does_not_end_the_receiver_either(
    kind: str, error: type[BaseException], recorder: Recorder
) -> None:
    @receiver("jobs", dispatch_uid="sync") if kind == "sync" else lambda func: func
    def leaves(event: Event) -> None:
        recorder(event)
        if event.data == "leave":
            raise error

    @receiver("jobs", dispatch_uid="async") if kind == "async" else lambda func: func
    async def aleaves(event: Event) -> None:
        leaves(event)

    with running_listener(timeout=20) as listener, failures() as told:
        publish("jobs", "leave")
        publish("jobs", "next")
        recorder.wait_for(2, timeout=20)
        listener.settle(20)
    assert recorder.data == ["leave", "next"]
    assert [type(entry["exception"]) for entry in told] == [error]


def test_a_receiver_of_the_failure_signal_that_raises_harms_nobody(recorder: Recorder) -> None:
    @receiver("jobs", dispatch_uid="broken")
    def broken(event: Event) -> None:
        raise RuntimeError("as asked")

    receiver("jobs", dispatch_uid="recorder")(recorder)

    def worse(**kwargs: Any) -> None:
        raise RuntimeError("worse")

    signals.receiver_failed.connect(worse)
    try:
        with running_listener() as listener:
            publish("jobs", 1)
            publish("jobs", 2)
            listener.wait_for(2)
    finally:
        signals.receiver_failed.disconnect(worse)
    assert recorder.data == [1, 2]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_retries_are_made_before_the_next_event_and_then_given_up(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("django_pgnotify.dispatching.runner.RETRY_BASE", 0.001)
    attempts: list[Any] = []

    def flaky(event: Event) -> None:
        attempts.append(event.data)
        if event.data == "never" or (
            event.data == "third time" and attempts.count("third time") < 3
        ):
            raise RuntimeError("not yet")

    async def aflaky(event: Event) -> None:
        flaky(event)

    receiver("jobs", retries=3)(flaky if kind == "sync" else aflaky)
    with running_listener() as listener, failures() as told:
        publish("jobs", "third time")
        publish("jobs", "never")
        publish("jobs", "at once")
        listener.wait_for(3)
        assert stats(listener).snapshot() == {
            "received": 3, "handled": 2, "failed": 1, "retried": 5,
        }  # fmt: skip
    assert attempts == ["third time"] * 3 + ["never"] * 4 + ["at once"]
    assert [(entry["attempt"], entry["will_retry"]) for entry in told] == [
        (1, True), (2, True), (1, True), (2, True), (3, True), (4, False),
    ]  # fmt: skip
    lines = [record.getMessage() for record in caplog.records if "failed on" in record.getMessage()]
    assert lines[0].endswith(", attempt 1, will retry")
    assert lines[-1].endswith(", attempt 4, given up")


def test_a_receiver_that_exceeds_its_timeout_says_so_in_its_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def slow(event: Event) -> None:
        if event.data == "its own":
            raise TimeoutError("of another server")
        await asyncio.Event().wait()  # for ever

    receiver("jobs", timeout=0.05)(slow)
    with running_listener() as listener, failures() as told:
        publish("jobs", "its own")
        publish("jobs", "slow")
        listener.wait_for(2)
    assert [str(each["exception"]) for each in told] == [
        "of another server",
        "timed out after 0.05 s",
    ]
    lines = [record.getMessage() for record in caplog.records if "failed on" in record.getMessage()]
    assert lines[0].endswith(", attempt 1")
    assert lines[1].endswith(", attempt 1, timed out after 0.05 s")


def test_pauses_between_attempts_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[float] = []

    def uniform(low: float, high: float) -> float:
        bounds.append(high)
        return 0.0

    monkeypatch.setattr(runner, "Backoff", partial(Backoff, uniform=uniform))

    @receiver("jobs", retries=10)
    def broken(event: Event) -> None:
        raise RuntimeError("as asked")

    with running_listener() as listener:
        publish("jobs")
        listener.wait_for(1)
    expected = [min(runner.RETRY_CAP, runner.RETRY_BASE * 2**number) for number in range(10)]
    assert bounds == expected
    assert runner.RETRY_CAP in bounds


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_receiver_that_waits_for_its_retry_does_not_keep_the_others_from_running(
    kind: str, recorder: Recorder, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.PGNOTIFY_CONCURRENCY = 1
    settings.PGNOTIFY_SHUTDOWN_TIMEOUT = 1
    monkeypatch.setattr("django_pgnotify.dispatching.runner.Backoff.next", lambda self: 3600.0)
    failed = threading.Event()

    def broken(event: Event) -> None:
        failed.set()
        raise RuntimeError("as asked")

    async def abroken(event: Event) -> None:
        broken(event)

    async def arecorder(event: Event) -> None:
        recorder(event)

    receiver("jobs", retries=1)(broken if kind == "sync" else abroken)
    receiver("other")(recorder if kind == "sync" else arecorder)
    with running_listener(timeout=20):
        publish("jobs")
        assert failed.wait(DEADLINE)
        publish("other")
        recorder.wait_for(1, timeout=20)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_shutdown_does_not_wait_for_the_pause_before_a_retry(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("django_pgnotify.dispatching.runner.Backoff.next", lambda self: 3600.0)
    failed = threading.Event()

    def broken(event: Event) -> None:
        failed.set()
        raise RuntimeError("as asked")

    async def abroken(event: Event) -> None:
        broken(event)

    receiver("jobs", retries=1)(broken if kind == "sync" else abroken)
    with running_listener(timeout=20) as listener:
        publish("jobs")
        assert failed.wait(DEADLINE)
        service = listener.service
    assert service is not None
    # What is given up is told: it was neither handled nor will it be tried again.
    assert service.stats["failed"] + service.stats["dropped"] == 1
