"""The exception tree is what its file draws, and each error says what to do."""

from __future__ import annotations

import inspect

import pytest

from django_pgnotify import exceptions
from django_pgnotify.exceptions import InvalidArgument, PgNotifyError

CLASSES = [
    value
    for value in vars(exceptions).values()
    if inspect.isclass(value) and value.__module__ == exceptions.__name__
]


def drawn() -> dict[str, str | None]:
    """Name to parent, as the docstring of the module draws the tree."""
    assert exceptions.__doc__ is not None
    parents: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in exceptions.__doc__.splitlines()[2:]:
        words = [word for word in line.split() if word.isidentifier()]
        if not words:
            continue
        name = words[0]
        depth = line.index(name)
        while above and above[-1][0] >= depth:
            above.pop()
        parents[name] = above[-1][1] if above else None
        above.append((depth, name))
    return parents


def test_the_tree_drawn_is_the_tree_there_is() -> None:
    real = {
        one.__name__: None if one is PgNotifyError else one.__bases__[0].__name__ for one in CLASSES
    }
    assert drawn() == real


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_error_is_caught_by_the_base_class_and_says_what_happened(
    error: type[Exception],
) -> None:
    assert issubclass(error, PgNotifyError)
    assert error.__doc__
    assert error.__doc__.strip().endswith(".")
    assert str(error("cause")) == "cause"


def test_bad_input_is_a_type_error_and_a_value_error() -> None:
    for error in CLASSES:
        if issubclass(error, InvalidArgument):
            assert issubclass(error, TypeError)
            assert issubclass(error, ValueError)
        else:
            assert not issubclass(error, (TypeError, ValueError))
