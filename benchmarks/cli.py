"""The command line: runs scenarios and prints what came out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import databases, report
from .frame import CaseResult, Scenario
from .running import run_case


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.list:
        databases.set_up()
        for scenario in _scenarios([]):
            print(f"{scenario.name:16} {scenario.title}")
        return 0
    with databases.served():
        results = [
            (scenario, run(scenario, options.quick, options.rounds))
            for scenario in _scenarios(options.only)
        ]
    print(report.summary(results))
    return 0


def run(scenario: Scenario, quick: bool, rounds: int | None) -> list[CaseResult]:
    results = [run_case(case, rounds or case.rounds, _progress) for case in scenario.cases(quick)]
    _progress("")
    print(report.scenario_section(scenario, results), end="\n\n", flush=True)
    return results


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
    return parser
