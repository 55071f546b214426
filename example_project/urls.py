from django.contrib import admin
from django.urls import include, path

admin.site.site_header = admin.site.site_title = "Larkfield Roasters"
admin.site.index_title = "Back office"

urlpatterns = [
    path("admin/", admin.site.urls),
    path("", include("example_project.shop.urls")),
]
