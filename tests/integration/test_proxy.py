"""The proxy breaks real connections to the real server, in each way it claims to."""

from __future__ import annotations

import socket
from collections.abc import Callable

import psycopg
import pytest

from example_project.embedded import EmbeddedPostgres
from tests.plugin import Server
from tests.proxy import TCPProxy


@pytest.fixture
def url(proxy: TCPProxy, pg_server: Server) -> str:
    conninfo = psycopg.conninfo.make_conninfo(
        pg_server.url, dbname="postgres", host=proxy.host, port=proxy.port
    )
    # A connection that hangs must not hang the test: each wait here has an end.
    return psycopg.conninfo.make_conninfo(conninfo, connect_timeout=5)


def one(connection: psycopg.Connection[tuple[object, ...]]) -> object:
    row = connection.execute("select 1").fetchone()
    assert row is not None
    return row[0]


def test_it_forwards(proxy: TCPProxy, url: str) -> None:
    with psycopg.connect(url) as connection:
        assert one(connection) == 1
        assert connection.info.port == proxy.port
        assert (proxy.connections, proxy.accepted) == (1, 1)
    proxy.wait_for_connections(0)


def test_it_forwards_more_than_its_buffers_hold(url: str) -> None:
    with psycopg.connect(url) as connection:
        row = connection.execute("select repeat('x', 20000000), length(%s)", ["y" * 5_000_000])
        text, length = row.fetchone() or ("", 0)
    assert (len(text), length) == (20_000_000, 5_000_000)


@pytest.mark.parametrize("reset", [False, True])
def test_disconnect_drops_the_connections_of_now_and_serves_new_ones(
    proxy: TCPProxy, url: str, reset: bool
) -> None:
    with psycopg.connect(url, autocommit=True) as first:
        assert proxy.disconnect(reset=reset) == 1
        with pytest.raises(psycopg.OperationalError):
            one(first)
    with psycopg.connect(url) as second:
        assert one(second) == 1
    assert proxy.accepted == 2


def test_close_refuses_new_connections_until_open_on_the_same_port(
    proxy: TCPProxy, url: str
) -> None:
    port = proxy.port
    with psycopg.connect(url, autocommit=True) as connection:
        proxy.close()
        with pytest.raises(psycopg.OperationalError):
            one(connection)
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(url)
    proxy.open()
    assert proxy.port == port
    with psycopg.connect(url) as connection:
        assert one(connection) == 1


def test_close_and_open_may_be_called_twice(proxy: TCPProxy, url: str) -> None:
    proxy.close()
    proxy.close()
    proxy.open()
    proxy.open()
    with psycopg.connect(url) as connection:
        assert one(connection) == 1


def test_a_blackhole_is_silent_and_resume_delivers_what_it_held(proxy: TCPProxy, url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        proxy.blackhole()
        connection.pgconn.send_query(b"select 42")
        connection.pgconn.flush()
        with socket.socket(fileno=socket.dup(connection.fileno())) as wire:
            wire.settimeout(0.3)  # silence can only be waited for
            with pytest.raises(TimeoutError):
                wire.recv(1, socket.MSG_PEEK)
            assert proxy.connections == 1
            proxy.resume()
            wire.settimeout(5)
            assert wire.recv(1, socket.MSG_PEEK)
        result = connection.pgconn.get_result()
        assert result is not None
        assert result.get_value(0, 0) == b"42"
        while connection.pgconn.get_result() is not None:
            pass
        assert one(connection) == 1


def test_what_is_swallowed_is_lost_and_its_connection_is_cut_at_the_end(
    proxy: TCPProxy, url: str
) -> None:
    ssl_request = bytes.fromhex("0000000804d2162f")  # answered by one byte
    with socket.create_connection((proxy.host, proxy.port), timeout=10) as raw:
        proxy.wait_for_connections(1)
        proxy.swallow()
        raw.sendall(ssl_request)
        raw.settimeout(0.3)
        with pytest.raises(TimeoutError):
            raw.recv(1)
        assert proxy.connections == 1
        proxy.end_swallowing()
        raw.settimeout(10)
        assert raw.recv(1) == b""
    with psycopg.connect(url) as second:
        assert one(second) == 1


def test_a_blackhole_accepts_new_connections_and_never_answers(proxy: TCPProxy, url: str) -> None:
    proxy.blackhole()
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        psycopg.connect(url, connect_timeout=2)
    proxy.wait_for_accepted(1)


def test_a_blackhole_hides_the_end_of_the_other_side(proxy: TCPProxy, url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        pid = connection.info.backend_pid
        proxy.blackhole()
        direct = psycopg.conninfo.make_conninfo(url, host=proxy.target[0], port=proxy.target[1])
        with psycopg.connect(direct, autocommit=True) as other:
            # With a timeout the function waits for the backend's end.
            ended = other.execute("select pg_terminate_backend(%s, 5000)", [pid]).fetchone()
        assert ended == (True,)
        with socket.socket(fileno=socket.dup(connection.fileno())) as wire:
            wire.settimeout(0.3)
            with pytest.raises(TimeoutError):
                wire.recv(1, socket.MSG_PEEK)
        proxy.resume()
        with pytest.raises(psycopg.OperationalError):
            one(connection)


def test_a_wait_that_fails_says_what_there_is(proxy: TCPProxy) -> None:
    with pytest.raises(TimeoutError, match=r"no 3 open connections.*0 open, 0 accepted"):
        proxy.wait_for_connections(3, timeout=0.01)


def test_a_server_of_ones_own_is_stopped_killed_and_started_on_its_port(
    start_server: Callable[..., EmbeddedPostgres],
) -> None:
    server = start_server()
    port = server.port
    for end in (server.stop, server.kill):
        end()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(server.url())
        server.start()
        assert server.port == port
        with psycopg.connect(server.url()) as connection:
            assert one(connection) == 1
