"""The system checks of caches: each is provoked, and a sound project has none of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core import checks

from django_pgnotify.caching import cached
from django_pgnotify.management.commands.pgnotify_status import Command
from django_pgnotify.registry import Registry
from django_pgnotify.testing import running_listener
from tests.integration.caching import NEAR, near_caches
from tests.testapp.models import Order


@pytest.fixture(autouse=True)
def _caches(settings: Any, tmp_path: Path, pgnotify_registry: Registry) -> Iterator[None]:
    with near_caches(settings, tmp_path):
        yield


def found() -> list[tuple[str, str]]:
    """Number and message of each complaint about caches."""
    about = (
        "pgnotify.E006",
        "pgnotify.E007",
        "pgnotify.E008",
        "pgnotify.E009",
        "pgnotify.W008",
        "pgnotify.W009",
    )
    messages = [(str(message.id), message) for message in checks.run_checks(tags=["pgnotify"])]
    assert all(message.hint for _, message in messages)
    return [(number, message.msg) for number, message in messages if number in about]


def test_sound_caches_have_no_complaint() -> None:
    @cached(depends_on=[Order], cache="near")
    def sound() -> None: ...

    assert found() == []


@pytest.mark.parametrize(
    ("options", "number", "words"),
    [
        ({"MAX_STALENESS": -1}, "pgnotify.E007", "-1"),
        ({"JITTER": 2}, "pgnotify.E007", "JITTER"),
        ({"SECOND_LEVEL": "nowhere"}, "pgnotify.E007", "not in CACHES"),
        ({"SECOND_LEVEL": "near"}, "pgnotify.E007", "NearCache itself"),
        ({"SECOND_LEVEL": "odd"}, "pgnotify.E007", "NearCache itself"),
        ({"SECOND_LEVEL": "memory"}, "pgnotify.W008", "LocMemCache"),
        ({"MAX_STALENESS": 0.3}, "pgnotify.W009", "each 0.1 s"),
    ],
)
def test_options_that_cannot_work_are_told(
    settings: Any, options: dict[str, Any], number: str, words: str
) -> None:
    settings.CACHES = {**settings.CACHES, "odd": {"BACKEND": NEAR, "OPTIONS": options}}
    [(told, message)] = found()
    assert told == number
    assert words in message
    assert "'odd'" in message or number == "pgnotify.W009"


def test_a_cached_function_that_cannot_work_is_told() -> None:
    @cached(depends_on=["testapp.Tag"], cache="near")
    def tags_of_the_check() -> None: ...

    @cached(cache="nowhere")
    def lost_in_the_check() -> None: ...

    told = dict(found())
    assert set(told) == {"pgnotify.E008", "pgnotify.E006"}
    assert "testapp.Tag" in told["pgnotify.E008"]
    assert "tags_of_the_check" in told["pgnotify.E008"]
    assert "'nowhere'" in told["pgnotify.E006"]
    assert tags_of_the_check.__name__
    assert lost_in_the_check.__name__


def test_a_table_that_cannot_be_used_is_told(settings: Any, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"no table")
    settings.PGNOTIFY_EPOCH_TABLE = str(tmp_path / "broken")
    [(number, message)] = found()
    assert number == "pgnotify.E009"
    assert "broken" in message


def test_a_folder_that_is_missing_is_named_with_what_to_do(settings: Any, tmp_path: Path) -> None:
    settings.PGNOTIFY_EPOCH_TABLE = str(tmp_path / "nowhere" / "epochs")
    [(number, message)] = found()
    assert number == "pgnotify.E009"
    assert f"the folder {str(tmp_path / 'nowhere')!r} does not exist. Make it, " in message


def test_settings_that_cannot_be_read_are_told_once(settings: Any) -> None:
    settings.PGNOTIFY_EPOCH_TABLE = "relative/path"
    settings.PGNOTIFY_MAX_STALENESS = 0
    assert found() == []
    told = [one.msg for one in checks.run_checks(tags=["pgnotify"]) if one.id == "pgnotify.E003"]
    assert len(told) == 2
    assert any("absolute path" in message for message in told)


@pytest.mark.django_db(transaction=True)
def test_the_status_can_be_asked_for_though_a_check_finds_an_error(
    settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"no table of ours")
    settings.PGNOTIFY_EPOCH_TABLE = str(broken)
    assert "pgnotify.E009" in dict(found())
    with running_listener(topics=["rooms"]), pytest.raises(SystemExit):
        Command().run_from_argv(["manage.py", "pgnotify_status"])
    assert f"{broken}, not usable: " in capsys.readouterr().out
