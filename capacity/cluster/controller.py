"""One round of `--apply kubernetes`: observe, plan on what was observed, and write what may change now.

Nothing is written without the Lease, on half an observation, or on one that is older than `stale_s`. Every write is absolute and
bound to what was observed, so a round that ends in the middle (SIGTERM, an outage) leaves the cluster between two plans,
and the next round goes on from what is there.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from capacity.cluster.api import Api
from capacity.cluster.demand import Proxies
from capacity.cluster.lease import Leadership
from capacity.cluster.moves import Move, moves, wanted
from capacity.cluster.observe import Observation, Observer, with_demand
from capacity.errors import CapacityError

if TYPE_CHECKING:
    from capacity.model import Problem
    from capacity.optimize.plan import Plan

_LEAST_STALE_S = 30.0
_LEASE_LIMIT_S = 20.0
_FATAL = ("apply-interrupted", "cluster-unreachable", "cluster-unauthorized", "lease-lost")
"""After these the rest of a round is not tried."""


@dataclass(frozen=True)
class Settings:
    """`way`: pause-pods or capacity-buffer. `nodes`: count the nodes, because no command observes them."""

    namespace: str
    way: str
    demand: tuple[str, ...]
    window_s: float
    interval_s: float
    nodes: bool


@dataclass(frozen=True)
class Done:
    """What a round wrote, what it held back (by target: the gate), and what went wrong."""

    moved: tuple[Move, ...]
    blocked: dict[str, str]
    errors: tuple[CapacityError, ...] = ()


class Controller:
    """The cluster's side of the `--watch` loop."""

    def __init__(self, api: Api, leadership: Leadership, settings: Settings, stop: threading.Event) -> None:
        self.api, self.leadership, self.settings, self._stop = api, leadership, settings, stop
        proxies = Proxies(settings.demand, settings.window_s) if settings.demand else None
        self.observer = Observer(
            api, proxies=proxies, namespace=settings.namespace, way=settings.way, nodes=settings.nodes
        )
        self._fewer_since: dict[str, float] = {}
        """Since when fewer replicas are wanted, by object; begins anew with each time of holding the Lease."""
        self.stale_s = max(_LEAST_STALE_S, 2 * settings.interval_s)
        api.guard = self._guard
        leadership.start()

    @classmethod
    def from_environment(cls, file: Path, settings: Settings, stop: threading.Event) -> Controller:
        """Connect as the environment says; the Lease has the name of the plan's file. Raises CapacityError."""
        word = re.sub(r"[^a-z0-9]+", "-", file.stem.lower()).strip("-")[:40].strip("-") or "plan"
        api = Api.from_environment(stop)
        # Its thread has a connection of its own, and gives the Lease up after `stop`.
        leadership = Leadership(Api.from_environment(threading.Event()), settings.namespace, f"quickthaw-plan-{word}")
        return cls(api, leadership, settings, stop)

    def _guard(self) -> None:
        if self._stop.is_set():
            raise CapacityError("apply-interrupted", "the plan is stopping; the rest was not written")
        self.leadership.check()

    def wait_for_lease(self) -> bool:
        """Return True if this process holds the Lease, False if another one does. Raises CapacityError if it cannot be had."""
        lease, until = self.leadership, time.monotonic() + _LEASE_LIMIT_S
        while not lease.asked.wait(0.1) and not self._stop.is_set() and time.monotonic() < until:
            pass
        if lease.leading:
            return True
        self._fewer_since.clear()
        if lease.error is not None:
            raise lease.error
        return False

    def observe(self, problem: Problem) -> tuple[Observation, Problem]:
        """Look at the cluster; return that, and the problem with the demand that proxies see. Raises CapacityError."""
        seen = self.observer.observe(problem)
        return seen, with_demand(problem, seen.rates)

    def refused(self, problem: Problem, seen: Observation) -> dict[str, list[int]]:
        """Return the pools that get no more instances: [asked, got]."""
        return self.observer.refused(problem, seen)

    def apply(self, plan: Plan, seen: Observation, *, short: bool) -> Done:
        """Write what may change now. `short`: the plan leaves demand without capacity. Raises CapacityError (observation-stale)."""
        wants = wanted(plan, self.settings.namespace, self.settings.way)
        hold_down = plan.problem.policy.hysteresis.hold_down
        changes, blocked = moves(wants, seen, self._fewer_since, time.monotonic(), hold_down=hold_down, short=short)
        if changes and (age := time.monotonic() - seen.at) > self.stale_s:
            text = f"what was observed is {age:.0f} s old, over {self.stale_s:.0f} s: nothing is written; give a shorter --limit"
            raise CapacityError("observation-stale", text)
        moved: list[Move] = []
        errors: list[CapacityError] = []
        for move in changes:
            try:
                self._guard()
                self.api.set_scale(move.target, move.before, move.after)
            except CapacityError as error:
                errors.append(error)
                if error.code in _FATAL:
                    break
                continue
            moved.append(move)
            if move.after < move.before:  # what is still too many waits anew
                self._fewer_since.pop(str(move.target), None)
        return Done(tuple(moved), blocked, tuple(errors))

    def close(self) -> None:
        """Give the Lease up and close all connections."""
        self.leadership.close()
        self.api.close()
