"""Who may hear which group: nobody, unless somebody says yes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from pytest_django import Settings

from django_pgnotify.exceptions import InvalidArgument, InvalidSetting
from django_pgnotify.streams.permission import (
    Permission,
    Subscriber,
    project_rules_problem,
    valid_group,
)

NOBODY = Subscriber(None, {})


def yes(subscriber: Subscriber, group: str) -> bool:
    return True


async def ayes(subscriber: Subscriber, group: str) -> bool:
    return True


def no(subscriber: Subscriber, group: str) -> bool:
    return False


RULES = {"order.*": yes}


async def allowed(permit: Any, group: str = "order.7") -> bool:
    return await Permission(permit).allows(NOBODY, group)


async def test_nobody_may_hear_anything_by_default() -> None:
    assert not await allowed(None)


@pytest.mark.parametrize("rule", [yes, ayes, f"{__name__}.yes", f"{__name__}.ayes"])
async def test_a_rule_may_be_sync_or_async_or_named_by_its_path(rule: Any) -> None:
    assert await allowed(rule)


async def test_a_rule_that_hands_on_to_an_async_one_is_waited_for() -> None:
    async def never(subscriber: Subscriber, group: str) -> bool:
        return False

    def hands_on(subscriber: Subscriber, group: str) -> Any:
        return never(subscriber, group)

    assert not await allowed(hands_on)


@pytest.mark.parametrize("answer", [1, "yes", None, object(), [1]])
async def test_an_answer_that_is_no_truth_value_refuses_and_is_reported(
    answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        assert not await allowed(lambda subscriber, group: answer)
    assert "True or False" in caplog.text


async def test_a_rule_that_raises_refuses_and_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(subscriber: Subscriber, group: str) -> bool:
        raise LookupError("no such order")

    assert not await allowed(broken)
    assert "no such order" in caplog.text


@pytest.mark.parametrize(
    ("pattern", "group", "fits"),
    [
        ("order.*", "order.7", True),
        ("order.*", "order.", False),
        ("order.*", "order.7.private", False),
        ("order.*", "xorder.7", False),
        ("order.*", "order.7\n", False),
        ("*.*", "order.7", True),
        ("orders", "orders", True),
        ("orders", "ordersx", False),
        ("o.d", "oxd", False),
        ("*", "a.b", False),
    ],
)
async def test_a_pattern_is_a_name_whose_stars_stand_for_a_part(
    pattern: str, group: str, fits: bool
) -> None:
    assert await allowed({pattern: True}, group) is fits


async def test_the_first_pattern_that_fits_decides() -> None:
    rules = {"order.secret": False, "order.*": yes}
    assert not await allowed(rules, "order.secret")
    assert await allowed(rules, "order.7")


async def test_the_projects_rule_is_asked_where_there_is_no_other(settings: Settings) -> None:
    settings.PGNOTIFY_SUBSCRIBE_PERMISSION = f"{__name__}.RULES"
    assert await allowed(None)
    assert not await allowed(None, "customer.7")
    assert not await allowed(no), "a rule of its own counts alone"
    assert project_rules_problem() is None


@pytest.mark.parametrize("path", ["nowhere.at_all", f"{__name__}.NOBODY", f"{__name__}.missing"])
async def test_a_setting_that_names_no_rule_is_an_error_that_names_it(
    settings: Settings, path: str
) -> None:
    settings.PGNOTIFY_SUBSCRIBE_PERMISSION = path
    with pytest.raises(InvalidSetting, match=r"PGNOTIFY_SUBSCRIBE_PERMISSION = .*" + path):
        await allowed(None)
    assert path in str(project_rules_problem())


@pytest.mark.parametrize(
    "permit", [7, True, lambda group: True, Subscriber, {"a b": yes}, {"a": 1}, {7: yes}, "no.such"]
)
def test_what_is_no_rule_is_refused_where_it_is_written(permit: Any) -> None:
    with pytest.raises(InvalidArgument):
        Permission(permit)


@pytest.mark.parametrize("name", ["a", "order.7", "A-b_c.d", "x" * 99])
def test_names_that_channels_takes_are_valid(name: str) -> None:
    assert valid_group(name)


@pytest.mark.parametrize("name", ["", "a b", "x" * 100, "ü", "a\n", "a!b", "a/b"])
def test_names_that_channels_refuses_are_not(name: str) -> None:
    assert not valid_group(name)
