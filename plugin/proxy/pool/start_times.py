"""Measure how long starts take, for hold deadlines, Retry-After and progress texts (`restoring 0.6 of 1.1 s`).

Keeps the last 64 durations of each kind of start (seconds from the first phase to serving). Estimates are medians of
their own kind, so one slow start does not change them. Without a measurement, fixed guesses (`_GUESS_S`) apply.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from enum import StrEnum

from plugin.runtime.phases import Phase, Span

KEPT = 64
MARGIN = 4.0
_ENOUGH = 3
"""Starts from which on the medians of single phases count, if the file of lead times knows more starts than this process."""
_COLD = frozenset({Phase.STARTING, Phase.LOADING, Phase.WARMING})
_GUESS_S = {"restored": 5.0, "first-restore": 10.0, "cold": 120.0, "woken": 2.0}
_FLOOR_S = {"restored": 30.0, "first-restore": 30.0, "cold": 120.0, "woken": 30.0}


class Kind(StrEnum):
    """The kind of a start."""

    RESTORED = "restored"
    FIRST_RESTORE = "first-restore"
    """A restore that also records which pages it needs; it takes longer than those after it."""
    COLD = "cold"
    WOKEN = "woken"


def kind_of(phases: Iterable[Phase]) -> Kind | None:
    """Return the kind of start that has these phases, or None if unknown. A failed restore followed by a cold start is cold."""
    seen = set(phases)
    if seen & _COLD:
        return Kind.COLD
    if Phase.RESTORING in seen:
        return Kind.RESTORED
    if Phase.WAKING in seen:
        return Kind.WOKEN
    return None


class History:
    """Measured durations by kind of start, newest last."""

    def __init__(
        self,
        *,
        restored: Iterable[float] = (),
        first_restore: Iterable[float] = (),
        cold: Iterable[float] = (),
        woken: Iterable[float] = (),
    ) -> None:
        self._taken: dict[Kind, deque[float]] = {
            Kind.RESTORED: deque(restored, KEPT),
            Kind.FIRST_RESTORE: deque(first_restore, KEPT),
            Kind.COLD: deque(cold, KEPT),
            Kind.WOKEN: deque(woken, KEPT),
        }
        self.last: dict[Kind, tuple[Span, ...]] = {}
        """The spans of the last start of each kind, for the waterfall on the admin page."""
        self._phases: dict[tuple[Kind, Phase], deque[float]] = {}

    def record(self, kind: Kind, seconds: float, spans: tuple[Span, ...] = ()) -> None:
        """Add one finished start."""
        self._taken[kind].append(seconds)
        if spans:
            self.last[kind] = spans
        for span in spans:
            self._phases.setdefault((kind, span.phase), deque(maxlen=KEPT)).append(span.took_s)

    def seen(self, kind: Kind) -> tuple[float, ...]:
        """Return the durations measured so far, oldest first."""
        return tuple(self._taken[kind])

    def quantile(self, kind: Kind, q: float) -> float | None:
        """Return the q-quantile (nearest rank) of the measured durations in seconds, or None if there are none."""
        return _quantile(self._taken[kind], q)

    def median(self, kind: Kind) -> float | None:
        """Return the median (of an even number the lower one) in seconds, or None if none was measured."""
        return self.quantile(kind, 0.5)

    def typical(self, kind: Kind) -> float:
        """Return the median in seconds, or the fixed guess for that kind."""
        median = self.median(kind)
        return _GUESS_S[kind] if median is None else median

    def guess_kind(self) -> Kind:
        """Return the most likely kind of the next start: restored if one was measured, then woken, then cold."""
        for kind in (Kind.RESTORED, Kind.WOKEN, Kind.COLD):
            if self._taken[kind]:
                return kind
        return Kind.COLD

    def left(self, kind: Kind, elapsed_s: float, phase: Phase | None = None, in_phase_s: float = 0.0) -> float:
        """Return the remaining seconds of a start that is `elapsed_s` old.

        If `phase` has been measured often enough: the rest of that phase (`in_phase_s` have passed) plus the medians of
        the later phases. Otherwise the rest of the whole start.
        """
        order = [span.phase for span in self.last.get(kind, ())]
        if phase not in order or len(self._phases[kind, phase]) < min(_ENOUGH, len(self._taken[kind])):
            return _left(self.typical(kind), self.quantile(kind, 1.0) or 0.0, elapsed_s, least_s=1.0)
        # Take the last occurrence: a failed restore's phases precede the cold start's.
        last = len(order) - 1 - order[::-1].index(phase)
        here = self._phases[kind, phase]
        later = sum(_quantile(self._phases[kind, after], 0.5) or 0.0 for after in order[last + 1 :])
        return _left(_quantile(here, 0.5) or 0.0, max(here), in_phase_s, least_s=0.1) + later

    def deadline(self, kind: Kind) -> float:
        """Return how long to hold a request for such a start, in seconds: the slowest measured one times a margin, at least a floor."""
        # Whether a restore is a first one is known only once it runs.
        same = (Kind.RESTORED, Kind.FIRST_RESTORE) if kind is Kind.RESTORED else (kind,)
        slowest = _quantile([value for each in same for value in self._taken[each]], 1.0)
        return max(_FLOOR_S[kind], MARGIN * (_GUESS_S[kind] if slowest is None else slowest))


def _quantile(taken: Iterable[float], q: float) -> float | None:
    """Return the q-quantile by nearest rank, the lower of two: one slow start of two is not the median."""
    values = sorted(taken)
    return values[max(0, math.ceil(q * len(values)) - 1)] if values else None


def _left(typical_s: float, slowest_s: float, elapsed_s: float, *, least_s: float) -> float:
    """Return the time left to the median; past it, to the slowest measured; past that, half the elapsed time."""
    for total in (typical_s, slowest_s):
        if elapsed_s < total:
            return total - elapsed_s
    return max(least_s, elapsed_s * 0.5)
