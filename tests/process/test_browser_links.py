"""The JavaScript module in a real Chromium: streams and websockets that come back by themselves."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.webdriver import WebDriver

from django_pgnotify import publish, publish_many
from tests.integration.durable import LEDGER
from tests.integration.test_layer import stop_layers
from tests.process.live.site import Site, serving

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]

DEADLINE = 30.0

WHEN = """
const done = arguments[arguments.length - 1];
const given = Array.from(arguments).slice(0, -1);
const look = () => { if ((%s)(...given)) { observer.disconnect(); done(true); } };
const observer = new MutationObserver(look);
observer.observe(document.body, {attributes: true});
look();
"""


@pytest.fixture
def site() -> Iterator[Site]:
    with serving("daphne") as running:
        yield running
    stop_layers()


class Page:
    """The site's page, and what its links have told it."""

    def __init__(self, chromium: WebDriver, site: Site) -> None:
        self.chromium = chromium
        chromium.set_script_timeout(DEADLINE)
        chromium.get(f"{site.url}/")
        self.when("() => document.body.dataset.ready === 'yes'")

    def run(self, script: str) -> Any:
        return self.chromium.execute_script(script)

    def open(self, kind: str, url: str, options: str = "") -> None:
        """A link that is called as its options say, ``link`` by default."""
        self.run(f"window.link = pgnotify.connect{kind}('{url}', {{...record('link'), {options}}})")

    def when(self, condition: str, *given: Any) -> None:
        try:
            self.chromium.execute_async_script(WHEN % condition, *given)
        except TimeoutException:
            raise AssertionError(f"not within {DEADLINE:g} s: {condition}\n{self.log}") from None

    @property
    def log(self) -> list[Any]:
        return [(entry["kind"], entry["value"]) for entry in self.run("return log")]

    def of(self, kind: str) -> list[Any]:
        return [value for one, value in self.log if one == kind]

    def count(self, kind: str, least: int) -> list[Any]:
        """What is noted of a kind once there are so many."""
        self.when(
            "(kind, least) => log.filter(entry => entry.kind === kind).length >= least", kind, least
        )
        return self.of(kind)

    def state(self, state: str) -> None:
        self.when("state => link.state === state", state)

    def clear(self) -> None:
        self.run("log.length = 0")


@pytest.fixture
def page(chromium: WebDriver, site: Site) -> Page:
    return Page(chromium, site)


def data(messages: list[Any]) -> list[Any]:
    return [message["data"] for message in messages]


def test_a_stream_of_a_durable_topic_outlives_its_server_and_misses_nothing(
    page: Page, site: Site
) -> None:
    page.open("Stream", "/ledger/")
    page.state("live")
    assert page.of("open") == [True]
    publish(LEDGER, "first")
    assert data(page.count("message", 1)) == ["first"]
    site.stop()
    page.state("waiting")
    publish_many(LEDGER, range(100))
    site.start()
    page.state("live")
    publish(LEDGER, "last")
    assert data(page.count("message", 102)) == ["first", *range(100), "last"]
    assert page.of("gap") == []
    assert page.of("open") == [True, False]
    page.run("link.close()")
    assert page.of("state")[-1] == "closed"


def test_a_live_stream_says_that_it_may_have_missed_something(page: Page, site: Site) -> None:
    page.open("Stream", "/jobs/")
    page.state("live")
    site.stop()
    page.state("waiting")
    publish("jobs", "missed")
    site.start()
    [gap] = page.count("gap", 1)
    assert gap["topics"] == ["jobs"]
    assert gap["since"] < gap["until"]
    publish("jobs", "heard")
    assert data(page.count("message", 1)) == ["heard"]


def test_a_websocket_hears_its_groups_again_after_its_server_was_restarted(
    page: Page, site: Site
) -> None:
    group_send = async_to_sync(get_channel_layer().group_send)
    page.open("Socket", "/ws/", "groups: ['room.1', 'other']")
    page.state("live")
    assert page.count("refused", 1) == [{"groups": ["other"], "reason": "not permitted"}]
    group_send("room.1", {"type": "order.changed", "event": {"pk": 1}})
    assert page.count("message", 1) == [{"type": "order.changed", "event": {"pk": 1}}]
    assert page.of("gap") == []
    page.run("link.subscribe('room.2'); link.unsubscribe('room.1')")
    site.stop()
    page.state("waiting")
    site.start()
    page.state("live")
    [gap] = page.count("gap", 1)
    assert gap["since"] < gap["until"]
    group_send("room.1", {"type": "x", "n": 1})
    group_send("room.2", {"type": "x", "n": 2})
    assert page.count("message", 2)[1:] == [{"type": "x", "n": 2}]
    assert len(page.of("refused")) == 1, "what was refused is not asked for again"


def test_a_page_knows_from_when_on_it_misses_nothing_of_a_group(page: Page, site: Site) -> None:
    group_send = async_to_sync(get_channel_layer().group_send)
    page.open("Socket", "/ws/", "groups: ['room.1']")
    page.state("live")
    assert page.count("subscribed", 1) == [["room.1"]]
    page.run("link.subscribe('room.2'); link.subscribe('other')")
    assert page.count("subscribed", 2)[1:] == [["room.2"]]
    group_send("room.2", {"type": "x", "n": 2})
    assert page.count("message", 1) == [{"type": "x", "n": 2}]
    assert page.count("refused", 1) == [{"groups": ["other"], "reason": "not permitted"}]
    page.run("link.subscribe(7)")
    assert "error" in page.count("message", 2)[1], "not for a group of those that it has"
    assert page.run("return link.state") == "live"
    page.run("link.unsubscribe(7)")
    site.stop()
    page.state("waiting")
    site.start()
    assert sorted(page.count("subscribed", 3)[2]) == ["room.1", "room.2"]


def test_a_websocket_that_asks_for_more_groups_than_it_may_is_refused(page: Page) -> None:
    """And does not wait for ever for what will not come."""
    page.open("Socket", "/ws/", "groups: Array.from({length: 101}, (_, n) => `room.${n}`)")
    page.state("refused")
    [refused] = page.of("refused")
    assert len(refused["groups"]) == 101
    assert "at most 100" in refused["reason"]
    assert page.of("state") == ["connecting", "refused"]
    assert page.of("message") == page.of("open") == []


def test_a_gap_of_the_layer_reaches_the_page(page: Page) -> None:
    page.open("Socket", "/ws/", "groups: ['room.1']")
    page.state("live")
    gap = {"type": "pgnotify.gap", "since": None, "until": "now", "cause": "x"}
    async_to_sync(get_channel_layer().group_send)("room.1", gap)
    assert page.count("gap", 1) == [gap]
    assert page.of("message") == []


@pytest.mark.parametrize(
    ("path", "status"), [("/rooms/?group=other", 403), ("/rooms/", 400), ("/mine/", 404)]
)
def test_a_stream_that_is_refused_is_not_asked_for_again(
    page: Page, path: str, status: int
) -> None:
    page.open("Stream", path)
    page.state("refused")
    [refused] = page.of("refused")
    assert refused["status"] == status  # a login page that the site does not have is a 404
    assert page.of("state") == ["connecting", "refused"]


def test_groups_are_asked_for_in_the_address(page: Page) -> None:
    page.open("Stream", "/rooms/", "groups: ['room.1', 'room.2']")
    page.state("live")
    publish_many("rooms", [{"room": 3}, {"room": 2}, {"room": 1}])
    assert data(page.count("message", 2)) == [{"room": 2}, {"room": 1}]


NEVER_BY_ITSELF = "firstPause: 600000, longestPause: 600000"


@pytest.mark.parametrize(
    "happens",
    [
        "dispatchEvent(new Event('online'))",
        "document.dispatchEvent(new Event('visibilitychange'))",
        "dispatchEvent(new Event('pageshow'))",
    ],
)
@pytest.mark.parametrize("kind", ["Stream", "Socket"])
def test_a_link_that_waits_comes_back_at_once_when_there_is_a_reason(
    page: Page, site: Site, kind: str, happens: str
) -> None:
    page.run("Math.random = () => 1")
    url = "/silent/" if kind == "Stream" else "/ws/"
    page.open(kind, url, NEVER_BY_ITSELF)
    page.state("live")
    # It is told by the server how long to wait; that is for others.
    page.run("link.options.firstPause = 600000")
    site.stop()
    page.state("waiting")
    site.start()
    page.run(happens)
    page.state("live")


def test_a_stream_that_is_silent_for_too_long_is_replaced(page: Page) -> None:
    page.open("Stream", "/silent/", "silence: 300")
    page.when("() => log.filter(e => e.kind === 'open').length >= 2")
    assert page.of("state")[:4] == ["connecting", "live", "waiting", "connecting"]


def test_a_websocket_whose_server_does_not_answer_is_replaced(page: Page, site: Site) -> None:
    page.open("Socket", "/ws/", "groups: ['room.1'], pingEvery: 200, pongWithin: 400")
    page.state("live")
    site.process.signal(signal.SIGSTOP)
    try:
        page.state("waiting")
    finally:
        site.process.signal(signal.SIGCONT)
    page.run("link.options.pongWithin = 20000")
    page.state("live")


def test_a_page_whose_callback_fails_goes_on(page: Page) -> None:
    page.open("Stream", "/jobs/", "onMessage: () => { throw new Error('of the page') }")
    page.state("live")
    publish("jobs", 1)
    page.run("link.options.onMessage = record('link').onMessage")
    publish("jobs", 2)
    page.when("() => log.some(e => e.kind === 'message' && e.value.data === 2)")


def test_text_may_arrive_in_any_pieces(page: Page) -> None:
    text = (
        ": comment\n\nid: 1\nevent: gap\ndata: {}\n\nretry: 50\r\n\r\nid: 2\rdata: a\rdata:b\r\r"
        "data\n\nid: 3\n\nid: never\ndata: cut off"
    )
    expected = [
        {"event": "gap", "data": "{}", "id": "1"},
        {"event": "message", "data": "a\nb", "id": "2"},
        {"event": "message", "data": "", "id": "2"},
    ]
    found = page.run(
        f"const text = {json.dumps(text)};"
        """
        const results = new Set();
        for (let one = 0; one <= text.length; one++) {
          for (let two = one; two <= text.length; two += 7) {
            const blocks = [], retries = [];
            const parser = new pgnotify.StreamParser(b => blocks.push(b), r => retries.push(r));
            for (const part of [text.slice(0, one), text.slice(one, two), text.slice(two)])
              parser.push(part);
            results.add(JSON.stringify({blocks, retries, id: parser.id}));
          }
        }
        return [...results].map(JSON.parse);
        """
    )
    assert found == [{"blocks": expected, "retries": [50], "id": "3"}]


def test_pauses_are_random_parts_of_a_bound_that_doubles_up_to_a_limit(page: Page) -> None:
    bounds = page.run(
        "Math.random = () => 1;"
        "return [0, 1, 2, 5, 6, 100, 5000].map(attempt => pgnotify.pauseBefore(attempt))"
    )
    assert bounds == [500, 1000, 2000, 15000, 15000, 15000, 15000]
    assert page.run("Math.random = () => 0; return pgnotify.pauseBefore(7)") == 0
