"""What changes invalidate, in every process; autodiscovered like any app's."""

from __future__ import annotations

import os

from django_pgnotify import invalidates
from tests.faults.caches.models import MODELS
from tests.faults.caches.settings import NAIVE

for _model in MODELS:
    _name = _model._meta.model_name
    # What update() changes is invalidated by hand: see the writer.
    invalidates(_model, tags=[f"{_name}:{{pk}}"])
    if NAIVE:
        invalidates(_model, keys=[f"naive:{_name}:{{pk}}"], cache="file")

if name := os.environ.get("CHECK_SABOTAGE"):
    from tests.faults.caches.sabotage import SABOTAGES

    SABOTAGES[name]()
