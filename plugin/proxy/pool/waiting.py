"""A held request, and how far the start is that it waits for."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from plugin.proxy.pool.replica import STARTING, Replica
from plugin.proxy.pool.start_times import Kind
from plugin.runtime.phases import Phase


@dataclass(eq=False)
class Waiter:
    """One held request. `limit_s` is its deadline; None means the measured one. `at_most_s` lowers it."""

    ready: asyncio.Future[Replica]
    limit_s: float | None
    at_most_s: float
    began: float
    ahead: bool = False
    """Whether it may run on a replica whose check has begun and not ended."""
    client: bool = True
    """False for an owner's own wait."""


@dataclass(frozen=True)
class Progress:
    """Where the start that requests wait for is: phase, age, expected total, seconds left (all measured or a stated
    guess).
    """

    phase: Phase
    kind: Kind
    elapsed_s: float
    expected_s: float
    left_s: float
    started_here: bool = True

    def sentence(self) -> str:
        """`waking, restoring 0.6 of 1.1 s`: what early streams and people read."""
        if not self.started_here:
            return f"waiting {self.elapsed_s:.1f} s for an engine that is not started from here"
        what = f"{self.phase} " if self.phase in STARTING else ""
        return f"waking, {what}{self.elapsed_s:.1f} of {self.expected_s:.1f} s"
