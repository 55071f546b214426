"""What the tests of whole deployments share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.plugin import Server
    from tests.process.shop import Shop


@pytest.fixture(scope="package")
def shop(pg_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """The example project: its database, two web processes and ``pglisten``."""
    pytest.importorskip("daphne")
    from tests.process.shop import Shop

    with Shop(pg_server.url, tmp_path_factory.mktemp("shop")) as running:
        yield running
