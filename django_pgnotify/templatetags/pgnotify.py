"""``{% cached %}``: a fragment of a template that is kept until what it shows changes.

Django's ``{% cache %}`` gives its text to ``set()`` with a timeout and nothing else: it has no
place for what the text depends on, and what it read before a change it may store after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django import template
from django.core.cache import caches
from django.db.models import Model, QuerySet
from django.template.base import FilterExpression, Node, NodeList, Parser, Token
from django.template.context import Context
from django.template.defaulttags import CsrfTokenNode

from django_pgnotify.caching.fragments import fragment_key
from django_pgnotify.caching.loading import Place, load, names_of_dependencies
from django_pgnotify.caching.shelf import Shelf
from django_pgnotify.epochs.use import declare_use
from django_pgnotify.exceptions import PgNotifyError

register = template.Library()

OPTIONS = ("depends_on", "tags", "using")
FRAGMENTS = "template_fragments"


@register.tag("cached")
def do_cached(parser: Parser, token: Token) -> CachedNode:
    """Keep a fragment until one of its models or tags changes, or its time is over::

        {% load pgnotify %}
        {% cached 300 order_list user.pk depends_on="shop.Order shop.Customer" %}
            …
        {% endcached %}

    The first two arguments are the seconds (``None``: no limit) and the name of the fragment, which
    is not a variable; those after it tell its variants apart, as in ``{% cache %}``.
    ``depends_on=`` takes labels of models with spaces or commas between them, a queryset, an object
    (that row), or a list of those; ``tags=`` tags in the same way; ``using=`` an alias in CACHES
    (default: ``template_fragments`` if there is one, else ``default``).
    """
    name, *arguments = token.split_contents()
    if len(arguments) < 2:
        raise template.TemplateSyntaxError(
            f"{{% {name} %}} takes a timeout, the name of the fragment, and what it varies on."
        )
    timeout, fragment, *others = arguments
    vary_on: list[FilterExpression] = []
    options: dict[str, FilterExpression] = {}
    for argument in others:
        option, given, value = argument.partition("=")
        if not given or not option.isidentifier():
            vary_on.append(parser.compile_filter(argument))
        elif option not in OPTIONS:
            raise template.TemplateSyntaxError(
                f"{{% {name} … {fragment} %}} has no option {option!r}; choose from "
                f"{', '.join(OPTIONS)}."
            )
        elif option in options:
            raise template.TemplateSyntaxError(f"{{% {name} … {fragment} %}} has {option}= twice.")
        else:
            options[option] = parser.compile_filter(value)
    nodes = parser.parse((f"end{name}",))
    parser.delete_first_token()
    if not vary_on and nodes.get_nodes_by_type(CsrfTokenNode):
        raise template.TemplateSyntaxError(
            f"{{% {name} … {fragment} %}} has a {{% csrf_token %}} in it, which would be one "
            f"visitor's for all: leave the form out, or vary on the visitor."
        )
    return CachedNode(nodes, parser.compile_filter(timeout), fragment, vary_on, options)


class CachedNode(Node):
    """What stands between ``{% cached … %}`` and ``{% endcached %}``."""

    def __init__(
        self,
        nodelist: NodeList,
        timeout: FilterExpression,
        fragment: str,
        vary_on: list[FilterExpression],
        options: dict[str, FilterExpression],
    ) -> None:
        self.nodelist = nodelist
        self.timeout = timeout
        self.fragment = fragment
        self.vary_on = vary_on
        self.options = options
        declare_use()

    def render(self, context: Context) -> str:
        place = self._place(context)
        # A plain str, which a cache in memory may keep as it is.
        return str(load(place, lambda: "".join((self.nodelist.render(context), ""))))

    def _place(self, context: Context) -> Place:
        given = {name: value.resolve(context) for name, value in self.options.items()}
        for name, value in given.items():
            if value is None or value == "":  # a variable that is not there, as a template has it
                raise self._error(f"{name}={self.options[name]} is {value!r}; is it misspelt?")
        try:
            names = names_of_dependencies(
                list(_models(given.get("depends_on"))), list(_words(given.get("tags")))
            )
        except PgNotifyError as exc:
            raise self._error(str(exc)) from exc
        key = fragment_key(self.fragment, *(each.resolve(context) for each in self.vary_on))
        shelf = Shelf(self._alias(given.get("using")))
        return Place(shelf, key, None, self._seconds(context), names)

    def _seconds(self, context: Context) -> float | None:
        value = self.timeout.resolve(context)
        if value is None:
            return None
        try:
            return float(value)
        except (TypeError, ValueError):
            raise self._error(
                f"the timeout {self.timeout} is {value!r}; it takes a number of seconds, or None."
            ) from None

    def _alias(self, given: Any) -> str:
        known = caches.settings
        alias = given or (FRAGMENTS if FRAGMENTS in known else "default")
        if alias not in known:
            raise self._error(
                f"CACHES has no alias {alias!r}; choose from {', '.join(map(repr, known))}."
            )
        return str(alias)

    def _error(self, what: str) -> template.TemplateSyntaxError:
        return template.TemplateSyntaxError(f"{{% cached … {self.fragment} %}}: {what}")


def _words(value: Any) -> Iterator[Any]:
    """What a list holds, or a text with spaces or commas in it."""
    if isinstance(value, str):
        yield from value.replace(",", " ").split()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif value is not None:
        yield value


def _models(value: Any) -> Iterator[Any]:
    """What to depend on. A template calls a class that it meets, so a new object is its model."""
    for one in _words(value):
        if isinstance(one, QuerySet):
            yield one.model
        elif isinstance(one, Model) and one._state.adding:
            yield type(one)
        else:
            yield one
