"""What the servers serve."""

from __future__ import annotations

from django.core.asgi import get_asgi_application

django_application = get_asgi_application()

from channels.auth import AuthMiddlewareStack  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler  # noqa: E402
from django.urls import path  # noqa: E402

from tests.process.live.urls import MailConsumer, RoomConsumer  # noqa: E402

application = ProtocolTypeRouter(
    {
        "http": ASGIStaticFilesHandler(django_application),
        "websocket": AuthMiddlewareStack(
            URLRouter(
                [
                    path("ws/", RoomConsumer.as_asgi()),
                    path("ws/mail/", MailConsumer.as_asgi()),
                ]
            )
        ),
    }
)
