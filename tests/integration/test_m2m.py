"""A changed many-to-many relation is an event of the row that declares the field."""

# ruff: noqa: PT012  a block that is rolled back is more than one statement
# ruff: noqa: DJ008  nobody looks at the rows of a model that lives for one test

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.db import connection, models, transaction
from django.test.utils import isolate_apps

from django_pgnotify import Event, no_notify, notify_changes
from django_pgnotify.registry import registry
from tests.integration.hearing import Ear, hearing, statements
from tests.testapp.models import Article, Tag

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def ear() -> Iterator[Ear]:
    with hearing("testapp.article", "testapp.tag", "people") as one:
        yield one


@pytest.fixture
def article(ear: Ear) -> Article:
    one = Article.objects.create(title="a")
    ear.events()
    return one


@pytest.fixture
def tags() -> list[Tag]:
    return [Tag.objects.create(name=name) for name in "xyz"]


def changes(events: list[Event]) -> list[tuple[Any, str, str, list[Any]]]:
    """As (pk, field, operation, related keys); which of several keys comes first is no promise."""
    assert all(event.action == "m2m_changed" for event in events)
    return [
        (event.pk, event.data["field"], event.data["operation"], sorted(event.data["pks"]))
        for event in events
    ]


# -- from the side that declares the field ---------------------------------------------------


def test_adding_names_the_row_the_field_and_what_was_added(
    ear: Ear, article: Article, tags: list[Tag]
) -> None:
    article.tags.add(*tags[:2])
    event = ear.event()
    assert (event.model, event.topic) == ("testapp.article", "testapp.article")
    assert event.key == f"testapp.article:{article.pk}"
    assert changes([event]) == [(article.pk, "tags", "add", [tag.pk for tag in tags[:2]])]
    assert event.instance() == article


def test_what_was_there_already_is_no_change(ear: Ear, article: Article, tags: list[Tag]) -> None:
    article.tags.add(tags[0])
    ear.events()
    article.tags.add(tags[0])
    article.tags.add()
    assert ear.events() == []
    article.tags.add(tags[0], tags[1])
    assert changes(ear.events()) == [(article.pk, "tags", "add", [tags[1].pk])]


def test_removing_names_what_was_removed(ear: Ear, article: Article, tags: list[Tag]) -> None:
    article.tags.add(*tags)
    ear.events()
    article.tags.remove(tags[0], tags[2])
    assert changes(ear.events()) == [(article.pk, "tags", "remove", [tags[0].pk, tags[2].pk])]


def test_clearing_is_one_event(ear: Ear, article: Article, tags: list[Tag]) -> None:
    article.tags.add(*tags)
    ear.events()
    article.tags.clear()
    [(pk, field, operation, _)] = changes(ear.events())
    assert (pk, field, operation) == (article.pk, "tags", "clear")


def test_setting_is_what_was_removed_and_what_was_added(
    ear: Ear, article: Article, tags: list[Tag]
) -> None:
    article.tags.set(tags[:2])
    ear.events()
    article.tags.set(tags[1:])
    assert changes(ear.events()) == [
        (article.pk, "tags", "remove", [tags[0].pk]), (article.pk, "tags", "add", [tags[2].pk]),
    ]  # fmt: skip
    article.tags.set(tags[1:])
    assert ear.events() == []


def test_creating_through_the_relation_is_an_add(ear: Ear, article: Article) -> None:
    tag = article.tags.create(name="new")
    assert changes(ear.events()) == [(article.pk, "tags", "add", [tag.pk])]


# -- from the other side ---------------------------------------------------------------------


@pytest.fixture
def articles(ear: Ear) -> list[Article]:
    rows = [Article.objects.create(title=title) for title in "abc"]
    ear.events()
    return rows


def test_adding_from_the_other_side_is_an_event_for_each_row(
    ear: Ear, articles: list[Article], tags: list[Tag]
) -> None:
    tags[0].articles.add(*articles[:2])
    assert sorted(changes(ear.events())) == [
        (article.pk, "tags", "add", [tags[0].pk]) for article in articles[:2]
    ]


def test_removing_from_the_other_side_is_an_event_for_each_row(
    ear: Ear, articles: list[Article], tags: list[Tag]
) -> None:
    tags[0].articles.add(*articles)
    ear.events()
    tags[0].articles.remove(articles[1])
    assert changes(ear.events()) == [(articles[1].pk, "tags", "remove", [tags[0].pk])]


def test_clearing_from_the_other_side_is_an_event_for_each_row_it_had(
    ear: Ear, articles: list[Article], tags: list[Tag]
) -> None:
    tags[0].articles.add(*articles[:2])
    tags[1].articles.add(articles[2])
    ear.events()
    tags[0].articles.clear()
    events = changes(ear.events())
    assert sorted((pk, operation) for pk, _, operation, _ in events) == [
        (article.pk, "clear") for article in articles[:2]
    ]
    tags[0].articles.clear()
    assert ear.events() == []


def test_setting_from_the_other_side_is_an_event_for_each_row_that_changed(
    ear: Ear, articles: list[Article], tags: list[Tag]
) -> None:
    tags[0].articles.set(articles[:2])
    ear.events()
    tags[0].articles.set(articles[1:])
    assert changes(ear.events()) == [
        (articles[0].pk, "tags", "remove", [tags[0].pk]),
        (articles[2].pk, "tags", "add", [tags[0].pk]),
    ]


# -- when ------------------------------------------------------------------------------------


def test_it_follows_its_transaction(ear: Ear, article: Article, tags: list[Tag]) -> None:
    with transaction.atomic():
        article.tags.add(tags[0])
        with pytest.raises(RuntimeError), transaction.atomic():
            article.tags.add(tags[1])
            raise RuntimeError
        assert ear.events() == []
    assert changes(ear.events()) == [(article.pk, "tags", "add", [tags[0].pk])]


def test_a_row_and_its_relations_arrive_in_the_order_they_were_made(
    ear: Ear, tags: list[Tag]
) -> None:
    with transaction.atomic():
        article = Article.objects.create(title="a")
        article.tags.set(tags)
        article.title = "b"
        article.save()
        article.tags.clear()
    assert [event.action for event in ear.events()] == [
        "created", "m2m_changed", "updated", "m2m_changed",
    ]  # fmt: skip


def test_no_notify_silences_it_and_what_comes_after_is_heard(
    ear: Ear, article: Article, tags: list[Tag]
) -> None:
    with no_notify():
        article.tags.add(tags[0])
        tags[1].articles.add(article)
        tags[1].articles.clear()
    assert ear.events() == []
    tags[0].articles.clear()
    assert changes(ear.events())[0][0] == article.pk


def test_a_thousand_tags_are_one_event(ear: Ear, article: Article) -> None:
    many = Tag.objects.bulk_create([Tag(name=str(number)) for number in range(1000)])
    with statements() as ran:
        article.tags.add(*many)
    assert len(ran.notify) == 1
    [(_, _, _, pks)] = changes(ear.events())
    assert sorted(pks) == sorted(tag.pk for tag in many)


# -- models of other kinds -------------------------------------------------------------------


def test_a_model_of_another_app_tells_of_its_relations_too(ear: Ear) -> None:
    user = User.objects.create_user("ann")
    group = Group.objects.create(name="staff")
    ear.events()
    user.groups.add(group)
    group.user_set.clear()
    events = ear.events()
    assert [(pk, field, operation) for pk, field, operation, _ in changes(events)] == [
        (user.pk, "groups", "add"), (user.pk, "groups", "clear"),
    ]  # fmt: skip
    assert {event.model for event in events} == {"auth.user"}


@contextmanager
def tables(*created: type[models.Model]) -> Iterator[None]:
    with connection.schema_editor() as editor:
        for model in created:
            editor.create_model(model)
    try:
        yield
    finally:
        with connection.schema_editor() as editor:
            for model in reversed(created):
                editor.delete_model(model)


@contextmanager
def fresh_models() -> Iterator[None]:
    before = dict(registry.publications)
    try:
        with isolate_apps("tests.testapp"):
            yield
    finally:
        registry.publications.clear()
        registry.publications.update(before)


def raw(ear: Ear) -> list[str]:
    """Payloads: these models are unknown to the registry of apps, so they cannot be resolved."""
    return [heard.payload for heard in ear.frames()]


def test_a_through_model_of_one_s_own_is_followed_though_it_is_defined_later(ear: Ear) -> None:
    with fresh_models():

        @notify_changes(topic="people")
        class Team(models.Model):
            members: Any = models.ManyToManyField(
                "Player", through="Contract", related_name="teams"
            )

            class Meta:
                app_label = "testapp"

        class Player(models.Model):
            class Meta:
                app_label = "testapp"

        class Contract(models.Model):
            team = models.ForeignKey(Team, models.CASCADE)
            player = models.ForeignKey(Player, models.CASCADE)
            salary = models.IntegerField(default=1)

            class Meta:
                app_label = "testapp"

        with tables(Team, Player, Contract):
            team: Any = Team._default_manager.create()
            player: Any = Player._default_manager.create()
            ear.frames()
            team.members.add(player, through_defaults={"salary": 5})
            [payload] = raw(ear)
            assert f'"pk":{team.pk}' in payload
            assert f'"data":{{"field":"members","operation":"add","pks":[{player.pk}]}}' in payload
            player.teams.clear()
            [payload] = raw(ear)
            assert f'"pk":{team.pk}' in payload
            assert '"operation":"clear"' in payload


def test_a_relation_of_a_model_with_itself_names_the_row_it_was_changed_on(ear: Ear) -> None:
    with fresh_models():

        @notify_changes(topic="people")
        class Person(models.Model):
            follows: Any = models.ManyToManyField(
                "self", symmetrical=False, related_name="followers"
            )

            class Meta:
                app_label = "testapp"

        with tables(Person):
            one: Any = Person._default_manager.create()
            other: Any = Person._default_manager.create()
            ear.frames()
            one.follows.add(other)
            [payload] = raw(ear)
            assert f'"pk":{one.pk}' in payload
            assert f'"pks":[{other.pk}]' in payload
            other.followers.remove(one)
            [payload] = raw(ear)
            assert f'"pk":{one.pk}' in payload
            assert f'"operation":"remove","pks":[{other.pk}]' in payload


def test_a_symmetrical_relation_is_a_change_of_both_rows(ear: Ear) -> None:
    with fresh_models():

        @notify_changes(topic="people")
        class Person(models.Model):
            friends: Any = models.ManyToManyField("self")

            class Meta:
                app_label = "testapp"

        def told() -> list[tuple[Any, str, list[Any]]]:
            return [
                (event["pk"], event["data"]["operation"], event["data"]["pks"])
                for payload in raw(ear)
                for event in json.loads(payload)["events"]
            ]

        with tables(Person):
            one, two, three = (Person._default_manager.create() for _ in range(3))
            ear.frames()
            one.friends.add(two, three)
            assert told() == [
                (one.pk, "add", [two.pk, three.pk]),
                (two.pk, "add", [one.pk]),
                (three.pk, "add", [one.pk]),
            ]
            two.friends.add(one)
            assert told() == []
            three.friends.remove(one)
            assert told() == [(three.pk, "remove", [one.pk]), (one.pk, "remove", [three.pk])]
            one.friends.add(one)
            assert told() == [(one.pk, "add", [one.pk])]
            two.friends.set([three])
            assert told() == [
                (two.pk, "remove", [one.pk]),
                (one.pk, "remove", [two.pk]),
                (two.pk, "add", [three.pk]),
                (three.pk, "add", [two.pk]),
            ]
            one.friends.add(two)
            told()
            two.friends.clear()
            [(cleared, *_), *others] = told()
            assert cleared == two.pk
            assert others == [(one.pk, "clear", [two.pk]), (three.pk, "clear", [two.pk])]
            assert list(one.friends.all()) == [one]
            one.friends.clear()
            assert [pk for pk, *_ in told()] == [one.pk]


def test_only_the_actions_asked_for_are_published(ear: Ear) -> None:
    with fresh_models():

        @notify_changes(topic="people", actions=["created"])
        class Quiet(models.Model):
            others: Any = models.ManyToManyField("self")

            class Meta:
                app_label = "testapp"

        with tables(Quiet):
            one = Quiet._default_manager.create()
            one.others.add(one)
            [payload] = raw(ear)
            assert '"action":"created"' in payload


def test_a_child_s_inherited_relation_is_its_parent_s(ear: Ear) -> None:
    with fresh_models():

        @notify_changes(topic="people")
        class Parent(models.Model):
            labels: Any = models.ManyToManyField("Label", related_name="+")

            class Meta:
                app_label = "testapp"

        class Child(Parent):
            class Meta:
                app_label = "testapp"

        class Label(models.Model):
            class Meta:
                app_label = "testapp"

        with tables(Label, Parent, Child):
            child = Child._default_manager.create()
            ear.frames()
            child.labels.add(Label._default_manager.create())
            [payload] = raw(ear)
            assert '"model":"testapp.parent"' in payload
            assert f'"pk":{child.pk}' in payload
