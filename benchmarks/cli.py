"""The command line: runs scenarios and writes what came out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import databases, machine, report, results
from .chart import chart
from .frame import CaseResult, Scenario
from .results import Facts, Section
from .running import run_case


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.list:
        databases.set_up()
        for scenario in _scenarios([]):
            print(f"{scenario.name:16} {scenario.title}")
        return 0
    with databases.served() as server:
        facts = {"run": "quick" if options.quick else "full", **machine.facts(server)}
        measured = [
            Section(each, _run(each, options.quick, options.rounds), facts)
            for each in _scenarios(options.only)
        ]
        everything = _scenarios([])
    print(report.summary(measured))
    if options.out is not None:
        write(options.out, facts, results.merged(options.out, measured, everything))
    return 0


def _run(scenario: Scenario, quick: bool, rounds: int | None) -> list[CaseResult]:
    begun = time.monotonic()
    of_cases = [run_case(case, rounds or case.rounds, _progress) for case in scenario.cases(quick)]
    _progress("")
    print(f"{scenario.name} took {time.monotonic() - begun:.0f} s", file=sys.stderr)
    print(report.scenario_section(scenario, of_cases), end="\n\n", flush=True)
    return of_cases


def write(folder: Path, facts: Facts, sections: Iterable[Section]) -> None:
    """The page, the raw figures, and a chart of each group; ``facts`` are of the latest run."""
    sections = list(sections)
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Section]] = {}
    for section in sections:
        groups.setdefault(section.scenario.group, []).append(section)
    for group, of_group in groups.items():
        drawn = [(section.scenario, section.results) for section in of_group]
        (folder / f"{group}.svg").write_text(chart(group.capitalize(), drawn))
    (folder / "results.md").write_text(report.page(groups))
    results.write(folder, facts, sections)


def _scenarios(only: Sequence[str]) -> list[Scenario]:
    from .scenarios import all_scenarios

    scenarios = all_scenarios()
    unknown = set(only) - {scenario.name for scenario in scenarios}
    if unknown:
        names = ", ".join(scenario.name for scenario in scenarios)
        sys.exit(f"There is no scenario {min(unknown)!r}; choose from {names}.")
    return [scenario for scenario in scenarios if not only or scenario.name in only]


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the scenarios")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--quick", action="store_true", help="smaller, and fewer rounds")
    parser.add_argument("--rounds", type=int, help="instead of what each case wants")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write results.md, results.json and charts"
    )
    return parser
