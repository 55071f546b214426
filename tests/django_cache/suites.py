"""Django's cache tests on NearCache, in each way that it can be set up.

Imported by :mod:`.run` alone, since it needs Django's ``cache`` package on the path.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
import unittest
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any
from unittest import mock

from asgiref.sync import async_to_sync
from django.core.cache import cache, caches
from django.test import TestCase, override_settings

theirs: Any = importlib.import_module("cache.tests")

BACKEND = os.environ.get("CACHE_BACKEND", "django_pgnotify.caching.NearCache")

#: The runs of several variants share a table, and must not share the caches of this name.
LOCATION = f"run-{os.getpid()}"

#: Tests that do not fit a variant: part of ``Class.method`` to the reason.
EXCEPTIONS = {
    "NearCacheAsync.test_*_async_uses_specialized_implementation": (
        "asks about the methods of the backend's class, which the asynchronous face stands before"
    ),
    "NearCacheSecondLevel.test_cull": (
        "counts what is left: what was culled from this process is still in the second level"
    ),
    "NearCacheSecondLevel.test_zero_cull": "the same",
}


def setting(**params: Any) -> dict[str, dict[str, Any]]:
    """The aliases of Django's tests, each as the backend under test, with the same OPTIONS more."""
    options = params.pop("OPTIONS", {})
    aliases = {}
    for alias, own in theirs._caches_setting_base.items():
        aliases[alias] = {
            "BACKEND": BACKEND,
            "LOCATION": LOCATION,
            **own,
            **params,
            "OPTIONS": {**options, **own.get("OPTIONS", {})},
        }
    return aliases


class NearCacheBase(theirs.BaseCacheTests):
    """What has no second level."""

    def test_cull(self) -> None:
        self._perform_cull_test("cull", 50, 29)

    def test_zero_cull(self) -> None:
        self._perform_cull_test("zero_cull", 50, 19)


class AsyncFace:
    """A cache of which every method is its asynchronous twin, waited for."""

    def __init__(self, cache: Any) -> None:
        object.__setattr__(self, "_cache", cache)

    def __getattr__(self, name: str) -> Any:
        twin = getattr(self._cache, f"a{name}", None)
        return getattr(self._cache, name) if twin is None else async_to_sync(twin)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._cache, name, value)

    def __contains__(self, key: str) -> bool:
        return bool(async_to_sync(self._cache.ahas_key)(key))


class AsyncFaces:
    """``caches``, of which each alias is an AsyncFace."""

    def __getitem__(self, alias: str) -> AsyncFace:
        return AsyncFace(caches[alias])


@override_settings(CACHES=setting())
class NearCache(NearCacheBase, TestCase):
    pass


@override_settings(CACHES=setting())
class NearCacheAsync(NearCacheBase, TestCase):
    """The same through ``aget``, ``aset`` and so on."""

    def setUp(self) -> None:
        super().setUp()
        for name, face in (("cache", AsyncFace(cache)), ("caches", AsyncFaces())):
            patch = mock.patch.object(theirs, name, face)
            patch.start()
            self.addCleanup(patch.stop)


@override_settings(PGNOTIFY_EPOCH_TABLE=None, CACHES=setting())
class NearCacheInProcessTable(NearCacheBase, TestCase):
    """Without a file: this process listens for itself."""

    def setUp(self) -> None:
        super().setUp()
        # Until it hears itself nothing is cached.
        deadline = time.monotonic() + 60
        while cache.get_or_set("heard", 1) and cache.get("heard") is None:
            assert time.monotonic() < deadline, "this process does not hear itself"
            time.sleep(0.01)
        cache.delete("heard")


SECOND = {
    "second": {
        "BACKEND": "django.core.cache.backends.filebased.FileBasedCache",
        "LOCATION": tempfile.mkdtemp(prefix="second-level-"),
        "OPTIONS": {"MAX_ENTRIES": 10_000},
    }
}


@override_settings(CACHES=setting(OPTIONS={"SECOND_LEVEL": "second"}) | SECOND)
class NearCacheSecondLevel(NearCacheBase, TestCase):
    pass


def on_near_cache(case: type) -> type:
    """A class of Django's tests that uses LocMemCache, on the backend under test."""
    aliases = {
        alias: {**entry, "BACKEND": BACKEND, "LOCATION": f"{LOCATION}-{entry.get('LOCATION')}"}
        for alias, entry in case._overridden_settings["CACHES"].items()  # type: ignore[attr-defined]
    }
    return override_settings(CACHES=aliases)(type(f"NearCache{case.__name__}", (case,), {}))


#: What Django builds on a cache: the middleware, the view decorator, the keys of pages.
USERS = [
    on_near_cache(getattr(theirs, name))
    for name in (
        "CacheUtils",
        "PrefixedCacheUtils",
        "CacheHEADTest",
        "CacheI18nTest",
        "PrefixedCacheI18nTest",
        "CacheMiddlewareTest",
        "TestWithTemplateResponse",
    )
]


#: Run beside each other, because Django's tests sleep until entries expire.
VARIANTS: dict[str, list[type[unittest.TestCase]]] = {
    "near": [NearCache],
    "async": [NearCacheAsync],
    "in-process": [NearCacheInProcessTable],
    "second-level": [NearCacheSecondLevel],
    "users": USERS,
}


def cases(variant: str) -> list[type[unittest.TestCase]]:
    """The classes to run, without what is listed in EXCEPTIONS."""
    found = VARIANTS[variant]
    for pattern, reason in EXCEPTIONS.items():
        _leave_out(found, pattern, reason)
    return found


def _leave_out(found: list[type[unittest.TestCase]], pattern: str, reason: str) -> None:
    name, _, method = pattern.partition(".")
    for case in found:
        if case.__name__ == name:
            for each in unittest.defaultTestLoader.getTestCaseNames(case):
                if fnmatchcase(each, method):
                    skipped: Callable[..., Any] = unittest.skip(reason)(getattr(case, each))
                    setattr(case, each, skipped)
