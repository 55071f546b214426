"""Clients that do the same thing over and over: processes, as the workers of a web server are.

Threads would share one interpreter lock and measure that. They are forked from one process that
has set Django up, and stay for all rounds.

    python -m benchmarks.clients COUNT WORK ARGUMENT

reads ``SECONDS CALLS`` from its standard input, has all clients begin at once and go on until
either is reached, and prints how many calls they have made and when, in ns, they began.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

CONTEXT = multiprocessing.get_context("fork")
ACCOUNTS = 1000
HUNDRED = 100


class Done(NamedTuple):
    calls: int
    begun: int
    """CLOCK_MONOTONIC, in ns."""


class Clients:
    """The driver's side of such a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, seconds: float, calls: int = sys.maxsize) -> Done:
        """Have each client make ``calls`` calls, or go on for ``seconds``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seconds} {calls}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a client has failed")
        return Done(*map(int, line.split()))


@contextmanager
def clients(
    alias: str, count: int, work: str, argument: str, environ: Mapping[str, str]
) -> Iterator[Clients]:
    """``count`` clients of the database ``alias``; ``work`` is one of WORK."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.clients", str(count), work, argument],
        env={**os.environ, "BENCHMARK_DATABASE": alias, **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Clients(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


# -- what a client does ----------------------------------------------------------------------------


def business(label: str) -> Callable[[int], object]:
    """A small order: look the account up, charge it, insert the order, and mark it as paid.

    Two events where the model publishes: created and updated.
    """
    from django.apps import apps
    from django.db import transaction

    from benchmarks.shop.models import Account

    model: Any = apps.get_model(label)

    def transact(number: int) -> None:
        with transaction.atomic():
            account = Account._default_manager.get(pk=random.randint(1, ACCOUNTS))
            account.balance -= 1
            account.save(update_fields=["balance"])
            order = model(number=number, total=1)
            order.save()
            order.status = "paid"
            order.save(update_fields=["status"])

    return transact


def save(label: str) -> Callable[[int], object]:
    """A row by itself, in autocommit."""
    from django.apps import apps

    model: Any = apps.get_model(label)
    return lambda number: model(number=number).save()


def publish_one(count: str) -> Callable[[int], object]:
    """An event on one of ``count`` topics after the other, each by itself."""
    from benchmarks.shop.naive import topics
    from django_pgnotify import publish

    names = topics(int(count))
    return lambda number: publish(names[number % len(names)], {"number": number, "status": "new"})


def publish_hundred(count: str) -> Callable[[int], object]:
    """The same, a hundred in a transaction."""
    from django.db import transaction

    publish = publish_one(count)

    def transact(number: int) -> None:
        with transaction.atomic():
            for each in range(HUNDRED * number, HUNDRED * (number + 1)):
                publish(each)

    return transact


def notify_one(count: str) -> Callable[[int], object]:
    """As ``publish_one``, by hand."""
    from benchmarks.shop.naive import notify, payload, topics

    names = topics(int(count))

    def publish(number: int) -> None:
        name = names[number % len(names)]
        notify("default", name, payload(name, None, {"number": number, "status": "new"}))

    return publish


WORK: dict[str, Callable[[str], Callable[[int], object]]] = {
    "business": business,
    "save": save,
    "publish-one": publish_one,
    "publish-hundred": publish_hundred,
    "notify-one": notify_one,
}


# -- the process -----------------------------------------------------------------------------------


def main(count: int, work: str, argument: str) -> None:
    import django

    django.setup()
    call = WORK[work](argument)
    barrier = CONTEXT.Barrier(count + 1)
    limits = CONTEXT.Array("d", 2, lock=False)
    made = CONTEXT.Array("q", count, lock=False)

    def client(place: int) -> None:
        try:
            while True:
                barrier.wait()
                ends, calls = limits
                number = 0
                while number < calls and time.monotonic() < ends:
                    call(number)
                    number += 1
                made[place] = number
                barrier.wait()
        except BaseException:
            barrier.abort()  # or everybody else would wait for ever
            raise

    processes = [
        CONTEXT.Process(target=client, args=(place,), daemon=True) for place in range(count)
    ]
    for process in processes:
        process.start()
    for line in sys.stdin:
        seconds, calls = line.split()
        begun = time.monotonic_ns()
        limits[:] = [begun / 1e9 + float(seconds), float(calls)]
        barrier.wait()
        barrier.wait()
        print(sum(made), begun, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
