from django.urls import path

from django_pgnotify.streams import event_stream

from . import views
from .orders import SHIPMENTS

urlpatterns = [
    path("", views.index, name="board"),
    path("summary.json", views.summary_json, name="summary"),
    path("courier/", views.courier, name="courier"),
    path("courier/events/", event_stream(SHIPMENTS), name="courier-events"),
    path("orders/place/", views.place, name="place"),
    path("orders/<int:pk>/advance/", views.advance, name="advance"),
    path("orders/<int:pk>/cancel/", views.cancel, name="cancel"),
]
