"""NearCache and ``cached`` with a real listener: what is stale is never taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import caches
from django.db import transaction

from django_pgnotify.caching import NearCache, cached
from django_pgnotify.registry import Registry
from django_pgnotify.testing import RunningListener, running_listener
from tests.integration.caching import near_caches, until
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _caches(settings: Any, tmp_path: Path, pgnotify_registry: Registry) -> Iterator[None]:
    with near_caches(settings, tmp_path):
        yield


@pytest.fixture
def listener() -> Iterator[RunningListener]:
    with running_listener() as running:
        assert running.service is not None
        assert running.service.feed is not None
        until(lambda: running.service.feed.table.age() < 10)  # type: ignore[union-attr]
        yield running


def near(alias: str = "near") -> NearCache:
    backend = caches[alias]
    assert isinstance(backend, NearCache)
    return backend


def test_what_is_set_is_got_until_it_is_deleted(listener: RunningListener) -> None:
    near().set("a", {"b": [1]})
    near().set("text", "plain")
    assert near().get("a") == {"b": [1]}
    assert near().get("text") == "plain"
    assert near().get("a") is not near().get("a"), "what a caller changes stays the caller's"
    assert near().delete("a") is True
    assert near().delete("a") is False
    assert near().get("a") is None
    assert near().get("text") == "plain"


def test_a_committed_change_is_seen_when_the_save_returns(listener: RunningListener) -> None:
    @cached(depends_on=[Order], cache="near")
    def orders() -> int:
        return Order.objects.count()

    assert orders() == orders() == 0
    Order.objects.create()
    assert orders() == orders() == 1
    with transaction.atomic():
        Order.objects.create()
    assert orders() == orders() == 2
