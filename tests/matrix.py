"""`make test-all`: the tests on every supported Python, Django and PostgreSQL.

    python -m tests.matrix [--python 3.12 ...] [--django 6.0 ...] [--pg 16 ...]
                           [--list] [--budget MINUTES] [--tested PYTHON DJANGO PG]
                           [-- PYTEST_ARGUMENT...]

Each pair of Python and Django has a virtual environment under ``.venvs/``, kept
until pyproject.toml changes; the next one is installed while the tests of this
one run. So that it ends within a coffee break on two cores, a lane runs where
it can differ: the real processes on the first and the last pair, the unit tests
on the newest PostgreSQL, and an older PostgreSQL below the first and the last
pair, since what it does differently is the same for each Django. What is left
out is said at the end, with the reason. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venvs"

PYTHONS = ("3.11", "3.12", "3.13")
DJANGOS = ("5.2", "6.0", "6.1")
#: The first one runs the unit tests too.
POSTGRESES = ("18", "16")
#: The oldest Python that a Django release supports, where it is not our own.
NEEDS = {"6.0": (3, 12), "6.1": (3, 12)}
#: Seconds after which a cell counts as hanging.
CELL_TIMEOUT = 1800


class Environment(NamedTuple):
    python: str
    django: str

    def __str__(self) -> str:
        return f"Python {self.python} · Django {self.django}"

    @property
    def path(self) -> Path:
        return VENVS / f"py{self.python}-dj{self.django}"

    @property
    def executable(self) -> Path:
        return self.path / "bin" / "python"


@dataclass(frozen=True)
class Outcome:
    cell: str
    passed: bool
    text: str
    seconds: float = 0.0


def main(argv: list[str] | None = None) -> int:
    arguments, pytest_arguments = parse(sys.argv[1:] if argv is None else argv)
    interpreters, skipped = {}, []
    for version in arguments.python:
        if found := find_python(version):
            interpreters[version] = found
        else:
            skipped.append(f"Python {version}: no such interpreter here")

    environments = []
    for python in interpreters:
        for django in arguments.django:
            needed = NEEDS.get(django, (0,))
            if numbers(python) < needed:
                skipped.append(
                    f"Python {python} · Django {django}: Django {django} needs Python "
                    f"{'.'.join(map(str, needed))} or newer"
                )
            else:
                environments.append(Environment(python, django))

    # The first pair and the last say most; where the time runs out the ones between are left out.
    corners = {*environments[:1], *environments[-1:]}
    environments.sort(key=lambda environment: environment not in corners)

    if arguments.list:
        for environment in environments:
            print(environment, interpreters[environment.python])
        report_skipped(skipped)
        return 0

    started = time.monotonic()
    outcomes: list[Outcome] = []
    deadline = started + arguments.budget * 60 if arguments.budget else float("inf")
    for environment, ready in installed_ahead(environments, interpreters):
        try:
            print(f"\n== {environment}: {ready.result()}", flush=True)
        except InstallationError as exc:
            print(f"\n== {environment}: not installed\n{exc}", flush=True)
            outcomes.append(Outcome(str(environment), False, "not installed"))
            continue
        for pg in arguments.pg:
            cell = f"{environment} · PostgreSQL {pg}"
            corner, newest = environment in corners, pg == arguments.pg[0]
            if reason := not_run(
                corner=corner,
                newest=newest,
                tested=[environment.python, environment.django, pg] == arguments.tested,
                late=time.monotonic() > deadline,
            ):
                skipped.append(f"{cell}: {reason}")
                continue
            lanes = left_out(corner=corner, newest=newest)
            skipped += [f"{cell}: {lane} ({why})" for lane, why in lanes.items()]
            print(f"-- {cell}", flush=True)
            markers = " and ".join(f"not {lane}" for lane in lanes)
            selection = ["-m", markers] if lanes else []
            outcomes.append(run_cell(environment, pg, cell, [*selection, *pytest_arguments]))
    return report(outcomes, skipped, time.monotonic() - started)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    ours, pytest_arguments = argv, []
    if "--" in argv:
        cut = argv.index("--")
        ours, pytest_arguments = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(prog="python -m tests.matrix")
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=PYTHONS)
    parser.add_argument("--django", nargs="+", choices=DJANGOS, default=DJANGOS)
    parser.add_argument("--pg", nargs="+", choices=POSTGRESES, default=POSTGRESES)
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    parser.add_argument(
        "--budget", type=float, metavar="MINUTES", help="start no further cell after that long"
    )
    parser.add_argument(
        "--tested",
        nargs=3,
        metavar=("PYTHON", "DJANGO", "PG"),
        help="a cell that has been run already, by `make test`",
    )
    return parser.parse_args(ours), pytest_arguments


def not_run(*, corner: bool, newest: bool, tested: bool, late: bool) -> str | None:
    """Why a cell is passed over, or None where it is to run."""
    if tested:
        return "tested already"
    if not (corner or newest):
        return "an older PostgreSQL is for the first and the last pair"
    return "the budget is spent" if late else None


def left_out(*, corner: bool, newest: bool) -> dict[str, str]:
    """The lanes that a cell does without, each with the reason."""
    lanes = {}
    if not newest:
        lanes["unit"] = "no server in it"
    if not (corner and newest):
        lanes["process"] = "slow: on the first and last pair, newest PostgreSQL"
    return lanes


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


# ---- interpreters


def find_python(version: str) -> str | None:
    """An interpreter of that version that runs: on PATH, of pyenv's, or of uv's."""
    for candidate in candidates(version):
        if answer(candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])") == (
            version
        ):
            return candidate
    return None


def candidates(version: str) -> Iterator[str]:
    if numbers(version) == sys.version_info[:2]:
        yield sys.executable
    # A shim of pyenv's is on PATH for each version, and fails for those not selected.
    if found := shutil.which(f"python{version}"):
        yield found
    if root := answer("pyenv", "root"):
        matches = Path(root, "versions").glob(f"{version}.*/bin/python{version}")
        yield from map(str, sorted(matches, key=release, reverse=True))
    if found := answer("uv", "python", "find", "--no-python-downloads", version):
        yield found


def release(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", path.parts[-3]))


def answer(*command: str) -> str | None:
    """What a command prints, or None when it is missing or fails."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


# ---- environments


class InstallationError(Exception):
    """An environment could not be made; the message ends with pip's last lines."""


def installed_ahead(
    environments: Iterable[Environment], interpreters: dict[str, str]
) -> Iterator[tuple[Environment, Future[str]]]:
    """Each environment with its installation, of which one runs ahead of the tests."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="install") as pool:
        pending: list[tuple[Environment, Future[str]]] = []
        for environment in environments:
            ready = pool.submit(install, environment, interpreters[environment.python])
            pending.append((environment, ready))
            if len(pending) > 1:
                yield pending.pop(0)
        yield from pending


def install(environment: Environment, interpreter: str) -> str:
    """Make or reuse the environment; what it holds, in one line."""
    stamp = environment.path / "stamp"
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
    digest.update(interpreter.encode())
    if not (stamp.exists() and stamp.read_text() == digest.hexdigest()):
        shutil.rmtree(environment.path, ignore_errors=True)
        call(interpreter, "-m", "venv", str(environment.path))
        call(
            str(environment.executable), "-m", "pip", "install", "--quiet",
            "--disable-pip-version-check", "-e", ".[test]", f"django~={environment.django}.0",
        )  # fmt: skip
        stamp.write_text(digest.hexdigest())
    code = "import django, platform; print(platform.python_version(), django.get_version())"
    return answer(str(environment.executable), "-c", code) or "does not run"


def call(*command: str) -> None:
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()[-15:]
        raise InstallationError("\n".join([f"$ {' '.join(command)}", *lines]))


# ---- tests


def run_cell(environment: Environment, pg: str, cell: str, arguments: list[str]) -> Outcome:
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in {"DATABASE_URL", "DJANGO_SETTINGS_MODULE", "PYTHONPATH", "VIRTUAL_ENV"}
    }
    command = [
        str(environment.executable), "-m", "pytest", f"--pg=embedded:{pg}",
        "-q", "-p", "no:cacheprovider", *arguments,
    ]  # fmt: skip
    started = time.monotonic()
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=CELL_TIMEOUT,
        )
    except subprocess.TimeoutExpired as exc:
        # Bytes, whatever text=True says; they end where it hangs.
        print((exc.stdout or b"").decode(errors="replace"), flush=True)
        return Outcome(cell, False, "hangs", time.monotonic() - started)
    seconds = time.monotonic() - started
    lines = done.stdout.splitlines() or ["no output"]
    # All of it when it failed; else the reasons for skips, and the count.
    skips = [line for line in lines if line.startswith("SKIPPED")]
    print("\n".join(lines if done.returncode else [*skips, lines[-1]]), flush=True)
    return Outcome(cell, done.returncode == 0, lines[-1].strip("= "), seconds)


def report(outcomes: list[Outcome], skipped: list[str], seconds: float) -> int:
    print("\n== summary")
    for outcome in outcomes:
        verdict = "ok    " if outcome.passed else "FAILED"
        print(f"{verdict} {outcome.cell:<50} {outcome.seconds:5.0f} s  {outcome.text}")
    report_skipped(skipped)
    failed = sum(not outcome.passed for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} cells passed in {seconds:.0f} s")
    if not outcomes:
        print("no cell ran")
    return 1 if failed or not outcomes else 0


def report_skipped(skipped: list[str]) -> None:
    for line in skipped:
        print(f"skipped {line}")


if __name__ == "__main__":
    sys.exit(main())
