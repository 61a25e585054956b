"""A held request, and the progress of the start that it waits for. `start_times.History.deadline` computes its time limit."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from plugin.proxy.pool.replica import STARTING, Replica
from plugin.proxy.pool.start_times import Kind
from plugin.runtime.phases import Phase

UNKNOWN_LEFT_S = 5.0
"""Retry-After for an engine that only others start: when it will serve is unknown."""


@dataclass(eq=False)
class Waiter:
    """One held request. `limit_s`: its deadline in seconds, None uses the measured one; `at_most_s` can only lower it."""

    ready: asyncio.Future[Replica]
    limit_s: float | None
    at_most_s: float
    began: float
    speculative: bool = False
    """True if it may run speculatively on a replica under check."""
    client: bool = True
    """False for an owner's own wait."""
    measured_s: float = 0.0
    """The longest measured deadline of the starts that it has waited for: one that ends, or fails, takes nothing of it back."""


@dataclass(frozen=True)
class Progress:
    """Progress of the start that requests wait for: phase, age, expected total, seconds left (measured, or a fixed guess).

    If only others start the engine, `expected_s` means nothing and `left_s` is `UNKNOWN_LEFT_S`.
    """

    phase: Phase
    kind: Kind
    elapsed_s: float
    expected_s: float
    left_s: float
    started_here: bool = True
    step: str = ""
    """How far the start is, where its owner knows more than the phase."""

    def sentence(self) -> str:
        """Return text such as `waking, restoring 0.6 of 1.1 s`, for early streams and people."""
        if not self.started_here:
            return f"waiting {self.elapsed_s:.1f} s for an engine that is not started from here"
        if self.step:
            return f"waking, {self.step}; {self.elapsed_s:.1f} of {self.expected_s:.1f} s in all"
        what = f"{self.phase} " if self.phase in STARTING else ""
        return f"waking, {what}{self.elapsed_s:.1f} of {self.expected_s:.1f} s"
