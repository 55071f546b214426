"""A site whose pages come from a near cache, for gunicorn: settings, pages, and the application."""

from __future__ import annotations

WORKERS = 4
"""Of gunicorn."""
