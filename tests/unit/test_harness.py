"""The parts of the harness that need no server."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.plugin import EMBEDDED_VERSIONS, _postgres_container, _start
from tests.settings import database_settings, database_url


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://postgres@127.0.0.1:5433/shop",
        "postgresql://us%40er:p%2Fw%3A@db.example/shop",
        "postgresql://user@[::1]:5433/shop",
        "postgresql://user@db:5432/a%20b%2Fc?sslmode=require&application_name=x+y",
        "postgresql:///shop?host=/run/postgresql",
    ],
)
def test_a_database_url_survives_the_way_into_settings_and_back(url: str) -> None:
    entry = database_settings(url)
    assert database_settings(database_url(entry)) == entry


def test_a_database_url_is_taken_apart() -> None:
    entry = database_settings("postgres://us%40er:p%2Fw@db:5433/sh%20op?sslmode=require")
    assert entry == {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "sh op",
        "USER": "us@er",
        "PASSWORD": "p/w",
        "HOST": "db",
        "PORT": "5433",
        "OPTIONS": {"sslmode": "require"},
    }


def test_a_url_of_another_database_is_refused() -> None:
    with pytest.raises(ValueError, match="scheme 'mysql'"):
        database_settings("mysql://root@db/shop")


@pytest.mark.parametrize("wanted", ["embeded", "mysql://db/x", "embedded:9"])
def test_an_unknown_server_is_refused_with_the_choices(wanted: str) -> None:
    with ExitStack() as stack, pytest.raises(pytest.UsageError) as caught:
        _start(wanted, stack)
    for version in EMBEDDED_VERSIONS:
        assert str(version) in str(caught.value)


def test_a_server_that_does_not_answer_is_named_without_its_password() -> None:
    with (
        ExitStack() as stack,
        pytest.raises(pytest.UsageError, match="cannot be reached") as caught,
    ):
        _start("postgresql://user:s3cret@127.0.0.1:9/shop", stack)
    assert "s3cret" not in str(caught.value)


def test_the_container_class_is_found_wherever_this_testcontainers_keeps_it() -> None:
    pytest.importorskip("testcontainers")
    assert _postgres_container().__name__ == "PostgresContainer"


def test_tests_get_their_lane_from_their_folder(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("unit") is not None
    assert request.node.get_closest_marker("integration") is None
