"""Its channels, and what is called: the same recorder as everywhere else."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pgpubsub

from benchmarks.recording import VARIABLE, recorder

from .models import Plain, PlainLoad, Stored, StoredLoad

# The driver imports this as well, for the triggers.
record: Callable[[object], None] | None = recorder() if VARIABLE in os.environ else None


@dataclass
class PlainChannel(pgpubsub.TriggerChannel):
    model = Plain


@dataclass
class StoredChannel(pgpubsub.TriggerChannel):
    model = Stored
    lock_notifications = True


@dataclass
class PlainLoadChannel(pgpubsub.TriggerChannel):
    model = PlainLoad


@dataclass
class StoredLoadChannel(pgpubsub.TriggerChannel):
    model = StoredLoad
    lock_notifications = True


def receive(old: Any, new: Any) -> None:
    assert record is not None
    record(new)


def ignore(old: Any, new: Any) -> None:
    pass


pgpubsub.post_insert_listener(PlainChannel)(receive)
pgpubsub.post_insert_listener(StoredChannel)(receive)
pgpubsub.post_insert_listener(PlainLoadChannel)(ignore)
pgpubsub.post_insert_listener(StoredLoadChannel)(ignore)
