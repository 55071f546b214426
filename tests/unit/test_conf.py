"""Settings are read live, typed, and wrong ones are named."""

from __future__ import annotations

import inspect
import os
import socket
from typing import Any

import pytest
from pytest_django import Settings

from django_pgnotify.conf import MODEL_OPTIONS, SETTINGS, Conf, conf, problems
from django_pgnotify.exceptions import InvalidArgument, InvalidSetting
from django_pgnotify.publishing.model_signals import notify_changes


def test_the_settings_of_the_contract_exist() -> None:
    assert {
        "PGNOTIFY_DATABASE",
        "PGNOTIFY_LISTEN_DATABASE",
        "PGNOTIFY_DELIVERY",
        "PGNOTIFY_MODELS",
        "PGNOTIFY_CHANNEL_PREFIX",
        "PGNOTIFY_SIGNING",
        "PGNOTIFY_HEARTBEAT_INTERVAL",
    } <= set(SETTINGS)


def test_the_defaults_are_those_of_the_contract(settings: Settings) -> None:
    del settings.PGNOTIFY_MODELS
    assert conf.DATABASE == "default"
    assert conf.LISTEN_DATABASE is None
    assert conf.DELIVERY == "after_commit"
    assert conf.MODELS == {}
    assert conf.CHANNEL_PREFIX == ""
    assert conf.SIGNING is False
    assert conf.BACKGROUND_SENDER is False
    assert conf.PUBLISH_RAW is False
    assert socket.gethostname() == conf.NODE
    assert problems() == []


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_setting_has_a_default_that_is_valid(name: str) -> None:
    default = SETTINGS[name]._default
    value = default() if callable(default) else default
    assert SETTINGS[name]._parse(value) == value


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_setting_is_described_where_it_is_defined(name: str) -> None:
    source = inspect.getsource(Conf)
    attribute = name.removeprefix("PGNOTIFY_")
    _, _, rest = source.partition(f"    {attribute}")
    assert rest.splitlines()[1].strip().startswith('"""')


def test_settings_are_read_live(settings: Settings) -> None:
    for seconds in (3, 4.5):
        settings.PGNOTIFY_HEARTBEAT_INTERVAL = seconds
        assert seconds == conf.HEARTBEAT_INTERVAL
        assert isinstance(conf.HEARTBEAT_INTERVAL, float)
    del settings.PGNOTIFY_HEARTBEAT_INTERVAL
    assert conf.HEARTBEAT_INTERVAL == 10.0


def test_the_listener_uses_the_publisher_s_database_unless_told_otherwise(
    settings: Settings,
) -> None:
    assert conf.listen_database == "default"
    settings.PGNOTIFY_DATABASE = "other"
    assert conf.listen_database == "other"
    settings.PGNOTIFY_LISTEN_DATABASE = "direct"
    assert conf.listen_database == "direct"
    assert conf.DATABASE == "other"


def test_the_source_names_node_and_process(settings: Settings) -> None:
    settings.PGNOTIFY_NODE = "web1"
    assert conf.source == f"web1:{os.getpid()}"


BAD: dict[str, list[Any]] = {
    "DATABASE": ["", None, 7],
    "LISTEN_DATABASE": ["", 7, []],
    "DELIVERY": ["immediate", "", None, 7, []],
    "MODELS": [
        None,
        [],
        "auth.User",
        {"User": {}},
        {7: {}},
        {"a.b.c": {}},
        {"auth.User": None},
        {"auth.User": ["email"]},
        {"auth.User": {"field": ["email"]}},
        {"auth.User": {"fields": [], 7: 1}},
        {"auth.User": {"field": [], 7: 1}},
    ],
    "CHANNEL_PREFIX": [None, 7, "a\x00", "x" * 25, "é" * 13, "\ud800"],
    "SIGNING": [None, 1, "True", ""],
    "BACKGROUND_SENDER": [None, 1, "True", ""],
    "PUBLISH_RAW": [None, 0, "no"],
    "NODE": ["", None, 7],
    "HEARTBEAT_INTERVAL": [0, -1, None, "10", True, float("nan"), float("inf")],
    "HEARTBEAT_TIMEOUT": [0, "5"],
    "CONNECT_TIMEOUT": [0, None],
    "RECONNECT_MAX_DELAY": [0, -0.5],
    "LEADER_POLL_INTERVAL": [0, []],
    "CONCURRENCY": [0, -1, 1.5, "8", True, None],
    "SHUTDOWN_TIMEOUT": [0, "30"],
    "QUEUE_MAX_EVENTS": [0, 1.5],
    "QUEUE_MAX_BYTES": [0, "64MB"],
    "STORED_RETENTION": [0, "1h"],
}


@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, bad) for name, some in BAD.items() for bad in some],
    ids=lambda value: repr(value)[:40],
)
def test_a_value_that_cannot_work_is_refused_by_name(
    settings: Settings, name: str, bad: Any
) -> None:
    setattr(settings, f"PGNOTIFY_{name}", bad)
    with pytest.raises(InvalidSetting) as caught:
        getattr(conf, name)
    assert str(caught.value).startswith(f"PGNOTIFY_{name} = {bad!r}: ")
    assert isinstance(caught.value, InvalidArgument)
    [problem] = problems()
    assert problem == str(caught.value)


def test_an_unknown_tier_lists_the_valid_ones(settings: Settings) -> None:
    settings.PGNOTIFY_DELIVERY = "immediate"
    with pytest.raises(InvalidSetting, match="after_commit, atomic"):
        conf.DELIVERY  # noqa: B018


def test_an_unknown_option_of_a_model_lists_the_valid_ones(settings: Settings) -> None:
    settings.PGNOTIFY_MODELS = {"auth.User": {"felds": ["email"]}}
    with pytest.raises(InvalidSetting, match="'felds'") as caught:
        conf.MODELS  # noqa: B018
    assert "fields" in str(caught.value)


def test_a_model_takes_in_the_setting_what_the_decorator_takes() -> None:
    parameters = set(inspect.signature(notify_changes).parameters) - {"model"}
    assert parameters == MODEL_OPTIONS


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("PGNOTIFY_DATABASES", "PGNOTIFY_DATABASE"),
        ("PGNOTIFY_HEARTBEAT", "PGNOTIFY_HEARTBEAT_"),
        ("PGNOTIFY_LISTEN_DATABSE", "PGNOTIFY_LISTEN_DATABASE"),
    ],
)
def test_an_unknown_setting_is_named_with_what_was_meant(
    settings: Settings, wrong: str, near: str
) -> None:
    setattr(settings, wrong, "x")
    [problem] = problems()
    assert wrong in problem
    assert f"Did you mean {near}" in problem


def test_an_unknown_setting_like_no_other_is_named(settings: Settings) -> None:
    settings.PGNOTIFY_ZZZ = 1
    assert problems() == ["Unknown setting PGNOTIFY_ZZZ."]


def test_every_problem_is_found_not_only_the_first(settings: Settings) -> None:
    settings.PGNOTIFY_ZZZ = 1
    settings.PGNOTIFY_SIGNING = "yes"
    settings.PGNOTIFY_CONCURRENCY = 0
    assert len(problems()) == 3
