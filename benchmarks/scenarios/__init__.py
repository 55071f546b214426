"""The scenarios: each module has a ``SCENARIO``."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.frame import Scenario


def all_scenarios() -> list[Scenario]:
    """All there are, by name."""
    modules = [
        importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
    ]
    return [module.SCENARIO for module in modules]
