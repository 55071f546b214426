"""What a process does last, in whichever way it ends in order."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.util import Finalize


def at_end(func: Callable[[], object]) -> None:
    """Have ``func`` called when this process ends. A second call must do no harm."""
    if multiprocessing.parent_process() is None:
        atexit.register(func)
    else:  # such a child ends without running exit handlers
        Finalize(None, func, exitpriority=10)
    if "celery" in sys.modules:
        # Nor does a child of its pool, which multiprocessing knows nothing of.
        signals = importlib.import_module("celery.signals")
        signals.worker_process_shutdown.connect(lambda **kwargs: func(), weak=False)
