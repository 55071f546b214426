"""A process that saves rows at a steady rate, while something else is measured.

python -m benchmarks.load MODEL RATE
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.ways import Way
from tests.processes import Process


@contextmanager
def load(alias: str, way: Way, rate: int) -> Iterator[None]:
    """``rate`` rows of the way's model for it a second, for as long as the block lasts."""
    with Process(
        [sys.executable, "-m", "benchmarks.load", way.load, str(rate)],
        env={"BENCHMARK_DATABASE": alias, **way.environ},
    ) as process:
        process.wait_for_line("^loading")
        yield


def main(label: str, rate: int) -> None:
    import django

    django.setup()
    from django.apps import apps

    model = apps.get_model(label)
    model(number=0).save()
    print("loading", flush=True)
    due = time.monotonic()
    while True:
        due += 1 / rate
        time.sleep(max(0.0, due - time.monotonic()))
        model(number=0).save()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
