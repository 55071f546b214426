"""``make model-check``: concurrent writers, consumers that crash, and every event accounted for.

    python -m tests.faults.model.run --seconds 60 --events 100000 --seed 7

Exits 0 only if nothing was lost, nothing was handled twice that must not be, the order of each key
was kept, and everything was delivered while a long transaction was open elsewhere in the cluster.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from example_project.embedded import EmbeddedPostgres
from tests.faults.model.judge import Handled, Verdict, judge
from tests.processes import Process

SETTINGS = "tests.faults.model.settings"
WRITERS = 8
CATCH_UP = 90.0
"""Seconds that the consumers get to catch up once the writers have stopped."""
CURSOR_MOVED = """
    CREATE FUNCTION cursor_moved() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_notify('model.cursor', NEW.name); RETURN NULL; END $$;
    CREATE TRIGGER cursor_moved AFTER UPDATE ON pgnotify_consumer
        FOR EACH ROW EXECUTE FUNCTION cursor_moved();
    LISTEN "model.cursor";
"""


@dataclass
class Listener:
    """One life of a ``pglisten``."""

    name: str
    process: Process
    record: Path
    ended_by_us: bool = False


@dataclass
class Run:
    """What happens in one check."""

    folder: Path
    url: str
    server: EmbeddedPostgres
    chance: random.Random
    crash_rate: float
    lives: list[Listener] = field(default_factory=list)
    killed: dict[str, int] = field(default_factory=dict)
    server_crashes: list[int] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def start(self) -> Listener:
        name = f"listener {len(self.lives) + 1}"
        record = self.folder / f"{len(self.lives) + 1}.txt"
        process = Process(
            [sys.executable, "-m", "django", "pglisten", "--shutdown-timeout", "20"],
            env={
                "DJANGO_SETTINGS_MODULE": SETTINGS,
                "DATABASE_URL": self.url,
                "PGNOTIFY_MODEL_RECORD": str(record),
                "PGNOTIFY_MODEL_SEED": f"{self.chance.getrandbits(64)}",
                "PGNOTIFY_MODEL_CRASH_RATE": str(self.crash_rate),
            },
        )
        life = Listener(name, process, record)
        self.lives.append(life)
        return life

    @property
    def running(self) -> list[Listener]:
        return [
            life for life in self.lives if not life.ended_by_us and life.name not in self.killed
        ]

    def look(self) -> None:
        """Find those that crashed by themselves, and put another in their place."""
        for life in self.running:
            if life.process.returncode is not None:
                self.note_killed(life, "crashed in a receiver")
                self.start()

    def note_killed(self, life: Listener, how: str) -> None:
        if life.process.returncode not in (None, -signal.SIGKILL):
            raise SystemExit(f"{life.name} ended by itself\n{life.process.report()}")
        life.process.kill()
        self.killed[life.name] = time.monotonic_ns()
        self.done[how] += 1

    def disturb(self) -> None:
        """Kill a listener, or stop one in order, and start another."""
        life = self.chance.choice(self.running)
        if self.chance.random() < 0.7:
            life.process.signal(signal.SIGKILL)
            life.process.wait()
            self.note_killed(life, "listener killed")
        else:
            life.process.signal(signal.SIGTERM)
            status = life.process.wait()
            if status == -signal.SIGKILL:
                self.note_killed(life, "crashed in a receiver")
            elif status not in (0, -signal.SIGTERM):  # the latter: it had not begun yet
                raise SystemExit(f"{life.name} did not stop in order\n{life.process.report()}")
            life.ended_by_us = True
            self.done["listener stopped in order"] += 1
        self.start()

    def crash_server(self) -> None:
        self.server_crashes.append(time.monotonic_ns())
        self.server.restart("immediate")
        self.done["server stopped at once"] += 1
        self.resolve_prepared()

    def resolve_prepared(self) -> None:
        """Settle what a writer had prepared when the server went away; it holds its locks."""
        with psycopg.connect(self.url, autocommit=True) as admin:
            for (name,) in admin.execute("SELECT gid FROM pg_prepared_xacts").fetchall():
                verb = self.chance.choice(["COMMIT", "ROLLBACK"])
                admin.execute(f"{verb} PREPARED '{name}'")


def main() -> int:
    options = _parse()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    folder = Path(tempfile.mkdtemp(prefix="pgnotify-model-"))
    print(
        f"seed {seed}: {WRITERS} writers, {options.listeners} listeners, at least "
        f"{options.seconds:g} s and {options.events} events",
        flush=True,
    )
    settings = {"max_prepared_transactions": 20, "max_connections": 100}
    with EmbeddedPostgres(version=options.pg, options=settings) as server:
        code = _check(options, seed, folder, server)
    if code:
        print(f"records are kept in {folder}; again with --seed {seed}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.model.run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--seed", type=int, help="default: one that is made up and printed")
    parser.add_argument("--listeners", type=int, default=3)
    parser.add_argument("--server-crashes", type=int, default=2)
    parser.add_argument("--pg", type=int, choices=(16, 18), default=18, help="server version")
    return parser.parse_args()


def _check(options: argparse.Namespace, seed: int, folder: Path, server: EmbeddedPostgres) -> int:
    begun = time.monotonic()
    url = server.create_database("model")
    os.environ |= {"DATABASE_URL": url, "DJANGO_SETTINGS_MODULE": SETTINGS}
    import django
    from django.core.management import call_command
    from django.db import connection

    django.setup()
    from tests.faults.model.writers import KEYS, TABLES, Writer

    call_command("migrate", verbosity=0)
    with connection.cursor() as cursor:
        cursor.execute(TABLES)
        cursor.executemany("INSERT INTO ledger (key) VALUES (%s)", [(key,) for key in KEYS])
    connection.close()
    chance = random.Random(f"model {seed}")
    run = Run(folder, url, server, chance, crash_rate=0.00001)
    writers = [Writer(f"{seed} {number}", url, prepares=True) for number in range(WRITERS)]
    long = _long_transaction(server)
    try:
        for _ in range(options.listeners):
            run.start()
        for life in run.lives:
            life.process.wait_for_line("^pglisten: ready")
        for writer in writers:
            writer.start()
        long = _play(run, writers, options, long)
        for writer in writers:
            writer.stop()
        for writer in writers:
            writer.join(60)
            if writer.error is not None:
                raise writer.error
        run.resolve_prepared()
        ledger = _ledger(url)
        total = sum(ledger.values())
        caught_up = _await_all(run, ledger)
        held = long.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        open_for = _age_of(long)
    finally:
        long.close()
        for life in run.lives:
            life.process.kill()
    done = Counter[str]()
    for writer in writers:
        done.update({kind.strip("_"): count for kind, count in writer.kinds.items()})
    print(f"transactions: {_listed(done)}; disturbances: {_listed(run.done)}")
    print(f"{total} events committed; the long transaction had been open for {open_for:.1f} s")
    failed = _print_verdicts(run, ledger)
    if not caught_up:
        print(f"FAILED: not everything was delivered within {CATCH_UP:g} s of the last commit")
    if not held:
        print("FAILED: the long transaction was not open any more")
    print(f"{time.monotonic() - begun:.0f} s")
    if failed or not caught_up or not held:
        print(f"FAILED (seed {seed})")
        return 1
    print("nothing lost, nothing twice that must not be, order of each key kept")
    return 0


def _play(
    run: Run, writers: object, options: argparse.Namespace, long: psycopg.Connection
) -> psycopg.Connection:
    begun = time.monotonic()
    crashes = [
        begun + options.seconds * (number + 1) / (options.server_crashes + 2)
        for number in range(options.server_crashes)
    ]
    next_disturbance = begun + 1.0
    while time.monotonic() - begun < options.seconds or _total(run.url) < options.events:
        time.sleep(0.05)
        run.look()
        if crashes and time.monotonic() > crashes[0]:
            crashes.pop(0)
            run.crash_server()
            long.close()
            long = _long_transaction(run.server)
        elif time.monotonic() > next_disturbance:
            run.disturb()
            next_disturbance = time.monotonic() + run.chance.uniform(0.3, 2.5)
    return long


def _long_transaction(server: EmbeddedPostgres) -> psycopg.Connection:
    """One with a transaction id, in another database of the cluster, that stays open."""
    long = psycopg.connect(server.url("postgres"))
    long.execute("SELECT pg_current_xact_id()")
    return long


def _age_of(long: psycopg.Connection) -> float:
    row = long.execute(
        "SELECT extract(epoch FROM clock_timestamp() - xact_start)::float8"
        " FROM pg_stat_activity WHERE pid = pg_backend_pid()"
    ).fetchone()
    assert row is not None
    return float(row[0])


def _ledger(url: str) -> dict[str, int]:
    with psycopg.connect(url) as admin:
        return dict(admin.execute("SELECT key, seq FROM ledger").fetchall())


def _total(url: str) -> int:
    try:
        return sum(_ledger(url).values())
    except psycopg.OperationalError:
        return 0


def _await_all(run: Run, ledger: dict[str, int]) -> bool:
    """Wait until every consumer has handled all; listeners that crash are replaced."""
    total, deadline = sum(ledger.values()), time.monotonic() + CATCH_UP
    with psycopg.connect(run.url, autocommit=True) as admin:
        admin.execute(CURSOR_MOVED)
        while time.monotonic() < deadline:
            calls = _calls(run)
            if all(len({call[2:] for call in seen}) >= total for seen in calls.values()):
                return True
            run.look()
            # At the latest when a listener may have crashed that nobody hears of.
            for _ in admin.notifies(timeout=1, stop_after=1):
                pass
    return False


def _calls(run: Run) -> dict[str, list[Handled]]:
    """What each consumer was given, in the order of the effects."""
    from tests.faults.model.receivers import EXACT, OTHERS

    calls: dict[str, list[Handled]] = {name: [] for name in (EXACT, *OTHERS)}
    for life in run.lives:
        if life.record.exists():
            for line in life.record.read_text().splitlines():
                at, name, key, seq = line.split()
                calls[name].append(Handled(int(at), life.name, key, int(seq)))
    for name in OTHERS:
        calls[name].sort()
    with psycopg.connect(run.url) as admin:
        rows = admin.execute("SELECT id, key, seq FROM exact ORDER BY id").fetchall()
    calls[EXACT] = [Handled(at, "", key, seq) for at, key, seq in rows]
    return calls


def _print_verdicts(run: Run, ledger: dict[str, int]) -> bool:
    failed = False
    for name, calls in _calls(run).items():
        verdict: Verdict = judge(
            name,
            ledger,
            calls,
            exact=name == "exact",
            killed=run.killed,
            server_crashes=run.server_crashes,
        )
        print(f"  {name}: {verdict.handled} handled, {verdict.twice} of them again after a crash")
        if verdict.violations:
            failed = True
            print(f"  {len(verdict.violations)} violation(s); the first of them:")
            for violation in verdict.violations[:10]:
                print(f"    {violation}")
    return failed


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {count}" for what, count in counts.most_common())


if __name__ == "__main__":
    sys.exit(main())
