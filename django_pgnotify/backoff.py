"""Full-jitter exponential backoff.

The delay before attempt *n* is uniform in [0, min(cap, base * 2**n)]: of the schemes compared in
"Exponential Backoff And Jitter" (AWS Architecture Blog, 2015) the one that spreads a herd best.
"""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Delays in seconds for one series of attempts.

    Args:
        base: upper bound of the first delay, in seconds.
        cap: upper bound of any delay, in seconds.
        uniform: source of randomness, ``random.uniform`` unless a test wants another.
    """

    def __init__(
        self, base: float, cap: float, uniform: Callable[[float, float], float] = random.uniform
    ) -> None:
        self.base = base
        self.cap = cap
        self.attempts = 0
        self._uniform = uniform

    def next(self) -> float:
        """The delay before the next attempt; each call counts as one attempt."""
        # The exponent is bounded because 2.0**1024 overflows and attempts go on for ever.
        ceiling = min(self.cap, self.base * 2.0 ** min(self.attempts, 64))
        self.attempts += 1
        return self._uniform(0.0, ceiling)

    def reset(self) -> None:
        """Begin a new series: what was wrong has been well for a while."""
        self.attempts = 0
