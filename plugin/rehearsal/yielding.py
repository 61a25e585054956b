"""Whether a rehearsal runs, pauses or is dropped, by the requests that the launch has meanwhile.

It pauses while a request is there. Where requests are always there, it runs beside them, and is dropped once they take
longer than without it. How long requests take on average follows from how many are there and how many get done
(Little's law), whatever they ask; so nothing is added to a request's way. Under a limit of processor time (a container's), which
the lowest priority uses up like any other, it never runs beside requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

LEAST_REQUESTS = 20
"""Requests that must have been answered before their average time counts."""
WORSE = 1.2
"""Requests beside a rehearsal may take so many times as long as without it, on average."""
CALM_S = 0.2
"""Seconds without a request after which a paused rehearsal goes on."""
YIELD_S, GIVE_UP_S = 30.0, 300.0
"""Seconds that it pauses in all before it runs beside requests, and before it is dropped where it may not, or where their average
time is not known."""


@dataclass
class MeanTime:
    """The average seconds that requests take, from samples of how many are there and how many were answered."""

    _area: float = 0.0
    _answered: int = 0
    _last: tuple[float, int, int] | None = None

    def add(self, now: float, there: int, answered: int) -> None:
        """Add a sample: at `now` (seconds) `there` requests wait or are answered, and `answered` were so far."""
        if self._last is not None:
            before, then, count = self._last
            self._area += (now - before) * then
            self._answered += answered - count
        self._last = (now, there, answered)

    def interrupt(self) -> None:
        """Begin anew with the next sample, without what lies between."""
        self._last = None

    @property
    def seconds(self) -> float | None:
        """Return the average, or None while too few requests were answered."""
        return self._area / self._answered if self._answered >= LEAST_REQUESTS else None


class Course(StrEnum):
    """What a rehearsal is to do now."""

    RUN = "run"
    PAUSE = "pause"
    DROP = "drop"


@dataclass
class Yielding:
    """Decides the course of one rehearsal. `alone`: the requests' time without one, known or not yet."""

    alone: MeanTime
    beside: MeanTime = field(default_factory=MeanTime)
    may_run_beside: bool = True
    """Whether it may run beside requests at all."""
    why: str = ""
    """Why it is dropped."""
    _paused_s: float = 0.0
    _last: float | None = None
    _seen: float = float("-inf")
    _course: Course = Course.RUN

    @property
    def runs_beside(self) -> bool:
        """Return whether it runs although requests are there: they always are, and how long they take without it is known."""
        return self.may_run_beside and self.alone.seconds is not None and self._paused_s >= YIELD_S

    def course(self, now: float, there: int, answered: int) -> Course:
        """Return what to do, from a sample as in `MeanTime.add`."""
        if self._course is Course.PAUSE and self._last is not None:
            self._paused_s += now - self._last
        self._last = now
        if there:
            self._seen = now
        if self.runs_beside:
            self.alone.interrupt()
            self.beside.add(now, there, answered)
            self._course = Course.RUN
            usual, found = self.alone.seconds, self.beside.seconds
            if usual is not None and found is not None and found > WORSE * usual:
                self.why = f"requests took {found:.2f} s on average beside it, and {usual:.2f} s without it"
                self._course = Course.DROP
        elif self._paused_s >= GIVE_UP_S:
            self.why = f"requests were there for {GIVE_UP_S:.0f} s"
            self._course = Course.DROP
        else:
            self._course = Course.PAUSE if now - self._seen < CALM_S else Course.RUN
            if self._course is Course.PAUSE:
                self.alone.add(now, there, answered)
            else:
                self.alone.interrupt()
        return self._course
