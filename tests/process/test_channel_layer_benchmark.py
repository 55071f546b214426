"""The processes in which the benchmarks drive channel layers."""

from __future__ import annotations

import pytest

from benchmarks.channel_layers import SENDERS, driven
from tests.processes import database_environ


@pytest.mark.parametrize("consumers", [1, 3])
def test_every_message_is_counted_in_one_process(consumers: int) -> None:
    with driven("memory", consumers, separate=False, environ={}) as layer:
        assert layer.rate(60, "one") > 0
        assert layer.rate(SENDERS * 5, "many") > 0
        p50, p99 = layer.latencies(20)
        assert 0 < p50 <= p99


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("separate", [False, True], ids=["one process", "two processes"])
def test_our_layer_is_driven_with_its_sender_here_and_elsewhere(separate: bool) -> None:
    with driven("ours", 3, separate=separate, environ=database_environ()) as layer:
        assert layer.rate(60, "one") > 0
        assert layer.rate(SENDERS * 5, "many") > 0
        p50, p99 = layer.latencies(20)
        assert 0 < p50 <= p99
