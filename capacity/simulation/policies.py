"""Simulated policies: no buffer, a fixed buffer, a reactive autoscaler, and the linear program.

A policy sees only the current fleet and the past demand (`Past`). The reactive autoscaler follows the documented rules of
Kubernetes' HorizontalPodAutoscaler: desired = ceil(current * metric / target), a tolerance of 10 %, a decision every 15 s,
scaling up by at most the larger of 100 % and 4 per decision, scaling down to the largest desired count of the last 300 s;
unready replicas count as using nothing. Its metric is the work that arrived per second over the last minute. Instances
start and stop with the replicas at once, which favours it: the cluster autoscaler waits ten minutes by default before it
removes one.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

from capacity.errors import InfeasibleError
from capacity.inputs.trace import rolling_mean
from capacity.model import Demand, Floats, Forecast, History, Kind, Problem
from capacity.optimize import plan
from capacity.simulation.fleet import Fleet

BIN = 15.0
MINUTE = 4  # bins
DRAIN = 60.0  # seconds to serve the waiting requests, for policies that know no lead time
HISTORY_S = 8 * 3600.0


class Past:
    """Rates of each service in whole bins; shows only bins that have ended."""

    def __init__(self, rates: Floats, bin_seconds: float = BIN) -> None:
        self._rates = rates
        self.bin_seconds = bin_seconds
        self._levels = rolling_mean(rates, MINUTE)

    def until(self, now: float) -> tuple[Floats, Floats]:
        """Return rates and levels (the mean of the last minute) up to `now`: [service, bin]."""
        end = int(now / self.bin_seconds + 1e-9)
        start = max(0, end - int(HISTORY_S / self.bin_seconds))
        return self._rates[:, start:end], self._levels[:, start:end]


class Autoscaler:
    """Base of all policies: scales replicas to a desired count, and instances to the replicas and an idle buffer."""

    name = ""
    kind: Kind = "cold"
    ladder = False  # drained replicas go to standby
    interval: float | None = 15.0  # seconds between decisions
    buffer = 0  # replicas of each service for which idle GPUs are held

    def __post_init__(self) -> None:
        self.next = 0.0
        self.recent_desired: list[deque[tuple[float, int]]] = []  # [service]

    def due(self, now: float, interval: float) -> bool:
        """Return whether the next decision is due; if so, schedule the one after it."""
        if now < self.next - 1e-9:
            return False
        self.next = now + interval
        return True

    def tick(self, fleet: Fleet, past: Past) -> None:
        """Decide, if a decision is due."""
        if not self.due(fleet.now, self.interval or 0.0):
            return
        self.recent_desired = self.recent_desired or [deque() for _ in fleet.problem.services]
        for j in range(len(fleet.problem.services)):
            self.set_replicas(fleet, j, self.desired(fleet, past, j), start_instances=True)
        self.set_buffer(fleet, [self.buffer] * len(fleet.problem.services))

    def desired(self, fleet: Fleet, past: Past, j: int) -> int:
        """Return the replicas wanted of a service."""
        raise NotImplementedError

    @staticmethod
    def set_replicas(fleet: Fleet, j: int, desired: int, *, start_instances: bool) -> None:
        service = fleet.problem.services[j]
        desired = max(desired, service.minimum)
        if service.maximum is not None:
            desired = min(desired, service.maximum)
        while len(fleet.replicas[j]) > desired:
            fleet.stop_replica(j)
        while len(fleet.replicas[j]) < desired:
            if fleet.start_replica(j):
                continue
            if not start_instances:
                return
            if not any(
                fleet.start_instances(i, -(-fleet.width[i][j] // fleet.problem.pools[i].gpus))
                for i in fleet.cheapest[j]
            ):
                return
            if not fleet.start_replica(j):
                return  # granted fewer instances than the replica spans

    @staticmethod
    def set_buffer(fleet: Fleet, blocks: list[int]) -> None:
        """Keep idle instances for `blocks[service]` more replicas; stop empty instances beyond that."""
        needed: dict[int, int] = {}
        for j, count in enumerate(blocks):
            i = fleet.cheapest[j][0]
            needed[i] = needed.get(i, 0) + count * fleet.width[i][j]
        for i, pool in enumerate(fleet.problem.pools):
            free = sum(instance.free for instance in fleet.instances[i])
            lacking = needed.get(i, 0) - free
            if lacking > 0:
                fleet.start_instances(i, -(-lacking // pool.gpus))
            else:
                empty = sum(not instance.replicas for instance in fleet.instances[i])
                fleet.stop_empty(i, min(empty, -lacking // pool.gpus))


def rate_of(fleet: Fleet, j: int) -> float:
    """Return the rate of a replica of a service where it is cheapest."""
    return fleet.problem.services[j].rate_on(fleet.problem.pools[fleet.cheapest[j][0]].gpu) or 1.0


def wanted(fleet: Fleet, past: Past, j: int, share: float) -> float:
    """Return the replicas needed for the last minute's work and the waiting requests at a utilization of `share`."""
    _, levels = past.until(fleet.now)
    level = float(levels[j, -1]) if levels.shape[1] else 0.0
    _, work = fleet.waiting(j)
    return (level / share + work / max(fleet.problem.services[j].target_wait, DRAIN)) / rate_of(fleet, j)


def largest(seen: deque[tuple[float, int]], now: float, want: int, hold: float) -> int:
    """Add a desired count, drop those older than `hold` seconds, and return the largest that is left."""
    seen.append((now, want))
    while seen[0][0] < now - hold:
        seen.popleft()
    return max(w for _, w in seen)


@dataclass
class Buffered(Autoscaler):
    """Follows demand every 15 s and holds idle GPUs for `buffer` more replicas per service; 0 is no buffer."""

    name: str = "none"
    kind: Kind = "cold"
    buffer: int = 0
    utilization: float = 0.8
    hold: float = 60.0

    def desired(self, fleet: Fleet, past: Past, j: int) -> int:
        desired = math.ceil(wanted(fleet, past, j, self.utilization) - 1e-9)
        return largest(self.recent_desired[j], fleet.now, desired, self.hold)


@dataclass
class Hpa(Autoscaler):
    """Kubernetes' HorizontalPodAutoscaler with its defaults; `target` is the desired average utilization."""

    name: str = "hpa"
    kind: Kind = "cold"
    target: float = 0.7
    tolerance: float = 0.1
    stabilization: float = 300.0
    most_pods: int = 4
    most_share: float = 1.0

    def desired(self, fleet: Fleet, past: Past, j: int) -> int:
        rates, _ = past.until(fleet.now)
        current = len(fleet.replicas[j])
        load = float(rates[j, -MINUTE:].mean()) if rates.shape[1] else 0.0
        ready = sum(r.ready <= fleet.now for r in fleet.replicas[j])
        desired = self._desired_replicas(current, ready, load / rate_of(fleet, j))
        recent = largest(self.recent_desired[j], fleet.now, desired, self.stabilization)
        return desired if desired >= current else min(current, recent)

    def _desired_replicas(self, current: int, ready: int, load: float) -> int:
        """Return the desired replicas; `load` is in replicas at full rate."""
        if current == 0:
            return 1 if load > 0 else 0
        ratio = load / max(1, ready) / self.target
        if abs(ratio - 1) <= self.tolerance:
            return current
        if ratio > 1 and ready < current:
            # Unready replicas count as using nothing when scaling up; if that flips the direction, do not scale.
            ratio = load / current / self.target
            if ratio <= 1 + self.tolerance:
                return current
            desired = math.ceil(ratio * current - 1e-9)
        else:
            desired = math.ceil(ratio * max(1, ready) - 1e-9)
        most = max(current + self.most_pods, math.ceil(current * (1 + self.most_share)))
        return max(1, min(desired, most))


@dataclass
class Program(Autoscaler):
    """Solves the linear program on an interval, with hysteresis on stops, and starts replicas on idle GPUs in between."""

    name: str = "lp-restored"
    kind: Kind = "restored"
    interval: float | None = None  # None: 15 s; 30 s for traces of over three hours
    nearest: float = 0.3
    probability: float | None = None
    target_wait: float | None = None
    headroom: float | None = None
    ladder: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.every = 15.0
        self.instances: list[deque[tuple[float, int]]] = []
        self.replicas: list[deque[tuple[float, int]]] = []

    def tick(self, fleet: Fleet, past: Past) -> None:
        self.every = self.interval or (15.0 if fleet.last <= 3 * 3600 else 30.0)
        if self.due(fleet.now, self.every):
            self._plan(fleet, past)
        self._wake(fleet, past)

    def _plan(self, fleet: Fleet, past: Past) -> None:
        problem = fleet.problem
        rates, levels = past.until(fleet.now)
        self.instances = self.instances or [deque() for _ in problem.pools]
        self.replicas = self.replicas or [deque() for _ in problem.services]
        if not rates.shape[1]:
            return
        solved = self._solve(self._problem(fleet, rates, levels, past.bin_seconds))
        hold = problem.policy.hysteresis.hold_down
        for i, seen in enumerate(self.instances):
            held = len(fleet.instances[i])
            # Infeasible: take all there is, because the demand exceeds what the file allows.
            want = held + fleet.room(i) if solved is None else int(solved.instances[0, i])
            want = largest(seen, fleet.now, want, hold)
            if want > held:
                bound = problem.pools[i].start_bound(False)
                fleet.start_instances(i, int(min(want - held, bound)))
        for j, seen in enumerate(self.replicas):
            want = 10**6 if solved is None else int(solved.replicas[0, :, j].sum())
            want = largest(seen, fleet.now, want, hold)
            self.set_replicas(fleet, j, want, start_instances=False)
        for i, seen in enumerate(self.instances):
            extra = len(fleet.instances[i]) - max(w for _, w in seen)
            if extra > 0:
                fleet.stop_empty(i, extra)

    def _problem(self, fleet: Fleet, rates: Floats, levels: Floats, width: float) -> Problem:
        problem = fleet.problem
        services = problem.services
        if self.probability is not None:
            services = tuple(replace(s, probability=self.probability) for s in services)
        if self.target_wait is not None:
            services = tuple(replace(s, target_wait=self.target_wait) for s in services)
        policy = problem.policy if self.headroom is None else replace(problem.policy, headroom=self.headroom)
        forecasts = {}
        for j, service in enumerate(services):
            _, work = fleet.waiting(j)
            level = float(levels[j, -1]) + work / max(service.target_wait, self.every)
            mean = float(rates[j, -MINUTE:].mean())
            forecasts[service.name] = Forecast((0.5, 0.9), ((min(mean, level),), (level,)))
        pools = tuple(
            replace(pool, held=len(fleet.instances[i]), refused=fleet.refused.pop(i, None))
            for i, pool in enumerate(problem.pools)
        )
        history = History(width, rates, levels, self.nearest)
        demand = Demand(0.9, forecasts, history)
        return replace(problem, pools=pools, services=services, demand=demand, policy=policy, step_seconds=self.every)

    def _solve(self, problem: Problem) -> plan.Plan | None:
        try:
            return plan.solve(problem, self.kind, quick=True, explained=False)
        except InfeasibleError:
            return None

    def _wake(self, fleet: Fleet, past: Past) -> None:
        """Start a replica on an idle GPU at once, as the proxy does for a held request."""
        for j, service in enumerate(fleet.problem.services):
            count, work = fleet.waiting(j)
            if not count:
                continue
            live = len(fleet.replicas[j])
            rate = rate_of(fleet, j)
            patience = self.target_wait if self.target_wait is not None else service.target_wait
            drain = max(patience, 1.0)
            if work / (max(1, live) * rate) <= drain and live:
                continue
            _, levels = past.until(fleet.now)
            level = float(levels[j, -1]) if levels.shape[1] else 0.0
            desired = min(math.ceil((level + work / drain) / rate), live + math.ceil(work / (rate * drain)))
            if service.maximum is not None:
                desired = min(desired, service.maximum)
            while len(fleet.replicas[j]) < max(desired, 1):
                if not fleet.start_replica(j):
                    break
