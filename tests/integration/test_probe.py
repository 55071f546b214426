"""``--check`` and a listener where the way is not direct: a pooler, a standby, another database."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.db import connections
from pytest_django import Settings

from django_pgnotify import publish, receiver
from django_pgnotify.listening.listener import Listener
from django_pgnotify.listening.probe import probe
from django_pgnotify.registry import registry
from django_pgnotify.testing import running_listener
from tests.integration.recording import Recorder, Sink, alias_at, query, running
from tests.processes import Process, run
from tests.proxy import TCPProxy
from tests.settings import database_url
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

PGBOUNCER = shutil.which(
    "pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
)


def free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port: int = probe_socket.getsockname()[1]
        return port


def start_pooler(mode: str, folder: Path) -> tuple[Process, int]:
    """A PgBouncer in front of the test database; it is asked until it answers."""
    assert PGBOUNCER is not None
    entry = connections["default"].settings_dict
    port = free_port()
    password = f" password={entry['PASSWORD']}" if entry["PASSWORD"] else ""
    config = folder / "pgbouncer.ini"
    target = f"host={entry['HOST']} port={entry['PORT'] or 5432} user={entry['USER']}{password}"
    config.write_text(
        f"""[databases]
{entry["NAME"]} = {target}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
ignore_startup_parameters = extra_float_digits,options
max_client_conn = 50
default_pool_size = 20
"""
    )
    command = [PGBOUNCER, str(config)]
    if os.geteuid() == 0:  # which PgBouncer refuses to be
        pwd.getpwnam("nobody")
        command[1:1] = ["-u", "nobody"]
        for parent in (folder, *folder.parents):
            if parent.owner() == "root" and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
        config.chmod(0o644)
    process = Process(command)
    deadline = time.monotonic() + 10
    while True:
        try:
            psycopg.connect(
                host="127.0.0.1", port=port, dbname=entry["NAME"], user=entry["USER"],
                connect_timeout=2,
            ).close()  # fmt: skip
        except psycopg.OperationalError:
            if time.monotonic() > deadline or process.returncode is not None:
                report = process.report()
                process.kill()
                pytest.fail(f"PgBouncer did not start:\n{report}")
        else:
            return process, port


@pytest.fixture
def pooled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """An alias that goes through PgBouncer, in transaction mode unless told otherwise."""
    if PGBOUNCER is None:
        pytest.skip("pgbouncer is not installed (apt-get install pgbouncer)")
    if str(connections["default"].settings_dict["HOST"]).startswith("/"):
        pytest.skip("the server is reached through a Unix socket")
    mode = getattr(request, "param", "transaction")
    process, port = start_pooler(mode, tmp_path_factory.mktemp("pgbouncer"))
    options = {"DISABLE_SERVER_SIDE_CURSORS": True}
    with process, alias_at("pooled", HOST="127.0.0.1", PORT=str(port), **options) as alias:
        yield alias


async def test_a_direct_way_is_proven() -> None:
    assert await probe("default") is None


async def test_nobody_there_is_named(proxy: TCPProxy) -> None:
    proxy_port = str(proxy.port)
    with alias_at("closed", HOST=proxy.host, PORT=proxy_port) as alias:
        await asyncio.to_thread(proxy.close)
        problem = await probe(alias)
    assert problem is not None
    assert "cannot connect to database 'closed'" in problem
    assert "refused" in problem


async def test_silence_is_named(proxy: TCPProxy, settings: Settings) -> None:
    settings.PGNOTIFY_CONNECT_TIMEOUT = 0.3
    with alias_at("silent", HOST=proxy.host, PORT=str(proxy.port)) as alias:
        await asyncio.to_thread(proxy.blackhole)
        problem = await probe(alias)
    assert problem is not None
    assert "no answer within 0.3 s" in problem


async def test_another_database_is_named(settings: Settings) -> None:
    settings.PGNOTIFY_HEARTBEAT_TIMEOUT = 0.3
    problem = await probe("other")
    assert problem is not None
    assert "different databases" in problem
    assert "'default'" in problem
    assert "'other'" in problem


async def test_a_transaction_pooler_is_named(pooled: str, settings: Settings) -> None:
    settings.PGNOTIFY_HEARTBEAT_TIMEOUT = 0.5
    problem = await probe(pooled)
    assert problem is not None
    assert "pooler in transaction mode" in problem
    assert "PGNOTIFY_LISTEN_DATABASE" in problem


@pytest.mark.parametrize("pooled", ["session"], indirect=True)
async def test_a_session_pooler_is_no_obstacle(pooled: str) -> None:
    assert await probe(pooled) is None


async def test_a_listener_behind_a_transaction_pooler_is_never_established(
    pooled: str, settings: Settings
) -> None:
    settings.PGNOTIFY_HEARTBEAT_TIMEOUT = 0.3
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.1
    sink = Sink()
    async with running(Listener(pooled, ["jobs"], sink)):
        cause, _ = await sink.until("lost", 3)
    assert "pooler" in cause
    assert "established" not in sink.kinds


@pytest.mark.parametrize("pooled", ["session"], indirect=True)
async def test_a_listener_behind_a_session_pooler_hears(pooled: str, settings: Settings) -> None:
    settings.PGNOTIFY_HEARTBEAT_INTERVAL = 0.05
    sink = Sink()
    listener = Listener(pooled, ["jobs"], sink)
    async with running(listener):
        await sink.until("established")
        await asyncio.to_thread(_publish_and_close, "jobs", "one")
        await sink.until("heard")
    assert "lost" not in sink.kinds


def _publish_and_close(topic: str, data: Any) -> None:
    publish(topic, data)
    connections.close_all()


def test_check_behind_a_transaction_pooler_exits_1_and_names_it(pooled: str) -> None:
    url = database_url(connections[pooled].settings_dict)
    process = run("pglisten", "--check", env={"DATABASE_URL": url})
    assert process.returncode == 1, process.report()
    assert "pooler in transaction mode" in process.stderr
    assert "Traceback" not in process.stderr


@contextmanager
def default_through(pooled: str) -> Iterator[str]:
    """Django's own connections go through the pooler; the alias it yields does not."""
    entry = connections["default"].settings_dict
    with alias_at("direct") as direct, pytest.MonkeyPatch.context() as patch:
        for name in ("HOST", "PORT", "DISABLE_SERVER_SIDE_CURSORS"):
            patch.setitem(entry, name, connections[pooled].settings_dict[name])
        connections["default"].close()
        try:
            yield direct
        finally:
            connections["default"].close()


def test_publishing_through_a_transaction_pooler_reaches_a_direct_listener(
    pooled: str, settings: Settings
) -> None:
    heard = Recorder()
    with default_through(pooled) as direct, registry.isolated():
        settings.PGNOTIFY_LISTEN_DATABASE = direct
        receiver(["jobs", Order])(heard)
        # The tests of this file mean nothing if the alias goes straight to the server.
        [(backend,)] = query("SELECT pg_backend_pid()")
        assert connections["default"].connection.info.backend_pid != backend
        with running_listener() as listener:
            publish("jobs", 1)
            publish("jobs", "y" * 20_000)
            publish("jobs", 3, delivery="atomic")
            order = Order.objects.create()
            listener.wait_for(4)
    assert heard.data == [1, "y" * 20_000, 3, {}]
    assert heard.events[-1].pk == order.pk
