"""Run Django's cache tests, and print what came of it.

    python -m tests.django_cache.run FOLDER VARIANT [TEST ...]

FOLDER is what :func:`tests.django_cache.source.fetch` returned, VARIANT one of
:data:`tests.django_cache.suites.VARIANTS`, TEST a part of the name of tests (default: all).

Django's tests measure seconds, so one that fails is run once more, alone. The last line of stdout
is JSON, of which ``again`` has those that passed the second time::

    {"run": COUNT, "failed": {TEST: TRACEBACK}, "skipped": {TEST: REASON}, "again": [TEST]}
"""

from __future__ import annotations

import json
import os
import sys
import unittest
from typing import Any


def main(folder: str, variant: str, names: list[str]) -> int:
    sys.path.insert(0, folder)
    os.environ["DJANGO_CACHE_TESTS"] = "1"
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.django_cache.settings"
    import django

    django.setup()
    from django.test.utils import setup_test_environment, teardown_test_environment

    from . import suites

    suite = unittest.TestSuite(
        case(method)
        for case in suites.cases(variant)
        for method in unittest.defaultTestLoader.getTestCaseNames(case)
        if not names or any(name in method for name in names)
    )
    setup_test_environment()
    try:
        create_tables("cache")
        result = unittest.TextTestRunner().run(suite)
        once_more = unittest.TextTestRunner().run(unittest.TestSuite(failed_in(result)))
    finally:
        teardown_test_environment()
    print(json.dumps(summary(result, once_more)))
    return 0 if once_more.wasSuccessful() else 1


def create_tables(app: str) -> None:
    """Temporary tables of the models of an app, see the settings."""
    from django.apps import apps
    from django.db import connection

    with connection.schema_editor() as editor:
        for model in apps.get_app_config(app).get_models():
            editor.create_model(model)


def failed_in(result: unittest.TestResult) -> list[unittest.TestCase]:
    """The tests that failed, as new ones; one of which a part failed is there whole."""
    cases = {_name(_whole(test)): _whole(test) for test, _ in result.failures + result.errors}
    return [type(case)(case._testMethodName) for case in cases.values()]


def summary(result: unittest.TestResult, once_more: unittest.TestResult) -> dict[str, Any]:
    still = {_name(test): text for test, text in once_more.failures + once_more.errors}
    first = {_name(_whole(test)) for test, _ in result.failures + result.errors}
    return {
        "run": result.testsRun,
        "failed": still,
        "skipped": {_name(test): reason for test, reason in result.skipped},
        "again": sorted(
            first - {_name(_whole(test)) for test, _ in once_more.failures + once_more.errors}
        ),
    }


def _whole(test: Any) -> unittest.TestCase:
    """The test that a subtest is of."""
    found: unittest.TestCase = getattr(test, "test_case", test)
    return found


def _name(test: unittest.TestCase) -> str:
    """``Class.method`` (and which part of it), without the module."""
    method, *part = test.id().split(" ", 1)
    return " ".join([".".join(method.split(".")[-2:]), *part])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
