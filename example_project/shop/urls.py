from django.urls import path

from . import views

urlpatterns = [
    path("", views.index, name="board"),
    path("summary.json", views.summary_json, name="summary"),
    path("orders/place/", views.place, name="place"),
    path("orders/<int:pk>/advance/", views.advance, name="advance"),
    path("orders/<int:pk>/cancel/", views.cancel, name="cancel"),
]
