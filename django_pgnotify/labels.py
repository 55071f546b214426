"""Models by their labels, as settings and arguments name them."""

from __future__ import annotations

import difflib
from typing import Any

from django.apps import apps

from .exceptions import InvalidArgument


def model_of(label: str) -> Any:
    """The model of a label such as ``"shop.Order"``.

    Raises:
        InvalidArgument: there is none; the message names one that is near.
    """
    try:
        return apps.get_model(label)
    except (LookupError, ValueError):
        known = {model._meta.label_lower: model._meta.label for model in apps.get_models()}
        near = difflib.get_close_matches(label.lower(), known, n=1)
        hint = f"did you mean {known[near[0]]!r}?" if near else "a label is 'app.Model'."
        raise InvalidArgument(f"there is no model {label!r}; {hint}") from None
