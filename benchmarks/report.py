"""Markdown of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .figures import Spread, ratio, spread
from .frame import CaseResult, Scenario, Target
from .results import Facts, Section


class Verdict(NamedTuple):
    target: Target
    value: Spread | None
    """What was measured; None where it could not be."""

    @property
    def says(self) -> str:
        if self.value is None:
            return "cannot run"
        return "met" if self.target.met(self.value.median) else "**not met**"


def verdicts(result: CaseResult) -> list[Verdict]:
    return [Verdict(target, _reached(result, target)) for target in result.case.targets]


def _reached(result: CaseResult, target: Target) -> Spread | None:
    measured = result.measured
    names = [target.variant] if target.against is None else [target.variant, target.against]
    if not all(name in measured for name in names):
        return None
    of = measured[target.variant][target.metric]
    return (
        spread(of) if target.against is None else ratio(of, measured[target.against][target.metric])
    )


def number(value: float) -> str:
    """Three digits that count, or all of a bigger number, with separators."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are figures."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("| --- |" + " ---: |" * (len(header) - 1))
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def case_table(result: CaseResult) -> str:
    case = result.case
    header = ["", *(metric.title for metric in case.metrics)]
    if case.reference is not None:
        header.append(f"× {case.reference}")
    rows = []
    for variant in case.variants:
        values = result.measured.get(variant.name)
        if values is None:
            cells = [f"cannot run: {result.missing[variant.name]}"]
        else:
            cells = [_cell(spread(values[metric.name])) for metric in case.metrics]
            compared = compare(result, variant.name)
            cells += [] if compared is None else [f"{compared.median:.2f}"]
        rows.append([variant.name, *cells, *[""] * (len(header) - 1 - len(cells))])
    return table(header, rows)


def compare(result: CaseResult, variant: str) -> Spread | None:
    """The first metric of a variant over that of the reference."""
    reference = result.measured.get(result.case.reference or "")
    if reference is None:
        return None
    metric = result.case.metrics[0].name
    return ratio(result.measured[variant][metric], reference[metric])


def _cell(value: Spread) -> str:
    return f"{number(value.median)} ({number(value.low)}–{number(value.high)})"


def summary(sections: Iterable[Section]) -> str:
    rows = []
    for scenario, of_cases, _ in sections:
        for result in of_cases:
            for verdict in verdicts(result):
                value = "" if verdict.value is None else f"{verdict.value.median:.2f}"
                rows.append(
                    [scenario.name, verdict.target.says, verdict.target.limit, value, verdict.says]
                )
    return table(["scenario", "what", "target", "measured", ""], rows)


def scenario_section(
    scenario: Scenario, results: Sequence[CaseResult], measured: str | None = None
) -> str:
    """``measured`` says when and on what."""
    parts = [f"## {scenario.title}", scenario.text]
    if measured is not None:
        parts.append(measured)
    for result in results:
        parts += [f"### {result.case.name}", case_table(result)]
    return "\n\n".join(parts)


def page(groups: Mapping[str, Sequence[Section]]) -> str:
    """The whole page; its sections may be of several runs."""
    everything = [section for of_group in groups.values() for section in of_group]
    runs = _runs(everything)
    parts = [
        "# Results",
        (
            "Medians over all rounds of one run, with the least and the most in brackets. A ratio "
            "is the median of the ratios of each round. Written by `make bench`; "
            "[how it is measured](index.md)."
        ),
        _facts_table(runs),
        "## Targets",
        summary(everything),
    ]
    for group, of_group in groups.items():
        parts.append(f"![{group}]({group}.svg)")
        for scenario, results, facts in of_group:
            name = f" in run {runs.index(facts) + 1}" if len(runs) > 1 else ""
            measured = f"Measured on {facts['date']}{name}."
            parts.append(scenario_section(scenario, results, measured))
    return "\n\n".join(parts) + "\n"


def _runs(sections: Iterable[Section]) -> list[Facts]:
    """The facts of each run that a section is of, the oldest first."""
    runs: list[Facts] = []
    for section in sections:
        if section.facts not in runs:
            runs.append(section.facts)
    return sorted(runs, key=lambda facts: facts["date"])


def _facts_table(runs: Sequence[Facts]) -> str:
    names = dict.fromkeys(name for facts in runs for name in facts)
    heads = ["measured on"] if len(runs) == 1 else [f"run {n + 1}" for n in range(len(runs))]
    return table(["", *heads], ([name, *(f.get(name, "") for f in runs)] for name in names))
