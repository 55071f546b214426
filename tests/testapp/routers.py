from __future__ import annotations

from typing import Any

from django.db.models import Model


class Router:
    """SQLite holds the models of the tests and nothing else, ``Remote`` lives on ``other``."""

    def db_for_read(self, model: type[Model], **hints: Any) -> str | None:
        # The model of a database cache has an app and a name, and no more.
        meta = model._meta
        return "other" if (meta.app_label, meta.model_name) == ("testapp", "remote") else None

    def db_for_write(self, model: type[Model], **hints: Any) -> str | None:
        return self.db_for_read(model, **hints)

    def allow_migrate(
        self, db: str, app_label: str, model_name: str | None = None, **hints: Any
    ) -> bool | None:
        if db == "lite":
            return app_label == "testapp"
        return None
