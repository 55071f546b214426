"""Markdown of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .figures import Spread, ratio, spread
from .frame import Case, CaseResult, Metric, Scenario, Target


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
    header = ["", *(metric.title for metric in case.metrics), f"× {case.reference}"]
    rows = []
    for variant in case.variants:
        values = result.measured.get(variant.name)
        if values is None:
            reason = result.missing[variant.name]
            rows.append([variant.name, f"cannot run: {reason}", *[""] * len(case.metrics)])
            continue
        cells = [_cell(spread(values[metric.name])) for metric in case.metrics]
        rows.append([variant.name, *cells, _ratio_cell(result, case.metrics[0], variant.name)])
    return table(header, rows)


def _cell(value: Spread) -> str:
    return f"{number(value.median)} ({number(value.low)}–{number(value.high)})"


def _ratio_cell(result: CaseResult, metric: Metric, variant: str) -> str:
    reference = result.measured.get(result.case.reference)
    if reference is None:
        return ""
    value = ratio(result.measured[variant][metric.name], reference[metric.name])
    return f"{value.median:.2f}"


def summary(results: Iterable[tuple[Scenario, Sequence[CaseResult]]]) -> str:
    rows = []
    for scenario, of_cases in results:
        for result in of_cases:
            for verdict in verdicts(result):
                value = "" if verdict.value is None else f"{verdict.value.median:.2f}"
                rows.append(
                    [scenario.name, verdict.target.says, verdict.target.limit, value, verdict.says]
                )
    return table(["scenario", "what", "target", "measured", ""], rows)


def scenario_section(scenario: Scenario, results: Sequence[CaseResult]) -> str:
    parts = [f"## {scenario.title}", scenario.text]
    for result in results:
        parts += [f"### {_heading(scenario, result.case)}", case_table(result)]
    return "\n\n".join(parts)


def _heading(scenario: Scenario, case: Case) -> str:
    return f"{scenario.name}: {case.name}"
