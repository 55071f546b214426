"""What was measured, kept from run to run: each scenario with its facts, in one file.

A run of some scenarios (``--only``) replaces these and keeps the others, each with the date and
the machine that it was measured on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .frame import Case, CaseResult, Scenario

NAME = "results.json"
NOT_THERE = "was not there when this was measured"

Facts = Mapping[str, str]


class Section(NamedTuple):
    """A scenario, what came out, and when and on what."""

    scenario: Scenario
    results: Sequence[CaseResult]
    facts: Facts


def merged(
    folder: Path,
    measured: Iterable[Section],
    scenarios: Iterable[Scenario],
) -> list[Section]:
    """What was measured now, and of the other ``scenarios`` what ``folder`` has of them."""
    new = {section.scenario.name: section for section in measured}
    sections = []
    for scenario in scenarios:
        section = new.get(scenario.name) or earlier(folder, scenario)
        if section is not None:
            sections.append(section)
    return sections


def earlier(folder: Path, scenario: Scenario) -> Section | None:
    """A scenario as ``folder`` has it; None where it does not.

    Cases that have gone from the scenario are left out: nobody knows their units any more.
    """
    path = folder / NAME
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    of_cases = stored["scenarios"].get(scenario.name)
    if of_cases is None:
        return None
    facts = stored.get("earlier", {}).get(scenario.name, stored["machine"])
    cases = scenario.cases(facts["run"] == "quick")
    results = [_case(case, of_cases[case.name]) for case in cases if case.name in of_cases]
    return Section(scenario, results, facts)


def _case(case: Case, stored: Mapping[str, Any]) -> CaseResult:
    """Variants that came later, or were measured by other metrics, count as missing."""
    wanted = {metric.name for metric in case.metrics}
    measured = {
        variant.name: values
        for variant in case.variants
        if wanted <= set(values := stored["measured"].get(variant.name, {}))
    }
    missing = {
        variant.name: stored["missing"].get(variant.name, NOT_THERE)
        for variant in case.variants
        if variant.name not in measured
    }
    return CaseResult(case, measured, missing)


def write(folder: Path, facts: Facts, sections: Iterable[Section]) -> None:
    """Store them all; ``facts`` are those of the latest run."""
    sections = list(sections)
    stored = {
        "machine": dict(facts),
        "earlier": {s.scenario.name: dict(s.facts) for s in sections if s.facts != facts},
        "scenarios": {section.scenario.name: _raw(section.results) for section in sections},
    }
    (folder / NAME).write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


def _raw(results: Iterable[CaseResult]) -> dict[str, Any]:
    """Every figure of every round, and why there is none."""
    return {
        result.case.name: {"measured": result.measured, "missing": result.missing}
        for result in results
    }
