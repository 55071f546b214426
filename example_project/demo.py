"""What `make demo` runs: PostgreSQL, two web processes and pglisten, under one supervisor.

    python -m example_project.demo                 until Ctrl-C
    python -m example_project.demo --simulate      with customers
    python -m example_project.demo --check         drive it once, report each hop, end

The server is DATABASE_URL's where that is set, and otherwise an embedded one.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from .demo_check import drive
from .embedded import EmbeddedPostgresError
from .supervisor import DemoError, running, say


async def serve(*, simulate: bool, version: int) -> None:
    """`make demo`: until somebody stops it, or a child ends."""
    async with running(check=False, simulate=simulate, version=version) as demo:
        web_1, web_2 = demo.webs.values()
        board = [
            "",
            f"  The order board     {web_1}/",
            f"  the same, web 2     {web_2}/",
            f"  back office         {web_1}/admin/     user admin, password admin",
            f"  database            {demo.database}",
            "",
            "  Change an order in one window and watch the other. From a second terminal:",
            f"    {Path(sys.executable)} manage.py simulate",
            f"    {demo.psql} {demo.database_url} -c \"NOTIFY jobs, 'roast 20 kg of Huila'\"",
            "  Ctrl-C stops everything.",
            "",
        ]
        print("\n".join(board), flush=True)
        ended = await demo.any_ended()
        raise DemoError(ended.obituary(), ended)


async def check(*, version: int) -> None:
    """`make demo-check`: drive it, one line a hop."""
    async with running(check=True, simulate=False, version=version) as demo:
        webs = ", ".join(f"{name} at {url}" for name, url in demo.webs.items())
        print(f"demo: {demo.database}\ndemo: pglisten is ready, {webs}", flush=True)
        driving = asyncio.create_task(drive(demo), name="drive")
        ending = asyncio.create_task(demo.any_ended(), name="ending")
        try:
            await asyncio.wait({driving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not driving.done():
                raise DemoError(ending.result().obituary(), ending.result())
            if problems := driving.result():
                raise DemoError("; ".join(problems), *demo.children)
        finally:
            driving.cancel()
            ending.cancel()
            await asyncio.gather(driving, ending, return_exceptions=True)


async def supervised(work: Coroutine[Any, Any, None]) -> int:
    """Run ``work`` until it is done, or a signal cancels it, and it has cleaned up after itself."""
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(work, name="demo")
    asked = False

    def ask_to_stop() -> None:
        nonlocal asked
        if not asked:
            asked = True
            task.cancel()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signum, ask_to_stop)
    try:
        await task
    except asyncio.CancelledError:
        if not asked:
            raise
        say("stopped")
    except (DemoError, EmbeddedPostgresError) as error:
        for witness in getattr(error, "witnesses", ()):
            witness.show_log()
        print(f"demo: failed: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m example_project.demo")
    parser.add_argument("--check", action="store_true", help="drive it once and report each hop")
    parser.add_argument("--simulate", action="store_true", help="keep changing orders")
    parser.add_argument("--pg", type=int, default=18, choices=(16, 18), help="embedded PostgreSQL")
    options = parser.parse_args(argv)
    if options.check:
        status = asyncio.run(supervised(check(version=options.pg)))
        if status == 0:
            print("demo: ok", flush=True)
        return status
    return asyncio.run(supervised(serve(simulate=options.simulate, version=options.pg)))


if __name__ == "__main__":
    sys.exit(main())
