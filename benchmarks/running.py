"""Runs the variants of a case in turn."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence

from .frame import CannotRun, Case, CaseResult, Measure


def interleaved(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """A B C A B C ...: the number of the round, and whose turn it is."""
    for number in range(rounds):
        for name in names:
            yield number, name


def run_case(case: Case, rounds: int, progress: Callable[[str], None]) -> CaseResult:
    """Open all variants, measure ``rounds`` rounds after the warm-up, and close them.

    A variant that fails is out, with its reason; the others go on.
    """
    measured: dict[str, dict[str, list[float]]] = {}
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        measures: dict[str, Measure] = {}
        for variant in case.variants:
            try:
                measures[variant.name] = stack.enter_context(variant.open())
            except Exception as exc:  # noqa: BLE001 - the table tells of it
                missing[variant.name] = _reason(exc)
        for number, name in interleaved(list(measures), case.warmups + rounds):
            if name in missing:
                continue
            progress(f"{case.name}: {name}, round {number + 1} of {case.warmups + rounds}")
            try:
                values = measures[name]()
            except Exception as exc:  # noqa: BLE001 - the table tells of it
                missing[name] = _reason(exc)
                measured.pop(name, None)
                continue
            if number >= case.warmups:
                of_variant = measured.setdefault(name, {})
                for metric, value in values.items():
                    of_variant.setdefault(metric, []).append(value)
    return CaseResult(case, measured, missing)


def _reason(exc: Exception) -> str:
    text = str(exc)
    if not isinstance(exc, CannotRun):
        last = traceback.extract_tb(exc.__traceback__)[-1]
        text = f"{type(exc).__name__} in {last.name}(): {text}"
    return " ".join(text.split()).replace("|", "/")[:200]  # a cell of a table
