"""What gunicorn preloads: the cache is filled before the workers are forked."""

from __future__ import annotations

from django.core.wsgi import get_wsgi_application
from django.db import connections

application = get_wsgi_application()


def fill() -> None:
    from tests.process.cached_site.pages import orders

    orders()
    # A forked worker must not use its parent's connection.
    connections.close_all()


fill()
