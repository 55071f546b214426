"""The rows: what is cached of each is the stamp of its last write."""

from __future__ import annotations

from django.db import connection, models

from django_pgnotify import notify_changes

ROWS = 16
"""Of each model; row numbers go on from one model to the next."""


class Row(models.Model):
    stamp = models.BigIntegerField(default=0)

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return f"{self._meta.label} {self.pk}"


@notify_changes
class Item(Row):
    """Its NOTIFY follows the COMMIT."""


@notify_changes(delivery="atomic")
class Tight(Row):
    """Its NOTIFY is part of the transaction, so that a writer may be killed at any moment."""


MODELS: tuple[type[Row], ...] = (Item, Tight)
NUMBERS = range(ROWS * len(MODELS))


def model_of(row: int) -> type[Row]:
    return MODELS[row // ROWS]


def pk_of(row: int) -> int:
    return row % ROWS + 1


def row_of(name: str, pk: int) -> int:
    """The number of a row of the model with this name."""
    names = [model._meta.model_name for model in MODELS]
    return names.index(name) * ROWS + pk - 1


def stamp_of(row: int) -> int:
    """As the database has it now."""
    return int(model_of(row)._default_manager.values_list("stamp", flat=True).get(pk=pk_of(row)))


async def astamp_of(row: int) -> int:
    stamps = model_of(row)._default_manager.values_list("stamp", flat=True)
    return int(await stamps.aget(pk=pk_of(row)))


SLOW_COMMITS = """
    CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF random() < 0.1 THEN PERFORM pg_sleep(random() * 0.06); END IF;
        RETURN NULL;
    END $$
"""
SLOW_COMMITS_OF = """
    CREATE CONSTRAINT TRIGGER dawdle AFTER UPDATE ON {} DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION dawdle()
"""
"""Some COMMITs take their time, so that they can be interrupted."""


def slow_commits_down() -> None:
    with connection.cursor() as cursor:
        cursor.execute(SLOW_COMMITS)
        for model in MODELS:
            cursor.execute(SLOW_COMMITS_OF.format(model._meta.db_table))


def create_rows() -> None:
    for model in MODELS:
        model._default_manager.bulk_create([model(pk=pk + 1) for pk in range(ROWS)])
