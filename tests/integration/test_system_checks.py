"""Each system check is provoked, and a sound project has none of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.core import checks
from django.core.checks import CheckMessage
from django.test import override_settings
from pytest_django import Settings

from django_pgnotify import forward, invalidates, receiver
from django_pgnotify.publishing import model_signals
from django_pgnotify.registry import registry
from tests.testapp.models import Article, Invoice, Order, Tag


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    publications = dict(registry.publications)
    with registry.isolated():
        yield
    registry.publications.clear()
    registry.publications.update(publications)
    model_signals.configuration_errors.clear()


def found() -> list[CheckMessage]:
    return list(checks.run_checks(tags=["pgnotify"]))


def ids() -> list[str]:
    return [str(message.id).removeprefix("pgnotify.") for message in found()]


def handle(event: Any) -> None: ...


def test_a_sound_project_has_no_complaint() -> None:
    receiver([Order, "jobs", "people"])(handle)
    forward(Order, group="order.{pk}", type="order.changed")
    invalidates(Order, keys=["order:{pk}"], cache="default")
    assert found() == []


def test_the_checks_run_with_manage_check() -> None:
    with override_settings(PGNOTIFY_TYPO=1):
        # By tag: from Django 6.1 on, other apps' checks may ask the database.
        messages = checks.run_checks(tags=["pgnotify"])
    assert "pgnotify.E003" in {message.id for message in messages}


def test_every_complaint_has_a_hint() -> None:
    receiver(Tag)(handle)
    forward(Order, group="order.{pk}", type="order.changed", layer="nowhere")
    forward(Order, group="order.{pk}", type="order.changed", layer="memory")
    invalidates(Order, keys=["order:{pk}"], cache="nowhere")
    invalidates(Order, keys=["order:{pk}"], cache="local")
    receiver("testapp.invoice")(handle)
    with override_settings(PGNOTIFY_DATABASE="nowhere", PGNOTIFY_TYPO=1):
        messages = found()
    assert {str(message.id)[-4:] for message in messages} == {
        "E001", "E003", "E005", "E006", "W001", "W002", "W003", "W004",
    }  # fmt: skip
    assert all(message.hint for message in messages)


@pytest.mark.parametrize("name", ["PGNOTIFY_DATABASE", "PGNOTIFY_LISTEN_DATABASE"])
@pytest.mark.parametrize(("alias", "says"), [("nowhere", "nowhere"), ("lite", "sqlite")])
def test_e001_an_alias_that_is_missing_or_not_postgresql(name: str, alias: str, says: str) -> None:
    with override_settings(**{name: alias}):
        messages = found()
    assert [message.id for message in messages] == ["pgnotify.E001"]
    assert messages[0].level == checks.ERROR
    assert name in messages[0].msg
    assert says in messages[0].msg


@pytest.mark.parametrize("version", ["3.2.9", "3.1.20", "3.2.9.dev1", "2.9.10"])
def test_e002_a_psycopg_that_is_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psycopg, "__version__", version)
    messages = found()
    assert [message.id for message in messages] == ["pgnotify.E002"]
    assert version in messages[0].msg
    assert "3.2.10" in str(messages[0].hint)


@pytest.mark.parametrize("version", ["3.2.10", "3.2.11.dev1", "3.3", "3.10.0", "4.0"])
def test_no_e002_for_a_psycopg_that_is_new_enough(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psycopg, "__version__", version)
    assert found() == []


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PGNOTIFY_HEARTBEAT_INTERVALL", 5, "PGNOTIFY_HEARTBEAT_INTERVAL?"),
        ("PGNOTIFY_SOMETHING", 5, "Unknown setting PGNOTIFY_SOMETHING"),
        ("PGNOTIFY_DELIVERY", "sometime", "after_commit"),
        ("PGNOTIFY_HEARTBEAT_INTERVAL", "5", "PGNOTIFY_HEARTBEAT_INTERVAL"),
        ("PGNOTIFY_HEARTBEAT_TIMEOUT", 0, "PGNOTIFY_HEARTBEAT_TIMEOUT"),
        ("PGNOTIFY_CONCURRENCY", 0, "PGNOTIFY_CONCURRENCY"),
        ("PGNOTIFY_CONCURRENCY", True, "PGNOTIFY_CONCURRENCY"),
        ("PGNOTIFY_SIGNING", "yes", "PGNOTIFY_SIGNING"),
        ("PGNOTIFY_CHANNEL_PREFIX", "x" * 40, "PGNOTIFY_CHANNEL_PREFIX"),
        ("PGNOTIFY_CHANNEL_PREFIX", None, "PGNOTIFY_CHANNEL_PREFIX"),
        ("PGNOTIFY_DATABASE", None, "PGNOTIFY_DATABASE"),
        ("PGNOTIFY_MODELS", ["auth.User"], "PGNOTIFY_MODELS"),
        ("PGNOTIFY_MODELS", {"User": {}}, "'User'"),
        ("PGNOTIFY_MODELS", {"auth.User": ["email"]}, "['email']"),
        ("PGNOTIFY_MODELS", {"auth.User": {"feilds": []}}, "feilds"),
    ],
)
def test_e003_a_setting_that_is_unknown_or_invalid(name: str, value: Any, says: str) -> None:
    with override_settings(**{name: value}):
        messages = found()
    assert [message.id for message in messages] == ["pgnotify.E003"]
    assert says in messages[0].msg


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ({"auth.Nobody": {}}, "auth.Nobody"),
        ({"nowhere.User": {}}, "nowhere"),
        ({"auth.Group": {"fields": ["no_such_field"]}}, "no_such_field"),
        ({"auth.Group": {"actions": ["exploded"]}}, "exploded"),
        ({"auth.Group": {"delivery": "sometime"}}, "sometime"),
        ({"auth.Group": {"topic": ""}}, "topic"),
    ],
)
def test_e004_models_that_cannot_be_applied(models: dict[str, Any], says: str) -> None:
    with override_settings(PGNOTIFY_MODELS=models):
        model_signals.track_configured_models()
        messages = found()
    assert [message.id for message in messages] == ["pgnotify.E004"]
    assert "PGNOTIFY_MODELS" in messages[0].msg
    assert says in messages[0].msg


def test_e005_a_layer_that_does_not_exist(settings: Settings) -> None:
    forward(Order, group="order.{pk}", type="order.changed", layer="nowhere")
    assert ids() == ["E005"]
    settings.CHANNEL_LAYERS = {
        **settings.CHANNEL_LAYERS,
        "nowhere": settings.CHANNEL_LAYERS["default"],
    }
    assert ids() == []


def test_e005_no_layers_at_all(settings: Settings) -> None:
    forward(Order, group="order.{pk}", type="order.changed")
    del settings.CHANNEL_LAYERS
    assert ids() == ["E005"]


def test_e006_a_cache_that_does_not_exist() -> None:
    invalidates(Order, keys=["orders"], cache="nowhere")
    [message] = found()
    assert message.id == "pgnotify.E006"
    assert "'nowhere'" in message.msg
    assert "'default'" in str(message.hint)


def test_w001_a_layer_that_stays_in_one_process() -> None:
    forward(Order, group="order.{pk}", type="order.changed", layer="memory")
    [message] = found()
    assert (message.id, message.level) == ("pgnotify.W001", checks.WARNING)
    assert "InMemoryChannelLayer" in message.msg


@pytest.mark.parametrize("backend", ["locmem.LocMemCache", "dummy.DummyCache"])
def test_w002_a_cache_that_stays_in_one_process(backend: str, settings: Settings) -> None:
    settings.CACHES = {
        **settings.CACHES,
        "local": {"BACKEND": f"django.core.cache.backends.{backend}"},
    }
    invalidates(Order, keys=["orders"], cache="local")
    [message] = found()
    assert (message.id, message.level) == ("pgnotify.W002", checks.WARNING)
    assert backend.rpartition(".")[2] in message.msg


def test_w003_a_receiver_of_a_model_that_publishes_nothing() -> None:
    receiver([Tag, Article])(handle)
    [message] = found()
    assert (message.id, message.level) == ("pgnotify.W003", checks.WARNING)
    assert "testapp.Tag" in message.msg


@pytest.mark.parametrize("topic", ["testapp.invoice", "testapp.Order", "testapp.Invoice"])
def test_w004_a_topic_that_looks_like_a_model_and_is_not_its_topic(topic: str) -> None:
    receiver(topic)(handle)
    [message] = found()
    assert (message.id, message.level) == ("pgnotify.W004", checks.WARNING)
    assert repr(topic) in message.msg


@pytest.mark.parametrize("topic", ["testapp.order", "billing", "testapp.nothing"])
def test_no_w004_for_a_models_own_topic_or_a_free_one(topic: str) -> None:
    receiver([topic, Invoice])(handle)
    assert ids() == []


def test_w005_a_listening_alias_that_looks_pooled(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(settings.DATABASES["default"], "DISABLE_SERVER_SIDE_CURSORS", True)
    [message] = found()
    assert (message.id, message.level) == ("pgnotify.W005", checks.WARNING)
    assert "PGNOTIFY_LISTEN_DATABASE" in str(message.hint)
    settings.PGNOTIFY_LISTEN_DATABASE = "other"
    assert ids() == []
