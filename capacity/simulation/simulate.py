"""Replay a trace against several policies and compare their waits and costs.

Deterministic for a seed. Supply failures (a refused start) and interruptions (a multiple of each pool's rate) are injected.
Every policy gets the same trace, fleet and start: one replica per service (or its minimum) running at time zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from capacity.inputs import trace as traces
from capacity.inputs.trace import Trace
from capacity.model import KINDS, Floats, Problem
from capacity.simulation.fleet import NEVER, Fleet
from capacity.simulation.policies import BIN, Autoscaler, Buffered, Hpa, Past, Program

WAITED = 0.1  # seconds from which a request counts as having waited
SAMPLE = 15.0  # seconds between samples for the plot
AFTER = 3600.0  # seconds after the last arrival within which all must be served


@dataclass(frozen=True)
class Options:
    """Options of a simulation run.

    `refusals`: probability that a start is refused. `interruptions`: multiple of the pools' rates.
    """

    seed: int = 1
    refusals: float = 0.0
    interruptions: float = 1.0
    memory_price: float = 0.0  # dollars per GiB and hour of host memory in standby


@dataclass
class Series:
    """Samples for the plot: ready replicas, held GPUs, idle GPUs."""

    at: list[float] = field(default_factory=list)
    replicas: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    idle: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """Result of a policy in seconds, dollars and GPU-hours.

    `waited`: requests that waited at all; `late`: those that waited longer than their service's target wait, which is what a
    plan holds down. `unserved` requests count with their waiting time at the end of the run.
    """

    policy: str
    requests: int
    waited: int
    late: int
    unserved: int
    p50: float
    p99: float
    longest: float
    gpu_hours: float
    cost: float
    utilization: float
    actions: int
    starts: dict[str, int]  # by rung: standby, restored (asleep) or cold
    standby_gib_hours: float
    series: Series
    waits: Floats
    arrivals: Floats


def default_policies(problem: Problem, fixed: int = 1) -> list[Autoscaler]:
    """Return the policies that are compared; with the ladder of sleep if a service has a standby."""
    policies: list[Autoscaler] = [
        Buffered(name="no buffer"),
        Buffered(name=f"fixed buffer {fixed}", buffer=fixed),
        Hpa(),
        Program(name="lp cold", kind="cold"),
        Program(name="lp restored", kind="restored"),
    ]
    return policies + ([Program(name="lp ladder", ladder=True)] if any(s.standby for s in problem.services) else [])


def sweep(problem: Problem, trace: Trace, options: Options, policy: Program, longest: float) -> list[Result]:
    """Return the results of `policy` over a grid of target waits up to `longest` seconds, probabilities and hold-downs."""
    results = []
    for hold in HOLDS:
        hysteresis = replace(problem.policy.hysteresis, hold_down=hold)
        changed = replace(problem, policy=replace(problem.policy, hysteresis=hysteresis))
        for wait in sorted({2.0, *(round(max(2.0, longest * share), 1) for share in WAITS)}):
            for level in LEVELS:
                name = f"{policy.name}, wait {wait:.0f} s, probability {level:g}, hold {hold:.0f} s"
                setting = replace(policy, name=name, target_wait=wait, probability=level)
                results.append(run(changed, trace, setting, options))
    return results


# The grid of a sweep: hold-downs in seconds, target waits as shares of the longest, probabilities; and the autoscaler's targets.
HOLDS, WAITS, LEVELS = (30.0, 300.0), (0.25, 0.5, 1.0), (0.5, 0.9)
TARGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FRONTIER = ("autoscaler cold", "autoscaler restored", "plan")


def frontier(problem: Problem, trace: Trace, options: Options) -> list[Result]:
    """Return what each of FRONTIER can reach, wait against cost: the autoscaler at several targets, the plan over a grid."""
    found = []
    for kind in KINDS:
        for target in TARGETS:
            policy = Hpa(name=f"autoscaler {kind}, target {target:.0%}", kind=kind, target=target)
            found.append(run(problem, trace, policy, options))
    longest = max(r.p99 for r in found)
    ladder = any(s.standby for s in problem.services)
    return found + sweep(problem, trace, options, Program(name="plan", ladder=ladder), longest)


def settings_of(results: list[Result], name: str) -> list[Result]:
    """Return the results of one of FRONTIER at all of its settings."""
    return [r for r in results if r.policy.split(",")[0] == name]


def pareto(results: list[Result], value: str) -> list[Result]:
    """Return the results that none undercuts in both cost and `value` ("p50", "p99"), the cheapest first."""
    best: list[Result] = []
    for result in sorted(results, key=lambda r: (r.cost, getattr(r, value))):
        if not best or getattr(result, value) < getattr(best[-1], value):
            best.append(result)
    return best


def pareto_of_each(results: list[Result]) -> list[Result]:
    """Return, of each of FRONTIER, the results that none of its own undercuts in both cost and p99 wait."""
    return [best for name in FRONTIER for best in pareto(settings_of(results, name), "p99")]


def run(problem: Problem, trace: Trace, policy: Autoscaler, options: Options) -> Result:
    """Run one policy over the whole trace."""
    arrivals = trace.arrivals(problem.services)
    end = trace.seconds
    wake = 1.0 if end <= 3 * 3600 else 5.0  # seconds per tick
    rates = np.array([traces.rates(at, work, BIN, end + BIN) for at, work in arrivals])
    quiet = np.zeros((len(rates), math.ceil(AFTER / BIN) + 1))
    past = Past(np.concatenate([rates, quiet], axis=1))
    fleet = Fleet(
        problem,
        arrivals,
        policy.kind,
        seed=options.seed,
        refusals=options.refusals,
        interruptions=options.interruptions,
        ladder=policy.ladder,
    )
    _begin(fleet)
    series = Series()
    ticks = math.ceil((end + AFTER) / wake)
    every = round(SAMPLE / wake)
    for tick in range(ticks):
        policy.tick(fleet, past)
        if tick % every == 0:
            _sample(fleet, series)
        fleet.advance((tick + 1) * wake)
        if fleet.now > end and fleet.done:
            break
    fleet.finish()
    return _result(policy.name, fleet, series, options)


def _begin(fleet: Fleet) -> None:
    for j, service in enumerate(fleet.problem.services):
        for _ in range(max(1, service.minimum)):
            if not fleet.start_replica(j, warm=True):
                i = fleet.cheapest[j][0]
                fleet.start_instances(i, -(-fleet.width[i][j] // fleet.problem.pools[i].gpus), booted=True)
                fleet.start_replica(j, warm=True)


def _sample(fleet: Fleet, series: Series) -> None:
    series.at.append(fleet.now)
    series.replicas.append(sum(r.ready <= fleet.now for live in fleet.replicas for r in live))
    series.held.append(fleet.held_gpus())
    series.idle.append(fleet.idle_gpus())


def _result(name: str, fleet: Fleet, series: Series, options: Options) -> Result:
    arrived = np.concatenate([np.array(queue.at) for queue in fleet.queues])
    waits = np.concatenate([queue.waits for queue in fleet.queues])
    never = waits == NEVER
    waits = np.where(never, fleet.now - arrived, waits)
    targets = np.concatenate(
        [np.full(len(queue.at), s.target_wait) for queue, s in zip(fleet.queues, fleet.problem.services, strict=True)]
    )
    busy = sum(queue.busy_gpu_seconds for queue in fleet.queues)
    return Result(
        policy=name,
        requests=len(waits),
        waited=int((waits > WAITED).sum()),
        late=int((waits > targets + WAITED).sum()),
        unserved=int(never.sum()),
        p50=float(np.quantile(waits, 0.5)),
        p99=float(np.quantile(waits, 0.99)),
        longest=float(waits.max()),
        gpu_hours=fleet.paid_gpu_seconds / 3600,
        cost=fleet.cost + fleet.standby_gib_seconds / 3600 * options.memory_price,
        utilization=busy / fleet.paid_gpu_seconds if fleet.paid_gpu_seconds else 0.0,
        actions=fleet.actions,
        starts=fleet.starts,
        standby_gib_hours=fleet.standby_gib_seconds / 3600,
        series=series,
        waits=waits,
        arrivals=arrived,
    )
