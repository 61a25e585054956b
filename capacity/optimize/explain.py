"""Explain infeasibility: an irreducible set of conflicting constraints, in the file's names, and the nearest feasible change.

Starts with the constraints in the Farkas certificate of an elastic program (Chinneck 2008), in which every constraint of the
file may be violated at a price, and leaves out one after the other while the rest still conflict (deletion filter). HiGHS'
own IIS is not used: it knows rows, of which a constraint of the file has one per step and zone, and no integers. On timeout
the conflict may contain more than is needed, and is marked as such.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from capacity.errors import Change, Conflict, InfeasibleError, SolverError
from capacity.model import Floats, Problem
from capacity.optimize import highs
from capacity.optimize.program import Ints, Name, Program

TOLERANCE = 1e-6
LIMIT = 15.0
# Constraints that people change first. The rest (demand, idle GPUs, zones, minimum) is the purpose of the plan.
MOVABLE = frozenset(
    ("quota", "pool-quota", "supply", "start-limit", "stop-limit", "maximum", "region-min", "region-max")
)
# Order in which the deletion filter leaves constraints out; all others come first.
ORDER = {**dict.fromkeys(MOVABLE, 2), "supply": 1, "quota": 3, "demand": 4}
FIXED = frozenset(("capacity", "flow", "blocks"))


@dataclass(frozen=True)
class _Elastic:
    """The whole program as one step, with a slack for each row of a named constraint."""

    program: Program
    names: tuple[Name, ...]
    owner: Ints  # [slack] index into names
    step: Ints  # [slack] step, from 0
    columns: int  # before the slacks
    weight: Floats  # [slack]


def infeasible(problem: Problem, program: Program, *, integers: bool, limit: float = LIMIT) -> InfeasibleError:
    """Return the error to raise for a program without a solution.

    `limit` in seconds, for each of conflict and nearest change.
    """
    deadline = time.perf_counter() + limit
    elastic = _elastic(program)
    names, smallest = _conflict(elastic, integers, deadline)
    changes = _nearest(problem, elastic, deadline + limit)
    return InfeasibleError(Conflict(tuple(elastic.names[n].text for n in names), smallest, changes))


def _elastic(program: Program) -> _Elastic:
    steps, high, wide = program.steps, program.rows, program.columns
    names: dict[tuple[str, str], int] = {}
    listed: list[Name] = []

    def number(name: Name) -> int:
        key = (name.sort, name.key)
        if key not in names:
            names[key] = len(listed)
            listed.append(name)
        return names[key]

    row, col, val = [program.row], [program.col], [program.val]
    lower, upper = [program.row_lower], [program.row_upper]
    owner: list[int] = []
    at_step: list[int] = []
    weight: list[float] = []
    next_column, next_row = steps * wide, steps * high

    def slack(at_row: int, sign: float, name: Name, scale: float, t: int) -> None:
        nonlocal next_column
        row.append(np.array([at_row]))
        col.append(np.array([next_column]))
        val.append(np.array([sign]))
        owner.append(number(name))
        at_step.append(t)
        weight.append(1.0 / max(1.0, abs(scale)))
        next_column += 1

    for index, name in enumerate(program.row_names):
        if name.sort in FIXED:
            continue
        for t in range(steps):
            at = t * high + index
            low, top = program.row_lower[at], program.row_upper[at]
            if np.isfinite(low):
                slack(at, 1.0, name, low, t)
            if np.isfinite(top):
                slack(at, -1.0, name, top, t)
    column_upper = program.upper.copy()
    for index, name in program.column_names.items():
        for t in range(steps):
            at = t * wide + index
            bound = program.upper[at]
            if not np.isfinite(bound):
                continue
            row.append(np.array([next_row]))
            col.append(np.array([at]))
            val.append(np.array([1.0]))
            lower.append(np.array([-np.inf]))
            upper.append(np.array([bound]))
            slack(next_row, -1.0, name, bound, t)
            column_upper[at] = np.inf
            next_row += 1
    slacks = len(owner)
    flat = replace(
        program,
        steps=1,
        columns=next_column,
        rows=next_row,
        row=np.concatenate(row),
        col=np.concatenate(col),
        val=np.concatenate(val),
        row_lower=np.concatenate(lower),
        row_upper=np.concatenate(upper),
        lower=np.concatenate([program.lower, np.zeros(slacks)]),
        upper=np.concatenate([column_upper, np.full(slacks, np.inf)]),
        cost=np.concatenate([np.zeros(steps * wide), np.array(weight)]),
        integer=np.concatenate([program.integer, np.zeros(slacks, dtype=np.bool_)]),
    )
    return _Elastic(
        program=flat,
        names=tuple(listed),
        owner=np.array(owner, dtype=np.int64),
        step=np.array(at_step, dtype=np.int64),
        columns=steps * wide,
        weight=np.array(weight),
    )


def _solve(elastic: _Elastic, hard: set[int], deadline: float, *, integers: bool) -> highs.Outcome:
    """Find the cheapest violation in which the constraints in `hard` hold.

    Raises SolverError when out of time.
    """
    left = deadline - time.perf_counter()
    if left <= 0:
        raise SolverError("solver-gave-up", "no time left")
    closed = np.isin(elastic.owner, np.array(sorted(hard), dtype=np.int64))
    upper = elastic.program.upper.copy()
    upper[elastic.columns :][closed] = 0.0
    part = replace(elastic.program, upper=upper)
    return highs.run(highs.load(part, integers=integers, limit=left), integers=integers)


def _conflict(elastic: _Elastic, integers: bool, deadline: float) -> tuple[list[int], bool]:
    """Return named constraints that conflict, and whether none of them can be left out; False if time ran out."""
    names = list(range(len(elastic.names)))
    try:
        first = _solve(elastic, set(), deadline, integers=False)
        if first.values is not None and first.row_dual is not None and first.objective > TOLERANCE:
            names = _certificate(elastic, first.row_dual)
        # Demand is tried last, so that the conflict names it rather than what follows from it.
        for name in sorted(names, key=lambda n: (ORDER.get(elastic.names[n].sort, 0), n)):
            rest = set(names) - {name}
            if _solve(elastic, rest, deadline, integers=integers).values is None:
                names = sorted(rest)
    except SolverError:
        return names, False
    return names, True


def _certificate(elastic: _Elastic, duals: Floats) -> list[int]:
    """Return the named constraints with a multiplier in the Farkas proof of infeasibility."""
    mask = elastic.program.col >= elastic.columns
    row_of = np.zeros(len(elastic.owner), dtype=np.int64)
    row_of[elastic.program.col[mask] - elastic.columns] = elastic.program.row[mask]
    used = np.abs(duals[row_of]) > 1e-9
    return sorted({int(name) for name in elastic.owner[used]})


def _nearest(problem: Problem, elastic: _Elastic, deadline: float) -> tuple[Change, ...]:
    """Return the cheapest integer violation: of movable constraints if that suffices, else of any."""
    kept = {n for n, name in enumerate(elastic.names) if name.sort not in MOVABLE}
    outcome: highs.Outcome | None = None
    for hard in (kept, set()):
        for integers in (True, False):
            try:
                outcome = _solve(elastic, hard, deadline, integers=integers)
            except SolverError:
                continue
            break
        if outcome is not None and outcome.values is not None:
            break
    if outcome is None or outcome.values is None:
        return ()
    slacks = outcome.values[elastic.columns :]
    most: dict[int, tuple[float, int]] = {}
    for k in np.flatnonzero(slacks > TOLERANCE):
        name, t = int(elastic.owner[k]), int(elastic.step[k])
        if name not in most or float(slacks[k]) > most[name][0] + TOLERANCE:
            most[name] = float(slacks[k]), t
    table = outcome.values[: elastic.columns].reshape(problem.demand.steps, -1)
    changes = []
    for n, (amount, t) in sorted(most.items()):
        change = _change(problem, elastic.names[n], amount, t, table)
        changes.append(replace(change, step=t + 1) if problem.demand.steps > 1 else change)
    return tuple(changes)


def _change(problem: Problem, name: Name, amount: float, t: int, table: Floats) -> Change:
    """Describe one change.

    `amount` is missing at step `t`, the worst one; `table` is a solution as [step, column].
    """
    up = float(math.ceil(amount - TOLERANCE))
    pools = {pool.name: pool for pool in problem.pools}
    services = {service.name: service for service in problem.services}
    policy = problem.policy
    if name.sort == "pool-quota":
        now = float(pools[name.key].quota or 0)
        return Change(f"pools {name.key} quota", now, now + up, "instances")
    if name.sort == "supply":
        now = pools[name.key].start_bound(t == 0)
        refused = now < pools[name.key].start_bound(False)
        return Change(f"pools {name.key} {'refused got' if refused else 'supply'}", now, now + up, "instances a step")
    if name.sort == "quota":
        now = float(next(quota.gpus for quota in problem.quotas if quota.name == name.key))
        return Change(f"quotas {name.key} gpus", now, now + up, "GPUs")
    if name.sort == "start-limit":
        return Change(
            "policy max_start", float(policy.max_start or 0), (policy.max_start or 0) + up, "instances a step"
        )
    if name.sort == "stop-limit":
        return Change("policy max_stop", float(policy.max_stop or 0), (policy.max_stop or 0) + up, "instances a step")
    if name.sort in ("maximum", "minimum"):
        service = services[name.key]
        if name.sort == "maximum":
            return Change(f"services {name.key} max", service.maximum or 0, (service.maximum or 0) + up, "replicas")
        return Change(f"services {name.key} min", service.minimum, service.minimum - up, "replicas")
    if name.sort in ("region-min", "region-max"):
        share = policy.region_mix[name.key]
        gpus = np.array([pool.gpus for pool in problem.pools], dtype=np.float64)
        here = np.array([pool.region == name.key for pool in problem.pools], dtype=np.float64)
        held = table[:, : len(gpus)] * gpus
        shares = [float((row * here).sum() / row.sum()) for row in held if row.sum() > 0] or [0.0]
        if name.sort == "region-min":
            return Change(f"policy region_mix {name.key} min", share.least, math.floor(min(shares) * 1000) / 1000, "")
        return Change(f"policy region_mix {name.key} max", share.most, math.ceil(max(shares) * 1000) / 1000, "")
    if name.sort == "demand":
        return Change(
            f"demand of {name.key}, at its worst step, served", 0.0, -amount, services[name.key].unit + "/s less"
        )
    if name.sort == "zones":
        return Change(f"{name.key} served on the loss of a zone", 0.0, -amount, services[name.key].unit + "/s less")
    return Change(name.text, 0.0, -amount, "GPUs less")
