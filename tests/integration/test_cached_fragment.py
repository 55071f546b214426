"""``{% cached %}``: fragments of templates that are kept until what they show changes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import caches
from django.db import transaction
from django.template import Context, Template, TemplateSyntaxError

from django_pgnotify.caching import fragment_key, invalidate_tags, lookup
from django_pgnotify.caching.level import MISSING
from django_pgnotify.registry import Registry
from tests.integration.caching import near_caches
from tests.integration.test_cached_view import in_another_thread
from tests.testapp.models import Article, Order

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _caches(settings: Any, tmp_path: Path, pgnotify_registry: Registry) -> Iterator[None]:
    settings.PGNOTIFY_MAX_STALENESS = None  # nobody listens: what counts here is the writer's node
    with near_caches(settings, tmp_path):
        yield


class Page:
    """A template with one fragment, which says how often it was rendered."""

    def __init__(self, arguments: str, content: str = "{{ orders }}", **context: Any) -> None:
        self.template = Template(
            f"{{% load pgnotify %}}{{% cached {arguments} %}}{content}|{{{{ n }}}}{{% endcached %}}"
        )
        self.context = context
        self.numbers = count(1)

    def __call__(self, **context: Any) -> str:
        return self.template.render(
            Context(
                {
                    "orders": Order.objects.count,
                    "n": lambda: next(self.numbers),
                    **self.context,
                    **context,
                }
            )
        )


@pytest.mark.parametrize("alias", ["near", "files"])
def test_a_fragment_is_kept_until_its_model_changes(alias: str) -> None:
    page = Page(f"60 orders depends_on='testapp.Order' using='{alias}'")
    assert page() == page() == "0|1"
    Order.objects.create()
    assert page() == page() == "1|2"
    Article.objects.create(title="news")
    assert page() == "1|2"


def test_a_fragment_whose_rows_changed_while_it_was_rendered_is_not_kept() -> None:
    def change_behind_its_back() -> str:
        if Order.objects.count() == 0:
            in_another_thread(Order.objects.create)
        return ""

    page = Page(
        "60 orders depends_on='testapp.Order' using='near'",
        "{{ orders }}{{ change }}",
        change=change_behind_its_back,
    )
    assert page() == "0|1"
    assert page() == page() == "1|2"


def test_a_fragment_of_a_transaction_that_is_rolled_back_is_never_kept() -> None:
    page = Page("60 orders depends_on='testapp.Order' using='near'")
    with transaction.atomic():
        Order.objects.create()
        assert page() == "1|1"
        transaction.set_rollback(True)
    assert page() == page() == "0|2"


def test_several_models_and_tags_have_spaces_or_commas_between_them() -> None:
    page = Page(
        "60 orders depends_on='testapp.Order, testapp.Article' tags='one two,three' using='near'"
    )
    assert page() == page() == "0|1"
    Article.objects.create(title="news")
    assert page() == page() == "0|2"
    for number, tag in enumerate(("one", "two", "three"), 3):
        invalidate_tags(tag)
        assert page() == page() == f"0|{number}"
    invalidate_tags("four")
    assert page() == "0|5"


def test_a_fragment_may_depend_on_a_row_a_queryset_or_a_class_that_the_template_has_called() -> (
    None
):
    order, other = Order.objects.create(), Order.objects.create()
    row = Page("60 row depends_on=what using='near'", what=order)
    model = Page("60 model depends_on=what using='near'", what=Order)
    rows = Page("60 rows depends_on=what using='near'", what=Order.objects.filter(status="new"))
    assert [page() for page in (row, model, rows)] == ["2|1"] * 3
    other.save()
    assert [page() for page in (row, model, rows)] == ["2|1", "2|2", "2|2"]
    order.save()
    assert [page() for page in (row, model, rows)] == ["2|2", "2|3", "2|3"]


def test_a_fragment_may_depend_on_lists() -> None:
    order, other = Order.objects.create(), Order.objects.create()
    page = Page(
        "60 it depends_on=sources tags=tags using='near'", sources=[order, Article], tags=("a b",)
    )
    assert page() == page() == "2|1"
    other.save()
    assert page() == "2|1"
    Article.objects.create(title="news")
    assert page() == "2|2"
    order.save()
    assert page() == "2|3"
    invalidate_tags("a b")
    assert page() == page() == "2|4"


def test_variants_are_told_apart_whatever_their_values_hold() -> None:
    page = Page("60 it a b using='near'", "")
    assert page(a="x:y", b="z") == "|1"
    assert page(a="x", b="y:z") == "|2"
    assert page(a="x", b=1) == "|3"
    assert page(a="x", b="1") == "|3", "their text counts"
    assert page(a="x:y", b="z") == "|1"
    assert fragment_key("it", "x") != fragment_key("it", "x", "") != fragment_key("other", "x", "")


def test_a_fragment_in_a_fragment_makes_the_outer_one_depend_on_what_it_does() -> None:
    inner = (
        "{% cached 60 inner depends_on='testapp.Order' using='near' %}{{ orders }}{% endcached %}"
    )
    page = Page("60 outer using='near'", f"({inner})")
    alone = Template("{% load pgnotify %}" + inner)
    assert alone.render(Context({"orders": 0})) == "0"  # the inner one is a hit in the outer one
    assert page() == page() == "(0)|1"
    Order.objects.create()
    assert page() == page() == "(1)|2"


def test_a_fragment_is_found_under_its_key_and_is_a_plain_string() -> None:
    page = Page("60 orders 'a' 7 using='near'", "<b>{{ text }}</b>", text="<&>")
    assert page() == "<b>&lt;&amp;&gt;</b>|1", "escaped once"
    assert page() == "<b>&lt;&amp;&gt;</b>|1", "and not again when it comes from the cache"
    key = fragment_key("orders", "a", 7)
    assert type(lookup("near", key)) is str
    caches["near"].delete(key)
    assert lookup("near", key) is MISSING
    assert page().endswith("|2")


def test_the_alias_of_fragments_is_used_where_there_is_one(settings: Any) -> None:
    page = Page("60 it", "")
    assert page() == page() == "|1"
    settings.CACHES = {**settings.CACHES, "template_fragments": settings.CACHES["memory"]}
    assert page() == page() == "|2"
    caches["template_fragments"].clear()
    assert page() == "|3"


def test_a_fragment_without_a_timeout_is_kept_and_one_of_no_seconds_is_not() -> None:
    assert [Page("None it using='near'", "")() for _ in range(2)] == ["|1", "|1"]
    page = Page("seconds other using='near'", "")
    assert page(seconds="0") == "|1"
    assert page(seconds=0.0) == "|2"
    assert page(seconds="60") == page(seconds=1.5) == "|3"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("60", "takes a timeout, the name"),
        ("60 it depend_on='testapp.Order'", "no option 'depend_on'; choose from depends_on, tags"),
        ("60 it tags='a' tags='b'", "has tags= twice"),
    ],
)
def test_a_malformed_tag_is_refused_when_the_template_is_compiled(
    arguments: str, says: str
) -> None:
    with pytest.raises(TemplateSyntaxError, match=says):
        Page(arguments)


def test_a_token_of_one_visitor_is_not_kept_for_all() -> None:
    form = "<form>{% if orders %}{% csrf_token %}{% endif %}</form>"
    with pytest.raises(TemplateSyntaxError, match="one visitor's for all"):
        Page("60 it", form)
    assert Page("60 it user", form)(user=1, orders=0, n="") == "<form></form>|"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("'soon' it", "the timeout 'soon' is 'soon'; it takes a number of seconds, or None"),
        ("second it", "the timeout second is ''; it takes a number of seconds"),
        ("user.age it", "the timeout user.age is 'old'"),
        ("60 it using='nowhere'", "no alias 'nowhere'; choose from 'default', 'near'"),
        ("60 it depends_on='testapp.Nothing'", "testapp.Nothing"),
        ("60 it depends_on='testapp.Tag'", "publishes no changes"),
        ("60 it depends_on=number", "depends_on= takes"),
        ("60 it tags=number", "tags"),
        ("60 it depends_on=ordrs", "depends_on=ordrs is ''; is it misspelt"),
        ("60 it tags=none", "tags=none is None"),
        ("60 it tags=''", "tags='' is ''"),
    ],
)
def test_what_cannot_be_is_said_when_it_is_rendered(arguments: str, says: str) -> None:
    page = Page(arguments, number=7, none=None, user={"age": "old"})
    with pytest.raises(TemplateSyntaxError, match=says) as raised:
        page()
    assert "{% cached … it %}" in str(raised.value)


def test_an_error_inside_a_fragment_is_its_own() -> None:
    def fail() -> str:
        raise ZeroDivisionError

    page = Page("60 it using='near'", "{{ fail }}", fail=fail)
    with pytest.raises(ZeroDivisionError):
        page()
    assert page(fail="well") == "well|1"


def test_the_library_is_found_by_its_name() -> None:
    assert Template("{% load cached from pgnotify %}").render(Context()) == ""
