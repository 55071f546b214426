"""System checks: what is wrong with a project is said before it runs, with a hint."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core import checks as django_checks
from django.core.checks import CheckMessage
from pytest_django import Settings

from django_pgnotify import checks, forward, invalidates, receiver
from django_pgnotify.publishing import model_signals
from django_pgnotify.registry import registry
from tests.testapp.models import Car, Invoice, Order, Tag


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with registry.isolated():
        yield


def found() -> list[CheckMessage]:
    return django_checks.run_checks(tags=["pgnotify"])


def only(id: str) -> CheckMessage:
    messages = found()
    assert [message.id for message in messages] == [id]
    [message] = messages
    assert message.hint
    is_error = id.startswith("pgnotify.E")
    assert message.level == (django_checks.ERROR if is_error else django_checks.WARNING)
    return message


def ignore(event: Any) -> None: ...


def test_a_project_that_is_right_hears_nothing() -> None:
    receiver(Order)(ignore)
    receiver([Invoice, "jobs"])(ignore)
    receiver(Car)(ignore)
    forward(Order, group="order.{pk}", type="order.changed")
    invalidates(Order, keys=["order:{pk}"])
    assert found() == []


def test_every_check_that_is_documented_is_tested_here() -> None:
    assert checks.__doc__ is not None
    documented = {
        line.split()[0]
        for line in checks.__doc__.splitlines()
        if line[:1] in ("E", "W") and line[1:4].isdigit()
    }
    of_caches = Path(__file__).parents[1] / "integration" / "test_cache_checks.py"
    text = "".join(path.read_text(encoding="utf-8") for path in (Path(__file__), of_caches))
    assert documented
    assert all(f'"pgnotify.{number}"' in text for number in documented)


# -- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PGNOTIFY_DATABASE", "PGNOTIFY_LISTEN_DATABASE"])
@pytest.mark.parametrize(("alias", "says"), [("lite", "sqlite"), ("nowhere", "'other'")])
def test_an_alias_that_has_no_notify_is_an_error(
    settings: Settings, name: str, alias: str, says: str
) -> None:
    setattr(settings, name, alias)
    message = only("pgnotify.E001")
    assert name in message.msg
    assert repr(alias) in message.msg
    assert says in message.msg


@pytest.mark.parametrize("version", ["3.1.18", "3.2.9", "2.9.10", "3.2"])
def test_a_psycopg_that_is_too_old_is_an_error(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(psycopg, "__version__", version)
    message = only("pgnotify.E002")
    assert version in message.msg
    assert "3.2.10" in str(message.hint)


@pytest.mark.parametrize("version", ["3.2.10", "3.2.11.dev1", "3.3", "3.3.0rc1", "3.10.1", "4.0"])
def test_a_psycopg_that_is_new_enough_is_fine(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(psycopg, "__version__", version)
    assert found() == []


def test_a_psycopg_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert "pip install" in str(only("pgnotify.E002").hint)


def test_an_unknown_setting_is_an_error(settings: Settings) -> None:
    settings.PGNOTIFY_HEARTBEAT = 5
    assert "PGNOTIFY_HEARTBEAT" in only("pgnotify.E003").msg


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("PGNOTIFY_DELIVERY", "immediate"),
        ("PGNOTIFY_DATABASE", ""),
        ("PGNOTIFY_LISTEN_DATABASE", 7),
        ("PGNOTIFY_MODELS", {"auth.User": {"felds": []}}),
        ("PGNOTIFY_CONCURRENCY", 0),
    ],
)
def test_a_setting_that_cannot_work_is_an_error_and_the_other_checks_survive_it(
    settings: Settings, name: str, bad: Any
) -> None:
    setattr(settings, name, bad)
    assert repr(bad) in only("pgnotify.E003").msg


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ({"auth.Usr": {}}, "no model 'auth.Usr'; did you mean 'auth.User'?"),
        ({"nowhere.Xyzzy": {}}, "no model 'nowhere.Xyzzy'; a label is 'app.Model'."),
        ({"auth.Group": {"fields": ["nmae"]}}, "nmae"),
        ({"auth.Group": {"actions": ["create"]}}, "create"),
        ({"auth.Group": {"delivery": "immediate"}}, "immediate"),
        ({"auth.Group": {"topic": ""}}, "topic"),
        ({"testapp.Order": {}}, "already"),
    ],
)
def test_models_that_cannot_be_applied_are_an_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, models: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(model_signals, "configuration_errors", [])
    settings.PGNOTIFY_MODELS = models
    publications = dict(registry.publications)
    model_signals.track_configured_models()
    assert registry.publications == publications
    message = only("pgnotify.E004")
    assert says in message.msg
    assert next(iter(models)) in message.msg


# -- layers ----------------------------------------------------------------------------------


def test_a_layer_that_is_not_configured_is_an_error() -> None:
    forward(Order, group="order.{pk}", type="order.changed", layer="nowhere")
    assert "'nowhere'" in only("pgnotify.E005").msg


def test_forwarding_without_channels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    forward(Order, group="order.{pk}", type="order.changed")
    monkeypatch.setitem(sys.modules, "channels", None)
    assert "channels" in str(only("pgnotify.E005").hint)


def test_forwarding_without_channel_layers_is_an_error(settings: Settings) -> None:
    del settings.CHANNEL_LAYERS
    forward(Order, group="order.{pk}", type="order.changed")
    assert "CHANNEL_LAYERS" in only("pgnotify.E005").msg


def test_a_layer_that_stays_in_one_process_is_a_warning() -> None:
    forward(Order, group="order.{pk}", type="order.changed", layer="memory")
    message = only("pgnotify.W001")
    assert "'memory'" in message.msg
    assert "PostgresChannelLayer" in str(message.hint)


# -- caches ----------------------------------------------------------------------------------


def test_a_cache_that_is_not_configured_is_an_error() -> None:
    invalidates(Order, keys=["order:{pk}"], cache="nowhere")
    message = only("pgnotify.E006")
    assert "'nowhere'" in message.msg
    assert "'default'" in str(message.hint)


@pytest.mark.parametrize("backend", ["locmem.LocMemCache", "dummy.DummyCache"])
def test_a_cache_in_another_process_s_memory_is_a_warning(settings: Settings, backend: str) -> None:
    settings.CACHES = {"default": {"BACKEND": f"django.core.cache.backends.{backend}"}}
    invalidates(Order, keys=["order:{pk}"])
    assert backend.rpartition(".")[2] in only("pgnotify.W002").msg


# -- receivers -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["no.such.thing", "tests.settings.SECRET_KEY"])
def test_a_permission_that_cannot_be_asked_is_an_error(settings: Settings, path: str) -> None:
    settings.PGNOTIFY_SUBSCRIBE_PERMISSION = path
    assert path in only("pgnotify.E010").msg


def test_a_permission_that_can_be_asked_is_fine(settings: Settings) -> None:
    settings.PGNOTIFY_SUBSCRIBE_PERMISSION = "tests.process.live.urls.permit"
    assert found() == []


def test_a_receiver_of_a_model_that_publishes_nothing_is_a_warning() -> None:
    receiver(Tag, dispatch_uid="mine")(ignore)
    message = only("pgnotify.W003")
    assert "testapp.Tag" in message.msg
    assert "mine" in message.msg
    assert "notify_changes" in str(message.hint)


@pytest.mark.parametrize("topic", ["testapp.invoice", "testapp.Invoice", "auth.User"])
def test_a_topic_that_looks_like_a_model_and_is_not_its_topic_is_a_warning(topic: str) -> None:
    receiver(topic, dispatch_uid="mine")(ignore)
    message = only("pgnotify.W004")
    assert repr(topic) in message.msg
    assert "'billing'" in message.msg or "'people'" in message.msg


@pytest.mark.parametrize("topic", ["testapp.order", "jobs", "billing", "people"])
def test_a_topic_that_somebody_publishes_on_is_fine(topic: str) -> None:
    receiver(topic)(ignore)
    assert found() == []


def test_an_alias_that_looks_pooled_is_a_warning_for_the_listener(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(settings.DATABASES["default"], "DISABLE_SERVER_SIDE_CURSORS", True)
    message = only("pgnotify.W005")
    assert "'default'" in message.msg
    assert "PGNOTIFY_LISTEN_DATABASE" in str(message.hint)
    settings.PGNOTIFY_LISTEN_DATABASE = "other"
    assert found() == []


@pytest.mark.parametrize(("limit", "fine"), [(10.0, False), (3600.0, True), (None, True)])
def test_a_limit_below_the_retention_of_the_log_is_a_warning(
    settings: Settings, limit: float | None, fine: bool
) -> None:
    settings.PGNOTIFY_LOG_RETENTION = 3600.0
    settings.PGNOTIFY_LOG_LIMIT = limit
    if fine:
        assert found() == []
    else:
        assert "PGNOTIFY_LOG_LIMIT = 10 s" in only("pgnotify.W006").msg


def test_a_durable_consumer_named_after_its_function_is_a_warning() -> None:
    receiver("ledger", durable=True)(ignore)
    assert ignore.__name__ in only("pgnotify.W007").msg
    registry.remove(ignore)
    receiver("ledger", durable=True, dispatch_uid="ledger")(ignore)
    assert found() == []
