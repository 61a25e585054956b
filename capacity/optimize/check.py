"""Check a plan against every constraint.

Written from docs/capacity.md with plain loops; shares no code with the solver. Imports only the model, takes integers, and
names each violated constraint with its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from capacity.model import Problem, slot

SLACK = 1e-6
Blocks = Sequence[dict[tuple[int, int], int]]


def violations(problem: Problem, need: Any, instances: Any, replicas: Any, blocks: Blocks) -> list[str]:
    """Return descriptions of the violated constraints; empty if the plan is valid.

    `instances[step][pool]`, `replicas[step][pool][service]` and `blocks[step][(pool, GPUs)]` are integers; `need` holds the
    requirements (requirements.Need).
    """
    found: list[str] = []
    before = [pool.held for pool in problem.pools]
    for t in range(problem.demand.steps):
        now = [int(value) for value in instances[t]]
        placed = [{j: int(value) for j, value in enumerate(row) if value} for row in _plain(replicas[t])]
        if min(now, default=0) < 0 or any(value < 0 for row in placed for value in row.values()):
            found.append(f"step {t + 1}: a negative count")
        for text in (
            _capacity(problem, now, placed, blocks[t])
            + _demand(problem, need, t, placed)
            + _idle(problem, need, t, placed, blocks[t])
            + _limits(problem, t, before, now)
            + _shares(problem, now)
            + _zones(problem, need, t, placed)
        ):
            found.append(f"step {t + 1}: {text}")
        before = now
    return found


def _over(left: float, right: float) -> bool:
    return left > right + SLACK * max(1.0, abs(left), abs(right))


def _capacity(
    problem: Problem, now: list[int], placed: list[dict[int, int]], blocks: dict[tuple[int, int], int]
) -> list[str]:
    found = []
    for i, pool in enumerate(problem.pools):
        used = sum(width * many for (where, width), many in blocks.items() if where == i)
        for j, many in placed[i].items():
            service = problem.services[j]
            if not service.fits(pool):
                found.append(f"service {service.name} does not fit pool {pool.name}")
            used += many * slot(service.gpus, pool.gpus)
        if used > pool.gpus * now[i]:
            found.append(f"pool {pool.name} holds {pool.gpus * now[i]} GPUs and {used} are used")
    return found


def _demand(problem: Problem, need: Any, t: int, placed: list[dict[int, int]]) -> list[str]:
    found = []
    rates, totals = _served(problem, placed)
    for j, service in enumerate(problem.services):
        served, total = rates[j], totals[j]
        if _over(float(need.target[j][t]), served):
            found.append(f"service {service.name} needs {need.target[j][t]:g} {service.unit}/s, {served:g} are served")
        if total < service.minimum or (service.maximum is not None and total > service.maximum):
            found.append(f"service {service.name} has {total} replicas")
    return found


def _idle(
    problem: Problem, need: Any, t: int, placed: list[dict[int, int]], blocks: dict[tuple[int, int], int]
) -> list[str]:
    found = []
    surplus = []
    for j, served in enumerate(_served(problem, placed)[0]):
        surplus.append(min(float(need.cap[j][t]), max(0.0, served - float(need.base[j][t]))))
    for group in need.groups:
        covered = sum(surplus[j] * each for j, each in group.relief.items())
        for (i, width), many in blocks.items():
            weight = group.weights.get(need.place[i])
            if weight is not None and width >= weight[0]:
                covered += many * width * weight[1]
        if _over(float(group.required[t]), covered):
            found.append(f"{group.name}: {covered:g} of {group.required[t]:g} GPUs")
    return found


def _limits(problem: Problem, t: int, before: list[int], now: list[int]) -> list[str]:
    found = []
    starts = [max(0, b - a) for a, b in zip(before, now, strict=True)]
    stops = [max(0, a - b) for a, b in zip(before, now, strict=True)]
    for i, pool in enumerate(problem.pools):
        if pool.quota is not None and now[i] > pool.quota:
            found.append(f"pool {pool.name} is over its quota of {pool.quota}")
        if starts[i] > pool.start_bound(t == 0):
            found.append(f"pool {pool.name} starts {starts[i]}, more than its supply")
    for quota in problem.quotas:
        inside = [i for i, pool in enumerate(problem.pools) if quota.covers(pool)]
        held = sum(now[i] * problem.pools[i].gpus for i in inside)
        both = sum((before[i] + starts[i]) * problem.pools[i].gpus for i in inside)
        already = sum(before[i] * problem.pools[i].gpus for i in inside)
        if held > quota.gpus or both > max(quota.gpus, already):
            found.append(f"quota {quota.name} is exceeded")
    if problem.policy.max_start is not None and sum(starts) > problem.policy.max_start:
        found.append("max_start is exceeded")
    if problem.policy.max_stop is not None and sum(stops) > problem.policy.max_stop:
        found.append("max_stop is exceeded")
    return found


def _shares(problem: Problem, now: list[int]) -> list[str]:
    found = []
    total = sum(pool.gpus * now[i] for i, pool in enumerate(problem.pools))
    for region, share in problem.policy.region_mix.items():
        here = sum(pool.gpus * now[i] for i, pool in enumerate(problem.pools) if pool.region == region)
        if _over(share.least * total, here) or _over(here, share.most * total):
            found.append(f"region_mix of {region}: {here} of {total} GPUs")
    return found


def _zones(problem: Problem, need: Any, t: int, placed: list[dict[int, int]]) -> list[str]:
    found = []
    spans: list[dict[tuple[str, str], float]] = [{} for _ in problem.services]
    alike = {(p.gpu, p.memory, p.region): p for p in problem.pools}
    fits = {key: [s.fits(p) for s in problem.services] for key, p in alike.items()}
    for i, pool in enumerate(problem.pools):
        for j, here in enumerate(fits[pool.gpu, pool.memory, pool.region]):
            if here:
                spans[j].setdefault((pool.region, pool.zone), 0.0)
        for j, many in placed[i].items():
            zone = (pool.region, pool.zone)
            spans[j][zone] = spans[j].get(zone, 0.0) + many * (problem.services[j].rate_on(pool.gpu) or 0.0)
    for j, service in enumerate(problem.services):
        by_zone = spans[j]
        if problem.policy.zone_loss > 0 and len(by_zone) > 1:
            rest = sum(by_zone.values()) - max(by_zone.values())
            if _over(problem.policy.zone_loss * float(need.typical[j][t]), rest):
                found.append(f"service {service.name} serves {rest:g} when its largest zone is lost")
    return found


def _plain(rows: Any) -> Any:
    """Convert to nested lists: looping over numpy scalars is slow."""
    return rows.tolist() if hasattr(rows, "tolist") else rows


def _served(problem: Problem, placed: list[dict[int, int]]) -> tuple[list[float], list[int]]:
    """Return the units per second and the replicas of each service."""
    rates, totals = [0.0] * len(problem.services), [0] * len(problem.services)
    for i, pool in enumerate(problem.pools):
        for j, many in placed[i].items():
            rates[j] += many * (problem.services[j].rate_on(pool.gpu) or 0.0)
            totals[j] += many
    return rates, totals
