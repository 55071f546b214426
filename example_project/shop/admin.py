from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.forms import BaseModelForm
from django.http import HttpRequest
from django.utils import timezone

from . import orders
from .models import Activity, Customer, Order, OrderLine, PackingSlip, Product


class OrderLineInline(admin.TabularInline):
    model = OrderLine
    extra = 0
    autocomplete_fields = ("product",)


@admin.register(Order)
class OrderAdmin(admin.ModelAdmin):
    list_display = ("number", "customer", "status", "total", "placed_at")
    list_filter = ("status", "placed_at")
    search_fields = ("customer__name", "customer__email", "customer__city")
    list_select_related = ("customer",)
    autocomplete_fields = ("customer",)
    readonly_fields = ("total",)
    inlines = (OrderLineInline,)
    actions = ("advance",)

    @admin.action(description="Take the selected orders one step on")
    def advance(self, request: HttpRequest, queryset: QuerySet[Order]) -> None:
        # One save() each, not queryset.update(), which sends no signals and so no events.
        for order in queryset.order_by("pk"):
            try:
                orders.advance(order.pk)
            except orders.OrderRefusedError as error:
                self.message_user(request, str(error), messages.WARNING)

    def save_model(
        self, request: HttpRequest, obj: Order, form: BaseModelForm, change: bool
    ) -> None:
        obj.changed_at = timezone.now()
        super().save_model(request, obj, form, change)

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        super().save_related(request, form, formsets, change)
        order: Order = form.instance
        total = order.recalculate()
        if total != order.total:
            order.total = total
            order.save(update_fields=["total"])


@admin.register(Customer)
class CustomerAdmin(admin.ModelAdmin):
    list_display = ("name", "email", "city")
    search_fields = ("name", "email", "city")


@admin.register(Product)
class ProductAdmin(admin.ModelAdmin):
    list_display = ("name", "sku", "price", "stock")
    search_fields = ("name", "sku")


class ReadOnlyAdmin(admin.ModelAdmin):
    """Rows that receivers write and nobody edits."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(PackingSlip)
class PackingSlipAdmin(ReadOnlyAdmin):
    list_display = ("order", "pieces", "created_at")
    list_select_related = ("order",)


@admin.register(Activity)
class ActivityAdmin(ReadOnlyAdmin):
    list_display = ("at", "kind", "order", "text")
    list_filter = ("kind",)
    list_select_related = ("order",)
