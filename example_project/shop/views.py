"""The board, its buttons, and the summary as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.contrib.auth.views import redirect_to_login
from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_POST

from . import board, orders
from .models import Order, Status
from .summary import summary

PARCELS = 20


def web_name() -> str:
    """Which of the web processes this is."""
    return getattr(settings, "WEB_NAME", "web")


@require_GET
def index(request: HttpRequest) -> HttpResponse:
    figures, _ = summary()
    return render(
        request,
        "shop/board.html",
        {
            "columns": board.columns(figures["by_status"]),
            "activity": board.activity(),
            "summary": figures,
            "cards_per_column": board.CARDS_PER_COLUMN,
            "ticker_length": board.TICKER_LENGTH,
            "web_name": web_name(),
            "web_peers": getattr(settings, "WEB_PEERS", []),
        },
    )


@require_GET
def summary_json(request: HttpRequest) -> JsonResponse:
    figures, cached = summary()
    return JsonResponse({**figures, "from_cache": cached, "served_by": web_name()})


@require_GET
def courier(request: HttpRequest) -> HttpResponse:
    """The parcels that were handed over last; later ones come as server-sent events."""
    shipped = Order.objects.filter(status=Status.SHIPPED).select_related("customer")
    parcels = [orders.shipment(order) for order in shipped[:PARCELS]]
    return render(
        request,
        "shop/courier.html",
        {"parcels": parcels, "limit": PARCELS, "web_name": web_name()},
    )


View = Callable[..., HttpResponse]


def staff_only(view: View) -> View:
    """Ask others to log in, and bring them back to the board, since a POST cannot be resumed."""

    @wraps(view)
    def guarded(request: HttpRequest, **kwargs: Any) -> HttpResponse:
        if request.user.is_active and request.user.is_staff:
            return view(request, **kwargs)
        login = redirect_to_login(reverse("board"), reverse("admin:login"))
        return login if _is_form(request) else JsonResponse({"login": login.url}, status=401)

    return guarded


def _is_form(request: HttpRequest) -> bool:
    return request.accepts("text/html")


def _act(request: HttpRequest, act: Callable[[], Order]) -> HttpResponse:
    """Do it, and answer a script with JSON and a plain form with the board.

    The script is told the moment of the commit: the first on_commit callback runs right after it.
    """
    committed: list[float] = []
    try:
        with transaction.atomic():
            transaction.on_commit(lambda: committed.append(time.time()))
            order = act()
    except (orders.OrderRefusedError, Order.DoesNotExist) as error:
        if _is_form(request):
            messages.error(request, str(error))
            return redirect("board")
        return JsonResponse({"error": str(error)}, status=409)
    if _is_form(request):
        return redirect("board")
    return JsonResponse({"pk": order.pk, "status": order.status, "committed_at": committed[0]})


@require_POST
@staff_only
def advance(request: HttpRequest, pk: int) -> HttpResponse:
    return _act(request, lambda: orders.advance(pk))


@require_POST
@staff_only
def cancel(request: HttpRequest, pk: int) -> HttpResponse:
    return _act(request, lambda: orders.cancel(pk))


@require_POST
@staff_only
def place(request: HttpRequest) -> HttpResponse:
    return _act(request, orders.place)
