"""Bar charts as SVG, written by hand: the same figures make the same file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

from .figures import Spread, spread
from .frame import CaseResult, Scenario
from .report import number

WIDTH, LABELS, BARS, ROW, GAP = 860, 270, 430, 22, 34
OURS, THEIRS, RANGE, INK = "#0c7c59", "#9aa5b1", "#37474f", "#1f2933"


def chart(title: str, results: Iterable[tuple[Scenario, Sequence[CaseResult]]]) -> str:
    """Of each case the first metric: a bar to the median, and a line from least to most."""
    parts: list[str] = []
    y = 44
    for scenario, of_cases in results:
        for result in of_cases:
            parts += _case(scenario, result, y)
            y += GAP + ROW * len(result.case.variants)
    head = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10}" '
            f'width="{WIDTH}" height="{y + 10}" font-family="sans-serif" font-size="12">'
        ),
        f'<rect width="{WIDTH}" height="{y + 10}" fill="white"/>',
        _text(12, 24, title, size=16, weight="bold"),
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def _case(scenario: Scenario, result: CaseResult, y: int) -> list[str]:
    metric = result.case.metrics[0]
    spreads = {name: spread(values[metric.name]) for name, values in result.measured.items()}
    most = max((value.high for value in spreads.values()), default=0.0)
    better = "more is better" if metric.more_is_better else "less is better"
    parts = [
        _text(12, y + 14, f"{scenario.name}: {result.case.name}", weight="bold"),
        _text(LABELS, y + 14, f"{metric.title} ({better})"),
    ]
    y += 20
    for variant in result.case.variants:
        parts.append(_text(LABELS - 8, y + 14, variant.name, anchor="end"))
        value = spreads.get(variant.name)
        if value is None:
            parts.append(_text(LABELS, y + 14, "cannot run"))
        else:
            parts += _bar(
                value, most, y, OURS if variant.name.startswith(("ours", "pglisten")) else THEIRS
            )
        y += ROW
    return parts


def _bar(value: Spread, most: float, y: int, colour: str) -> list[str]:
    def x(figure: float) -> float:
        return LABELS + (BARS * max(figure, 0.0) / most if most > 0 else 0.0)

    middle = y + 9
    return [
        (
            f'<rect x="{LABELS}" y="{y + 2}" width="{x(value.median) - LABELS:.1f}" height="14" '
            f'fill="{colour}"/>'
        ),
        f'<path d="M{x(value.low):.1f} {middle}H{x(value.high):.1f}" stroke="{RANGE}"/>',
        _text(x(value.high) + 6, y + 14, number(value.median)),
    ]


def _text(
    x: float, y: float, text: str, size: int = 12, weight: str = "normal", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{INK}">{escape(text)}</text>'
    )
