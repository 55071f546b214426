"""Signing: any role may NOTIFY, so with PGNOTIFY_SIGNING only what we signed is believed."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from django.db import connection, transaction
from pytest_django import Settings

from django_pgnotify import publish, signing
from django_pgnotify.testing import running_listener
from django_pgnotify.testing.listener import RunningListener
from django_pgnotify.wire import FramePacker, Outgoing, decode_frame
from tests.integration.hearing import Ear, hearing
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True)

SECRET = "s3cret-payload"


@pytest.fixture(autouse=True)
def _signing(settings: Settings) -> None:
    settings.PGNOTIFY_SIGNING = True


@pytest.fixture
def listener() -> Iterator[RunningListener]:
    with running_listener(topics=["jobs", "others", "testapp.order"]) as one:
        yield one


@pytest.fixture
def ear() -> Iterator[Ear]:
    with hearing("jobs", "others") as one:
        yield one


def notify(channel: str, payload: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_notify(%s, %s)", [channel, payload])


def broken(listener: RunningListener) -> int:
    assert listener.service is not None
    return listener.service.stats["broken"]


def test_what_is_published_is_signed_and_believed(listener: RunningListener) -> None:
    publish("jobs", {"ü": "☃"})
    order = Order.objects.create()
    events = listener.wait_for(2)
    assert [event.data for event in events] == [{"ü": "☃"}, {}]
    assert events[1].pk == order.pk
    assert broken(listener) == 0


def test_a_thousand_events_are_signed_frame_by_frame_within_the_limit(ear: Ear) -> None:
    with transaction.atomic():
        for number in range(1000):
            publish("jobs", [number, "ü" * (number % 50)])
    frames = ear.frames()
    assert len(frames) < 40
    for heard in frames:
        assert heard.payload.startswith('{"pgnotify":1,"sig":"')
        assert len(heard.payload.encode()) <= 7999
    events = [event for heard in frames for event in ear.decode(heard)]
    assert [event.data[0] for event in events] == list(range(1000))


def test_a_frame_filled_to_the_last_byte_is_signed_within_the_limit() -> None:
    packer = FramePacker("node:1", sign=signing.sign)
    body = '{"data":"' + "x" * (packer.room - len('{"data":""}')) + '"}'
    [(channel, payload)] = packer.pack([Outgoing("jobs", None, body, len(body))])
    assert len(payload.encode()) == 7999
    notify(channel, payload)
    assert decode_frame(payload, channel, signing.verify).events


@pytest.mark.parametrize(
    "payload",
    [
        SECRET,
        '{"task":"' + SECRET + '"}',
        '{"pgnotify":1,"events":[{"data":"' + SECRET + '"}]}',
        '{"pgnotify":1,"sig":"","source":"a:1","events":[{"data":"' + SECRET + '"}]}',
        '{"pgnotify":1,"sig":"'
        + "A" * 43
        + '","source":"a:1","events":[{"data":"'
        + SECRET
        + '"}]}',
        '{"pgnotify": 1, "sig": "x", "events": []}',
        "",
    ],
)
def test_what_nobody_signed_is_counted_logged_without_payload_and_dropped(
    listener: RunningListener, caplog: pytest.LogCaptureFixture, payload: str
) -> None:
    with caplog.at_level(logging.DEBUG):
        notify("jobs", payload)
        publish("jobs", "next")
        events = listener.wait_for(1)
    assert [event.data for event in events] == ["next"]
    assert broken(listener) == 1
    assert SECRET not in caplog.text
    assert any("jobs" in one.getMessage() for one in caplog.records
               if one.name == "django_pgnotify.listening")  # fmt: skip


def test_a_frame_that_was_tampered_with_is_dropped(listener: RunningListener, ear: Ear) -> None:
    publish("jobs", {"amount": 10})
    [heard] = ear.frames()
    notify("jobs", heard.payload.replace('"amount":10', '"amount":99'))
    publish("jobs", "next")
    events = listener.wait_for(2)
    assert [event.data for event in events] == [{"amount": 10}, "next"]
    assert broken(listener) == 1


def test_a_frame_replayed_on_another_channel_is_dropped(
    listener: RunningListener, ear: Ear
) -> None:
    publish("jobs", 1)
    [heard] = ear.frames()
    notify("others", heard.payload)
    publish("others", "next")
    events = listener.wait_for(2)
    assert [(event.topic, event.data) for event in events] == [("jobs", 1), ("others", "next")]
    assert broken(listener) == 1


def test_a_frame_of_another_secret_key_is_dropped_and_of_a_former_one_believed(
    settings: Settings, ear: Ear
) -> None:
    publish("jobs", 1)
    [heard] = ear.frames()
    assert decode_frame(heard.payload, "jobs", signing.verify).events
    former, settings.SECRET_KEY = settings.SECRET_KEY, "another"
    assert not signing.verify(*reversed_for(heard.payload))
    settings.SECRET_KEY_FALLBACKS = [former]
    assert decode_frame(heard.payload, "jobs", signing.verify).events


def reversed_for(payload: str) -> tuple[str, str]:
    """The text that the signature of a frame on ``jobs`` covers, and the signature."""
    head, _, rest = payload.partition('","source"')
    return f'jobs:"source"{rest}', head.rpartition('"')[2]


@pytest.mark.django_db
@pytest.mark.parametrize("text", ["", "a", "ü:☃", "a:b:c", "x" * 10_000])
def test_a_signature_belongs_to_one_text(text: str) -> None:
    signature = signing.sign(text)
    assert signing.verify(text, signature)
    assert not signing.verify(text + " ", signature)
    assert not signing.verify(text, signature[:-1])
    assert not signing.verify(text, "")
    assert not signing.verify(text, f"x:{signature}")
    assert not signing.verify(f"{text}:x", signature)


@pytest.mark.django_db
@pytest.mark.parametrize("signature", ["", ":", "ü", "a:b", "\x00", "A" * 43])
def test_no_signature_breaks_the_verifier(signature: str) -> None:
    assert not signing.verify("text", signature)


def test_without_signing_foreign_payloads_are_events_again(settings: Settings) -> None:
    settings.PGNOTIFY_SIGNING = False
    with running_listener(topics=["jobs"]) as listener:
        notify("jobs", "do job 1001")
        assert listener.wait_for(1)[0].data == "do job 1001"
