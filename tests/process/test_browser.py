"""The order board in a real Chromium: it lives, it survives its server, and it is presentable.

``PGNOTIFY_SCREENSHOT=docs/board.png`` keeps the picture that the docs show.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import (
    text_to_be_present_in_element,
    url_to_be,
)
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.ui import WebDriverWait

from tests.process.shop import Shop, Web
from tests.processes import ROOT

pytestmark = pytest.mark.browser

DEADLINE = 45.0

WHEN = """
const done = arguments[arguments.length - 1];
const given = Array.from(arguments).slice(0, -1);
const holds = () => { try { return (%s)(...given); } catch { return false; } };
if (holds()) return done(true);
const observer = new MutationObserver(() => {
  if (holds()) { observer.disconnect(); done(true); }
});
observer.observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    """A headless Chromium, driven by Debian's chromedriver; skipped where either is missing."""
    selenium = pytest.importorskip("selenium.webdriver")
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    chromedriver = shutil.which("chromedriver")
    if binary is None or chromedriver is None:
        pytest.skip("no chromium with chromedriver here (Debian: chromium, chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless",
        "--no-sandbox",  # which root cannot have
        "--disable-dev-shm-usage",
        "--disable-gpu",
        # It is to talk to our server and to nobody else.
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Named, so that selenium does not go and look for a driver on the net.
    service = selenium.ChromeService(executable_path=chromedriver)
    driver = selenium.Chrome(options=options, service=service)
    try:
        driver.set_script_timeout(DEADLINE)
        driver.set_page_load_timeout(DEADLINE)
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False},
        )
        yield driver
    finally:
        driver.quit()


def console(chromium: WebDriver) -> list[dict[str, Any]]:
    """What the page has logged since the last call."""
    log: list[dict[str, Any]] = chromium.get_log("browser")  # type: ignore[no-untyped-call]
    return log


def console_errors(chromium: WebDriver) -> list[str]:
    """What the page complained of since the last call."""
    return [entry["message"] for entry in console(chromium) if entry["level"] == "SEVERE"]


def when(chromium: WebDriver, condition: str, *arguments: Any) -> None:
    """Return once a JavaScript function of the page is true; asked whenever the page changes."""
    try:
        chromium.execute_async_script(WHEN % condition, *arguments)
    except TimeoutException:
        state = chromium.find_element(By.TAG_NAME, "main").text
        raise AssertionError(
            f"not within {DEADLINE:g} s: {condition} {arguments}\n{state}\n"
            f"console: {console(chromium)}"
        ) from None


def connection_is(chromium: WebDriver, state: str) -> None:
    when(
        chromium,
        "state => { const c = document.getElementById('connection');"
        " return c.dataset.state === state && c.innerText.trim() === state }",
        state,
    )


IN_COLUMN = (
    "(pk, status) => document.getElementById(`order-${pk}`).closest('.column').dataset.status"
    " === status"
)


def card_is(chromium: WebDriver, pk: int, status: str) -> None:
    when(chromium, IN_COLUMN, pk, status)


def open_board(chromium: WebDriver, web: Web) -> None:
    """The live board, logged in as admin, marked so that a reload would be seen."""
    chromium.get(f"{web.url}/admin/login/?next=/")
    if chromium.find_elements(By.NAME, "username"):
        chromium.find_element(By.NAME, "username").send_keys("admin")
        chromium.find_element(By.NAME, "password").send_keys("admin")
        chromium.find_element(By.CSS_SELECTOR, "[type=submit]").click()
    else:  # logged in already, for all ports of the host
        chromium.get(f"{web.url}/")
    WebDriverWait(chromium, DEADLINE).until(url_to_be(f"{web.url}/"))
    connection_is(chromium, "live")
    console_errors(chromium)
    chromium.execute_script("window.sinceTheLoad = true")


def assert_not_reloaded(chromium: WebDriver) -> None:
    assert chromium.execute_script("return window.sinceTheLoad") is True


def figure(chromium: WebDriver, name: str) -> int:
    element = chromium.find_element(By.CSS_SELECTOR, f"[data-count={name}], [data-figure={name}]")
    return int(element.text)


STEPS = ["new", "paid", "packed", "shipped"]


def place(shop: Shop, *statuses: str) -> list[int]:
    """Orders that another process places, and takes on as far as they are told."""
    steps = [STEPS.index(status) for status in statuses]
    code = (
        f"for steps in {steps}:\n"
        "    order = orders.place()\n"
        "    for step in range(steps):\n"
        "        orders.advance(order.pk)\n"
        "    print(order.pk)"
    )
    return [int(pk) for pk in shop.elsewhere(code).split()]


def test_a_person_logs_in_and_the_board_is_live(chromium: WebDriver, shop: Shop) -> None:
    [web, _] = shop.webs
    open_board(chromium, web)
    assert "Larkfield" in chromium.title
    assert [column.text for column in chromium.find_elements(By.CSS_SELECTOR, ".column h2 .chip")]
    assert chromium.find_elements(By.CSS_SELECTOR, ".card")
    assert chromium.find_elements(By.CSS_SELECTOR, "#ticker li")
    assert chromium.find_element(By.CLASS_NAME, "served").text == web.name


def test_a_change_in_another_process_changes_the_page_without_a_reload(
    chromium: WebDriver, shop: Shop
) -> None:
    open_board(chromium, shop.webs[0])
    new = figure(chromium, "new")
    [pk] = place(shop, "new")
    card_is(chromium, pk, "new")
    when(chromium, "n => document.querySelector('[data-count=new]').textContent == n", new + 1)
    shop.elsewhere(f"orders.advance({pk})")
    card_is(chromium, pk, "paid")
    # A receiver's work in pglisten comes back to the page too, and so do figures from the cache.
    when(chromium, "pk => document.querySelector(`#order-${pk} .slip`) !== null", pk)
    when(chromium, "n => document.querySelector('[data-count=new]').textContent == n", new)
    when(chromium, "() => Number(document.getElementById('latency').textContent) >= 0")
    when(chromium, "() => /Payment taken/.test(document.getElementById('ticker').textContent)")
    # A removed row goes.
    shop.elsewhere(f"Order.objects.get(pk={pk}).delete()")
    when(chromium, "pk => document.getElementById(`order-${pk}`) === null", pk)
    assert_not_reloaded(chromium)
    assert console_errors(chromium) == []


def test_a_change_in_the_admin_changes_the_page_without_a_reload(
    chromium: WebDriver, shop: Shop
) -> None:
    [pk] = place(shop, "new")
    open_board(chromium, shop.webs[0])
    card_is(chromium, pk, "new")
    board = chromium.current_window_handle
    # A board that is looked at again asks for everything; so it has to tell before it is.
    chromium.execute_script(
        "localStorage.removeItem('moved');"
        f"const given = Array.from(arguments), holds = () => ({IN_COLUMN})(...given);"
        "new MutationObserver(() => { try { if (holds()) localStorage.setItem('moved', 'yes') }"
        " catch {} }).observe(document.body, {subtree: true, childList: true})",
        pk,
        "packed",
    )
    chromium.switch_to.new_window("tab")
    try:
        chromium.get(f"{shop.webs[0].url}/admin/shop/order/{pk}/change/")
        Select(chromium.find_element(By.NAME, "status")).select_by_value("packed")
        chromium.find_element(By.NAME, "_save").click()
        saved = text_to_be_present_in_element((By.CLASS_NAME, "success"), "changed successfully")
        WebDriverWait(chromium, DEADLINE).until(saved)
        try:
            chromium.execute_async_script(
                "const done = arguments[arguments.length - 1];"
                "const look = () => localStorage.getItem('moved') && done(true);"
                "addEventListener('storage', look); look();"
            )
        except TimeoutException:
            raise AssertionError("the board in the background was told nothing") from None
    finally:
        chromium.close()
        chromium.switch_to.window(board)
    card_is(chromium, pk, "packed")
    assert_not_reloaded(chromium)


def test_a_button_on_one_web_process_changes_the_page_of_the_other(
    chromium: WebDriver, shop: Shop
) -> None:
    [pk] = place(shop, "new")
    first, second = shop.webs
    open_board(chromium, second)
    card_is(chromium, pk, "new")
    chromium.find_element(By.CSS_SELECTOR, f"#order-{pk} [formaction$='/advance/']").click()
    card_is(chromium, pk, "paid")
    assert_not_reloaded(chromium)
    open_board(chromium, first)
    card_is(chromium, pk, "paid")
    assert console_errors(chromium) == []


def test_a_page_outlives_its_server_and_catches_up_with_what_it_missed(
    chromium: WebDriver, shop: Shop
) -> None:
    pk, gone = place(shop, "new", "new")
    web = shop.webs[0]
    open_board(chromium, web)
    card_is(chromium, pk, "new")
    try:
        assert web.terminate() == 0, web.process and web.process.report()
        connection_is(chromium, "reconnecting")
        shop.elsewhere(f"orders.advance({pk}); Order.objects.get(pk={gone}).delete()")
        card_is(chromium, pk, "new")  # nobody has told it
    finally:
        web.start()
    connection_is(chromium, "live")
    card_is(chromium, pk, "paid")
    when(chromium, "pk => document.getElementById(`order-${pk}`) === null", gone)
    # And it hears what comes.
    shop.elsewhere(f"orders.advance({pk})")
    card_is(chromium, pk, "packed")
    assert_not_reloaded(chromium)


def test_a_board_is_shown_anew_when_its_server_may_have_missed_messages(
    chromium: WebDriver, shop: Shop
) -> None:
    [pk] = place(shop, "new")
    open_board(chromium, shop.webs[0])
    card_is(chromium, pk, "new")
    # A change that publishes nothing stands for one whose message was lost.
    shop.elsewhere(f"Order.objects.filter(pk={pk}).update(status='packed')")
    with psycopg.connect(shop.database_url, autocommit=True) as connection:
        connection.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and application_name = 'pglisten'"
        )
    card_is(chromium, pk, "packed")
    assert_not_reloaded(chromium)


PARCELS = "pks => pks.every(pk => document.querySelectorAll(`#parcel-${pk}`).length === 1)"


def test_the_courier_desk_outlives_its_server_and_is_told_of_the_parcels_it_missed(
    chromium: WebDriver, shop: Shop
) -> None:
    [before] = place(shop, "shipped")
    waiting = place(shop, "packed", "packed", "packed")
    web = shop.webs[1]
    chromium.get(f"{web.url}/courier/")
    connection_is(chromium, "live")
    chromium.execute_script("window.sinceTheLoad = true")
    when(chromium, PARCELS, [before])
    shop.elsewhere(f"orders.advance({waiting[0]})")
    when(chromium, PARCELS, [waiting[0]])
    try:
        assert web.terminate() == 0, web.process and web.process.report()
        connection_is(chromium, "reconnecting")
        shop.elsewhere(f"orders.advance({waiting[1]})")
    finally:
        web.start()
    connection_is(chromium, "live")
    when(chromium, PARCELS, waiting[:2])
    shop.elsewhere(f"orders.advance({waiting[2]})")
    when(chromium, PARCELS, [before, *waiting])
    assert_not_reloaded(chromium)
    loads = "return performance.getEntriesByName(location.href, 'resource').length"
    assert chromium.execute_script(loads) == 1, "the stream told, the list was not loaded again"


COLOURS = """
const done = arguments[arguments.length - 1], image = new Image();
image.onload = () => {
  const canvas = Object.assign(document.createElement('canvas'), {
    width: image.width, height: image.height});
  const context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  const {data} = context.getImageData(0, 0, image.width, image.height);
  const counts = new Map();
  for (const pixel of new Uint32Array(data.buffer)) counts.set(pixel, (counts.get(pixel) ?? 0) + 1);
  const most = Math.max(...counts.values()) / (image.width * image.height);
  done({width: image.width, height: image.height, colours: counts.size, most});
};
image.src = 'data:image/png;base64,' + arguments[0];
"""

SETTLED = """
const done = arguments[arguments.length - 1];
const ends = document.getAnimations()
  .filter(animation => animation.effect.getTiming().iterations !== Infinity)
  .map(animation => animation.finished.catch(() => null));
Promise.all([...ends, document.fonts.ready])
  .then(() => requestAnimationFrame(() => requestAnimationFrame(() => done(true))));
"""


def test_the_board_is_presentable(chromium: WebDriver, shop: Shop, tmp_path: Path) -> None:
    asked = os.environ.get("PGNOTIFY_SCREENSHOT")
    picture = ROOT / asked if asked else tmp_path / "board.png"
    open_board(chromium, shop.webs[0])
    with psycopg.connect(shop.database_url, autocommit=True) as connection:
        connection.execute("notify jobs, 'roast 20 kg of Huila'")
    when(chromium, "() => /roast 20 kg/.test(document.getElementById('ticker').textContent)")
    placed = place(shop, "paid", "paid", "new")
    for pk, status in zip(placed, ("paid", "paid", "new"), strict=True):
        card_is(chromium, pk, status)
    for pk in placed[:2]:
        when(chromium, "pk => document.querySelector(`#order-${pk} .slip`) !== null", pk)
    chromium.execute_async_script(SETTLED)
    before = chromium.find_element(By.ID, "ticker").text
    packed = placed[0]
    chromium.find_element(By.CSS_SELECTOR, f"#order-{packed} [formaction$='/advance/']").click()
    card_is(chromium, packed, "packed")
    when(chromium, "text => document.getElementById('ticker').innerText !== text", before)
    when(chromium, "() => /^[0-9]+$/.test(document.getElementById('latency').textContent)")
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert chromium.execute_script(overflow) <= 0, "it fits the width of the window"
    chromium.execute_script("scrollTo(0, 0)")
    chromium.execute_async_script(SETTLED)
    assert chromium.get_screenshot_as_file(str(picture))
    seen = chromium.execute_async_script(COLOURS, chromium.get_screenshot_as_base64())
    assert (seen["width"], seen["height"]) == (1280, 800)
    assert seen["colours"] > 200, "it is not blank"
    assert seen["most"] < 0.9
    assert picture.stat().st_size > 20_000
    assert console_errors(chromium) == []
