"""The admin, and a page of all orders that says who answered, and from what."""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

from django.contrib import admin
from django.http import HttpRequest, JsonResponse
from django.urls import path

from django_pgnotify.caching import cached
from tests.process.cached_site import WORKERS
from tests.process.cached_site.settings import FOLDER
from tests.testapp.models import Order

DEADLINE = 30.0

if not admin.site.is_registered(Order):
    admin.site.register(Order)


@cached(key="orders", depends_on=[Order])
def orders() -> dict[str, Any]:
    """All orders, who looked them up, and a name for this look."""
    statuses = {str(pk): status for pk, status in Order.objects.values_list("pk", "status")}
    return {"orders": statuses, "looked_up_by": os.getpid(), "look": uuid.uuid4().hex}


def together(request: HttpRequest, name: str) -> JsonResponse:
    """Answer once all workers are here: nobody can answer twice meanwhile."""
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    (folder / f"{os.getpid()}").touch()
    deadline = time.monotonic() + DEADLINE
    while len(list(folder.iterdir())) < WORKERS:
        if time.monotonic() > deadline:
            return JsonResponse({"here": len(list(folder.iterdir()))}, status=503)
        time.sleep(0.002)
    return JsonResponse({"pid": os.getpid(), **orders()})


urlpatterns = [
    path("admin/", admin.site.urls),
    path("together/<str:name>/", together),
]
