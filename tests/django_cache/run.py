"""Run Django's cache tests, and print what came of it.

    python -m tests.django_cache.run FOLDER VARIANT [TEST ...]

FOLDER is what :func:`tests.django_cache.source.fetch` returned, VARIANT one of
:data:`tests.django_cache.suites.VARIANTS`, TEST a part of the name of tests (default: all).
The last line of stdout is JSON:
``{"run": COUNT, "failed": {TEST: TRACEBACK}, "skipped": {TEST: REASON}}``.
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
    finally:
        teardown_test_environment()
    print(json.dumps(summary(result)))
    return 0 if result.wasSuccessful() else 1


def create_tables(app: str) -> None:
    """Temporary tables of the models of an app, see the settings."""
    from django.apps import apps
    from django.db import connection

    with connection.schema_editor() as editor:
        for model in apps.get_app_config(app).get_models():
            editor.create_model(model)


def summary(result: unittest.TestResult) -> dict[str, Any]:
    return {
        "run": result.testsRun,
        "failed": {_name(test): text for test, text in result.failures + result.errors},
        "skipped": {_name(test): reason for test, reason in result.skipped},
    }


def _name(test: unittest.TestCase) -> str:
    """``Class.method``, without the module."""
    return ".".join(test.id().split(".")[-2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
