"""Frames that come in: honest, broken, hostile, and too big to ride."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import transaction
from pytest_django import Settings

from django_pgnotify import publish, receiver, signing
from django_pgnotify.models import StoredEvent
from django_pgnotify.publishing.plain import ENCODER
from django_pgnotify.publishing.store import store
from django_pgnotify.registry import registry
from django_pgnotify.testing import RunningListener, running_listener
from django_pgnotify.wire import FramePacker, encode_event, reference_to
from tests.integration.caching import until
from tests.integration.recording import Recorder, notify, stored_events_locked, terminate
from tests.testapp.models import Document, Membership, Order, Sku

pytestmark = pytest.mark.django_db(transaction=True)

SECRET = "s3cr3t"


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with registry.isolated():
        heard = Recorder()
        receiver("jobs")(heard)
        yield heard


def stats(listener: RunningListener) -> Any:
    assert listener.service is not None
    return listener.service.stats


def frame(*events: Any, **more: Any) -> str:
    return json.dumps({"pgnotify": 1, "source": "test:1", "events": list(events), **more})


def event(**fields: Any) -> dict[str, Any]:
    return {"id": "x-1", "action": "published", "data": SECRET, **fields}


HOSTILE = {
    "truncated": '{"pgnotify":1,"events":[{"id":"x","data":"s3cr3t',
    "truncated after the marker": '{"pgnotify":',
    "trailing text": frame(event()) + " s3cr3t",
    "deep nesting in an array": '{"pgnotify":1,"events":' + "[" * 7000,
    "deep nesting in objects": '{"pgnotify":1,"events":' + '{"a":' * 1500,
    "deep nesting, balanced": '{"pgnotify":1,"events":[{"data":' + "[" * 3900 + "]" * 3900 + "}]}",
    "7,999 bytes of garbage": '{"pgnotify":' + "\x01\x7f{[}]s3cr3t" * 700,
    "7,999 bytes in two-byte characters": '{"pgnotify":1,' + "é" * 3990,
    "a version to come": '{"pgnotify":2,"events":[{"data":"s3cr3t"}]}',
    "a version of true": '{"pgnotify":true,"events":[]}',
    "a version of text": '{"pgnotify":"1","events":[]}',
    "no events": '{"pgnotify":1}',
    "events not a list": '{"pgnotify":1,"events":{"data":"s3cr3t"}}',
    "source not text": '{"pgnotify":1,"source":{"s3cr3t":1},"events":[]}',
    "a huge number": '{"pgnotify":1,"events":[{"at":' + "9" * 5000 + "}]}",
    "an event of text": frame(SECRET),
    "an event of null": frame(None),
    "an unknown action": frame(event(action="exploded s3cr3t")),
    "a gap": frame(event(action="gap")),
    "an action of a list": frame(event(action=["created"])),
    "an action of an object": frame(event(action={"s3cr3t": 1})),
    "a change of no model": frame(event(action="updated")),
    "an unknown model": frame(event(action="updated", model="no.such", pk=1)),
    "an unknown app": frame(event(action="updated", model="testapp.s3cr3t", pk=1)),
    "a model without a dot": frame(event(action="updated", model=SECRET, pk=1)),
    "a model with two dots": frame(event(action="updated", model="a.b.c", pk=1)),
    "a model of a number": frame(event(action="updated", model=5, pk=1)),
    "a model of a list": frame(event(action="updated", model=["testapp.order"], pk=1)),
    "no pk": frame(event(action="updated", model="testapp.order")),
    "a pk of text": frame(event(action="updated", model="testapp.order", pk="s3cr3t")),
    "a pk of a list": frame(event(action="updated", model="testapp.order", pk=[1])),
    "a pk of an object": frame(event(action="updated", model="testapp.order", pk={"a": 1})),
    "a pk of true": frame(event(action="updated", model="testapp.order", pk=True)),
    "a pk of a fraction": frame(event(action="updated", model="testapp.order", pk=1.5)),
    "a text pk of an object": frame(event(action="updated", model="testapp.sku", pk={"a": 1})),
    "a pk that is no UUID": frame(event(action="updated", model="testapp.document", pk=SECRET)),
    "a composite pk of a number": frame(event(action="updated", model="testapp.membership", pk=1)),
    "a composite pk too short": frame(event(action="updated", model="testapp.membership", pk=[1])),
    "a composite pk of wrong parts": frame(
        event(action="updated", model="testapp.membership", pk=["a", "b", "c"])
    ),
    "an id of a number": frame(event(id=5)),
    "a key of a number": frame(event(key=5)),
    "changed of text": frame(event(changed=SECRET)),
    "changed of numbers": frame(event(changed=[1])),
    "a time of text": frame(event(at=SECRET)),
    "a time beyond the calendar": frame(event(at=1e18)),
    "an infinite time": '{"pgnotify":1,"events":[{"at":1e999}]}',
    "NaN": '{"pgnotify":1,"events":[{"data":NaN}]}',
    "a reference of text": frame({"ref": SECRET, "digest": "x"}),
    "a reference of true": frame({"ref": True}),
    "a reference to a row that is gone": frame({"ref": 999_999_999, "digest": "x"}),
    "a reference to a row that cannot be": frame({"ref": 10**30, "digest": "x"}),
    "a reference to a negative row": frame({"ref": -1}),
    "a digest of a number": frame({"ref": 1, "digest": 5}),
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_frame_is_counted_logged_without_payload_and_the_next_is_handled(
    payload: str, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    # What PostgreSQL would not carry anyway is cut to what it does.
    payload = payload.encode()[:7999].decode(errors="ignore")
    with running_listener() as listener:
        notify("jobs", payload, "next")
        heard = recorder.wait_for(1)
        listener.settle()
        assert stats(listener)["broken"] == 1
        assert listener.service is not None
        assert listener.service.listener.session.state == "established"
        assert stats(listener)["gaps"] == 0
    assert [one.data for one in heard] == ["next"]
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1, [record.getMessage() for record in warnings]
    assert warnings[0].name == "django_pgnotify.listening"
    assert "'jobs'" in warnings[0].getMessage()
    assert SECRET not in caplog.text


def test_a_wrong_event_does_not_take_the_others_of_its_frame_with_it(recorder: Recorder) -> None:
    with running_listener() as listener:
        notify("jobs", frame(event(data=1), event(action="?"), event(data=3), {"ref": "x"}))
        listener.wait_for(2)
        assert stats(listener)["broken"] == 2
        assert stats(listener)["received"] == 2
    assert recorder.data == [1, 3]


def test_a_hostile_reference_does_not_take_honest_stored_events_with_it(
    recorder: Recorder,
) -> None:
    big = "x" * 20_000
    with running_listener() as listener:
        with transaction.atomic():
            notify("jobs", frame({"ref": 10**30}, {"ref": -(10**30)}))
            publish("jobs", big, delivery="atomic")
        recorder.wait_for(1)
        listener.settle()
        assert stats(listener)["broken"] == 2
    assert recorder.data == [big]


def test_a_frame_of_another_language_needs_little_more_than_its_events(recorder: Recorder) -> None:
    with running_listener() as listener:
        notify("jobs", ' { "pgnotify" : 1, "events" : [ {"data": {"from": "Go"}}, {} ] }')
        listener.wait_for(2)
    first, second = recorder.events
    assert first.data == {"from": "Go"}
    assert (first.action, first.key, first.model) == ("published", None, None)
    assert first.id
    assert first.id != second.id
    assert first.source.startswith("backend:")
    assert second.data is None


def test_a_frame_longer_than_a_log_line_leaves_no_trace_of_its_id_in_the_log(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    @receiver("jobs", dispatch_uid="broken")
    def broken(event: Any) -> None:
        raise RuntimeError("as asked")

    with running_listener() as listener:
        notify("jobs", frame(event(id="s3cr3t\nERROR forged line " * 50, data=None)), "next")
        recorder.wait_until(lambda events: events[-1].data == "next" if events else False)
        listener.settle()
    assert SECRET not in caplog.text


def test_keys_of_every_kind_arrive_as_python_values(recorder: Recorder) -> None:
    receiver([Order, Document, Sku, Membership], dispatch_uid="models")(recorder)
    badge = uuid.uuid4()
    with running_listener() as listener:
        order = Order.objects.create()
        document = Document.objects.create(title="t")
        Sku.objects.create(code="O'Brien: ü/1")
        Membership.objects.create(team=1, person="a", badge=badge)
        listener.wait_for(4)
    assert [one.pk for one in recorder.events] == [
        order.pk, document.pk, "O'Brien: ü/1", (1, "a", badge),
    ]  # fmt: skip


# -- stored events ------------------------------------------------------------------------------


def test_an_event_too_big_for_notify_arrives_in_order_with_what_surrounds_it(
    recorder: Recorder,
) -> None:
    big = {"text": "ü" * 100_000}
    with running_listener() as listener:
        publish("jobs", "before")
        with transaction.atomic():
            publish("jobs", 1)
            publish("jobs", big)
            publish("jobs", 3)
        publish("jobs", "after")
        publish("jobs", big)
        notify("jobs", "foreign")
        listener.wait_for(7)
        assert stats(listener)["broken"] == 0
    assert recorder.data == ["before", 1, big, 3, "after", big, "foreign"]


def test_many_big_events_between_small_ones_stay_in_order(recorder: Recorder) -> None:
    data = [("x" * 10_000 if number % 3 == 0 else "") + str(number) for number in range(90)]
    with running_listener() as listener:
        for one in data:
            publish("jobs", one)
        listener.wait_for(90)
    assert recorder.data == data


def test_a_big_change_of_a_model_carries_its_fields(recorder: Recorder) -> None:
    receiver(Document, dispatch_uid="documents")(recorder)
    with running_listener() as listener:
        with transaction.atomic():
            document = Document.objects.create(title="t")
            publish("testapp.document", "y" * 30_000)
        listener.wait_for(1)
    assert recorder.events[0].pk == document.pk


def stored(data: Any) -> str:
    """A frame that refers to a stored event with this data."""
    big = encode_event(
        "jobs", "published", data=data, at=time.time(), encoder=ENCODER, event_id="big"
    )
    [row] = store([big.body], "default")
    return frame(json.loads(reference_to(big, row).body))


def data_or_gap(heard: Recorder) -> list[Any]:
    return [one.data if one.action == "published" else "gap" for one in heard.events]


def test_what_follows_a_stored_event_that_is_being_fetched_waits_for_it_the_gap_included() -> None:
    heard = Recorder()
    reference = stored("x" * 50_000)
    with registry.isolated():
        receiver("jobs", on_gap=True)(heard)
        with running_listener() as listener:
            with stored_events_locked() as wait_for_a_fetch:
                notify("jobs", reference, "behind it")
                wait_for_a_fetch()
                terminate(listener.backend_pid)
                listener.wait_until_ready(2)
                notify("jobs", "after the gap")
                assert heard.events == []
            heard.wait_for(4)
    assert data_or_gap(heard) == ["x" * 50_000, "behind it", "gap", "after the gap"]


@pytest.mark.parametrize("limit", ["PGNOTIFY_QUEUE_MAX_EVENTS", "PGNOTIFY_QUEUE_MAX_BYTES"])
def test_what_waits_for_a_stored_event_is_bounded_and_the_rest_is_dropped_into_one_gap(
    limit: str, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    of_leader, of_node = Recorder(), Recorder()
    reference = stored("big")
    with registry.isolated():
        receiver("jobs", on_gap=True, dispatch_uid="leader")(of_leader)
        receiver("jobs", on_gap=True, dispatch_uid="node", every_node=True)(of_node)
        with running_listener() as listener:
            with stored_events_locked() as wait_for_a_fetch:
                notify("jobs", reference)
                wait_for_a_fetch()
                assert listener.service is not None
                intake = listener.service._intake
                setattr(settings, limit, 2)  # of frames, or of bytes: each of these has one
                notify("jobs", "a")
                until(lambda: intake._frames == 1)
                notify("jobs", "b")
                until(lambda: intake._frames == 2)
                notify("jobs", frame(event(at=1000.0)))
                until(lambda: stats(listener)["dropped"] == 1)
                notify("jobs", "d")
                until(lambda: stats(listener)["dropped"] == 2)
                delattr(settings, limit)
            of_leader.wait_for(4)
            of_node.wait_for(4)
            notify("jobs", "after")
            of_leader.wait_for(5)
            of_node.wait_for(5)
            told = listener.service.listener.health.last_gap
            assert stats(listener)["gaps"] == 1
    assert told is not None
    assert "stored event" in str(told["cause"])
    for heard in (of_leader, of_node):
        assert data_or_gap(heard) == ["big", "a", "b", "gap", "after"]
        gap = heard.events[3]
        assert gap.data["since"] <= "1970-01-01T00:16:40+00:00"
    complaints = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert len(complaints) == 1


def test_a_stored_event_that_was_changed_is_refused(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    with running_listener() as listener:
        with transaction.atomic():
            publish("jobs", SECRET * 5000, delivery="atomic")
            row = StoredEvent.objects.get()
            StoredEvent.objects.update(body=row.body.replace(SECRET, "forged"))
        publish("jobs", "next")
        recorder.wait_for(1)
        assert stats(listener)["broken"] == 1
    assert recorder.data == ["next"]
    assert "forged" not in caplog.text


# -- signing --------------------------------------------------------------------------------------


def test_with_signing_unsigned_and_foreign_frames_are_dropped_and_signed_ones_arrive(
    recorder: Recorder, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.PGNOTIFY_SIGNING = True
    with running_listener() as listener:
        notify("jobs", "plain s3cr3t", frame(event()))
        publish("jobs", "signed")
        publish("jobs", "y" * 20_000)
        listener.wait_for(2)
        assert stats(listener)["broken"] == 2
    assert recorder.data == ["signed", "y" * 20_000]
    assert SECRET not in caplog.text


def test_a_signature_is_good_on_its_own_channel_only(
    recorder: Recorder, settings: Settings
) -> None:
    settings.PGNOTIFY_SIGNING = True
    receiver("other")(Recorder())
    packer = FramePacker("test:1", "", signing.sign)
    outgoing = encode_event(
        "other", "published", data="x", at=time.time(), encoder=ENCODER, event_id="signed"
    )
    [(channel, payload)] = packer.pack([outgoing])
    with running_listener() as listener:
        notify(channel, payload)
        listener.wait_for(1)
        notify("jobs", payload)
        publish("jobs", "next")
        recorder.wait_for(1)
        assert stats(listener)["broken"] == 1
    assert recorder.data == ["next"]


def test_a_prefix_keeps_deployments_on_one_database_apart(
    recorder: Recorder, settings: Settings
) -> None:
    settings.PGNOTIFY_CHANNEL_PREFIX = "blue."
    with running_listener() as listener:
        notify("jobs", "for others")
        notify("blue.jobs", "for us")
        publish("jobs", "for us too")
        listener.wait_for(2)
    assert recorder.data == ["for us", "for us too"]
