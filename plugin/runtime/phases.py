"""The phases of a replica: one state machine, driven by the launch, read by the proxy, the metrics, the log and the display.

Cold start: mounting → starting → loading → warming → trimming → checkpointing → resuming → serving.

Restore: mounting → restoring → waking → verifying → serving.

Serving alternates with asleep, with suspect and with standby: a replica in standby keeps its memory, gets no processor
time, and wakes by waking (→ verifying) → serving. Any phase may end in failed. A failed restore continues as a cold
start (failed → mounting).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    """The phase of a replica. The values are public: `/-/status`, metrics and manifests carry them."""

    IDLE = "idle"
    MOUNTING = "mounting"
    STARTING = "starting"
    LOADING = "loading"
    WARMING = "warming"
    TRIMMING = "trimming"
    CHECKPOINTING = "checkpointing"
    RESUMING = "resuming"
    RESTORING = "restoring"
    WAKING = "waking"
    VERIFYING = "verifying"
    SERVING = "serving"
    SUSPECT = "suspect"
    """Gets no new requests because it has been silent for too long. It answers again, or is restarted."""
    STANDBY = "standby"
    """Its processes are frozen with their memory. The next request continues them."""
    ASLEEP = "asleep"
    FAILED = "failed"
    STOPPED = "stopped"


_NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.IDLE: frozenset({Phase.MOUNTING}),
    Phase.MOUNTING: frozenset({Phase.STARTING, Phase.RESTORING}),
    Phase.STARTING: frozenset({Phase.LOADING}),
    Phase.LOADING: frozenset({Phase.WARMING}),
    Phase.WARMING: frozenset({Phase.TRIMMING, Phase.SERVING}),
    Phase.TRIMMING: frozenset({Phase.CHECKPOINTING, Phase.RESUMING}),
    Phase.CHECKPOINTING: frozenset({Phase.RESUMING}),
    Phase.RESUMING: frozenset({Phase.SERVING}),
    Phase.RESTORING: frozenset({Phase.WAKING}),
    # waking → serving: out of standby, where nothing was moved
    Phase.WAKING: frozenset({Phase.VERIFYING, Phase.SERVING}),
    Phase.VERIFYING: frozenset({Phase.SERVING}),
    # serving → trimming: a snapshot taken later; serving → mounting: a restart after a death
    Phase.SERVING: frozenset({Phase.STANDBY, Phase.ASLEEP, Phase.TRIMMING, Phase.MOUNTING, Phase.SUSPECT}),
    Phase.SUSPECT: frozenset({Phase.SERVING, Phase.ASLEEP, Phase.MOUNTING}),
    Phase.STANDBY: frozenset({Phase.WAKING, Phase.ASLEEP}),
    Phase.ASLEEP: frozenset({Phase.WAKING, Phase.MOUNTING, Phase.SERVING}),
    Phase.FAILED: frozenset({Phase.MOUNTING}),
    Phase.STOPPED: frozenset(),
}


class IllegalTransition(RuntimeError):
    """A phase change that the state machine does not allow: always a bug in quickthaw."""

    code = "illegal-phase-transition"


@dataclass(frozen=True)
class Span:
    """One finished phase of a start: name, begin (seconds since the start began), duration (seconds)."""

    phase: Phase
    at_s: float
    took_s: float


@dataclass(frozen=True)
class Work:
    """Something done beside the phases of a start: name, begin (seconds since the start began), duration (seconds)."""

    name: str
    at_s: float
    took_s: float

    @property
    def until_s(self) -> float:
        """Return when it ended, in seconds since the start began."""
        return self.at_s + self.took_s

    def beside(self, other: Work) -> float:
        """Return for how many seconds both were done at once."""
        return max(0.0, min(self.until_s, other.until_s) - max(self.at_s, other.at_s))


@dataclass
class PhaseTracker:
    """The current phase of one replica and the timeline of its current start.

    Listeners run in the thread that makes the transition, with (old, new, reason); they must not block.
    """

    clock: Callable[[], float] = time.monotonic
    phase: Phase = Phase.IDLE
    reason: str = ""
    _since: float = field(default=0.0)
    _began: float = field(default=0.0)
    _spans: list[Span] = field(default_factory=list)
    _work: list[Work] = field(default_factory=list)
    _listeners: list[Callable[[Phase, Phase, str], None]] = field(default_factory=list)
    _moving: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._since = self._began = self.clock()

    def listen(self, listener: Callable[[Phase, Phase, str], None]) -> None:
        """Call `listener(old, new, reason)` at every later transition."""
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[Phase, Phase, str], None]) -> None:
        """Remove a listener."""
        self._listeners.remove(listener)

    def to(self, phase: Phase, reason: str = "") -> None:
        """Move to `phase`. `reason` explains a transition that is not obvious (a failure's code and message).

        Raises IllegalTransition (illegal-phase-transition) when the state machine has no such edge.
        """
        with self._moving:
            old = self._moved(phase, reason)
        for listener in tuple(self._listeners):
            listener(old, phase, reason)

    def _moved(self, phase: Phase, reason: str) -> Phase:
        """Validate and make the transition; return the previous phase."""
        old, now = self.phase, self.clock()
        if phase not in (Phase.FAILED, Phase.STOPPED) and phase not in _NEXT[old]:
            raise IllegalTransition(f"no transition from {old} to {phase}")
        if old is Phase.STOPPED and phase is not Phase.STOPPED:
            raise IllegalTransition(f"no transition from {old} to {phase}")
        if (phase is Phase.MOUNTING and old is not Phase.FAILED) or old in (Phase.ASLEEP, Phase.STANDBY):
            self._spans, self._work, self._began = [], [], now
        elif old not in (Phase.IDLE, Phase.SERVING, Phase.SUSPECT):
            self._spans.append(Span(old, self._since - self._began, now - self._since))
        self.phase, self.reason, self._since = phase, reason, now
        return old

    @property
    def seconds_in_phase(self) -> float:
        """Return how long the replica has been in its current phase, in seconds."""
        return self.clock() - self._since

    @property
    def timeline(self) -> tuple[Span, ...]:
        """Return the finished phases of the current start, in order. A failed restore and the cold start after it are one start."""
        return tuple(self._spans)

    def worked(self, name: str, began: float, ended: float) -> None:
        """Note what was done between two moments of the clock, beside the phases of the current start."""
        self._work.append(Work(name, began - self._began, ended - began))

    @property
    def work(self) -> tuple[Work, ...]:
        """Return what was done in the current start, as far as it was noted: parts of a restore that overlap."""
        return tuple(self._work)
