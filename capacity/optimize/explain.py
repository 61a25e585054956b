"""Explain infeasibility: an irreducible set of conflicting constraints, in the file's names, and the nearest feasible change.

A constraint of the file is many rows and bounds of the program: one per step, zone or pool. From the constraints in HiGHS'
proof of infeasibility (from all, if they are few or only integers conflict), one after the other is left out while the rest
still conflict. The nearest change is HiGHS' feasibility relaxation. On timeout the conflict may contain more
than is needed, and is marked as such.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import highspy
import numpy as np
import numpy.typing as npt

from capacity.errors import Change, Conflict, InfeasibleError, SolverError
from capacity.model import Floats, Problem
from capacity.optimize import highs
from capacity.optimize.program import Ints, Name, Program

TOLERANCE = 1e-6
LIMIT = 15.0
FEW = 60  # constraints from which the conflict is searched one by one
# Constraints that people change first. The rest (demand, idle GPUs, zones, minimum) is the purpose of the plan.
MOVABLE = frozenset(
    ("quota", "pool-quota", "supply", "start-limit", "stop-limit", "maximum", "region-min", "region-max")
)
# Order in which constraints are left out; all others come first. Demand comes last, so that the conflict names it rather than
# what follows from it.
ORDER = {**dict.fromkeys(MOVABLE, 2), "supply": 1, "quota": 3, "demand": 4}
FIXED = frozenset(("capacity", "flow", "blocks"))


@dataclass(frozen=True)
class Owners:
    """The constraints of the file, and which of them each row and each upper bound belongs to (-1: to none)."""

    names: tuple[Name, ...]
    row: Ints
    column: Ints


def infeasible(problem: Problem, program: Program, *, integers: bool, limit: float = LIMIT) -> InfeasibleError:
    """Return the error to raise for a program without a solution.

    `limit` in seconds, for each of conflict and nearest change.
    """
    deadline = time.perf_counter() + limit
    owners = owners_of(program)
    names, smallest = conflict(program, owners, deadline, integers=integers)
    changes = _nearest(problem, program, owners, deadline + limit)
    return InfeasibleError(Conflict(tuple(owners.names[n].text for n in names), smallest, changes))


def owners_of(program: Program) -> Owners:
    """Return the named constraints of a program."""
    numbers: dict[tuple[str, str], int] = {}
    names: list[Name] = []
    row = np.full(program.rows, -1)
    column = np.full(program.columns, -1)
    for table, items in ((row, enumerate(program.row_names)), (column, program.column_names.items())):
        for index, name in items:
            if name.sort not in FIXED:
                table[index] = numbers.setdefault((name.sort, name.key), len(names))
                if table[index] == len(names):
                    names.append(name)
    return Owners(tuple(names), np.tile(row, program.steps), np.tile(column, program.steps))


def feasible(program: Program, owners: Owners, kept: set[int], deadline: float, *, integers: bool) -> bool:
    """Return whether the constraints in `kept` can hold together. Raises SolverError when out of time."""
    left = deadline - time.perf_counter()
    if left <= 0:
        raise SolverError("solver-gave-up", "no time left")
    kept_ids = [-1, *kept]
    rows, columns = np.isin(owners.row, kept_ids), np.isin(owners.column, kept_ids)
    part = replace(
        program,
        row_lower=np.where(rows, program.row_lower, -np.inf),
        row_upper=np.where(rows, program.row_upper, np.inf),
        upper=np.where(columns, program.upper, np.inf),
        cost=np.zeros_like(program.cost),
    )
    return highs.run(highs.load(part, integers=integers, limit=left), integers=integers).values is not None


def conflict(program: Program, owners: Owners, deadline: float, *, integers: bool) -> tuple[list[int], bool]:
    """Return constraints that conflict, and whether none of them can be left out; False if time ran out."""
    names = list(range(len(owners.names)))
    try:
        if len(names) > FEW and not integers:
            proof = _certificate(program, owners, deadline - time.perf_counter())
            if proof and not feasible(
                program, owners, set(proof), deadline, integers=False
            ):  # else the ray was inaccurate
                names = proof
        for name in sorted(names, key=lambda n: (ORDER.get(owners.names[n].sort, 0), n)):
            rest = set(names) - {name}
            if not feasible(program, owners, rest, deadline, integers=integers):
                names = sorted(rest)
    except SolverError:
        return names, False
    return names, True


def _certificate(program: Program, owners: Owners, limit: float) -> list[int]:
    """Return the constraints with a multiplier in HiGHS' (Farkas) proof that the linear program is infeasible; none without one.

    HiGHS' own irreducible subsystem of rows takes up to 25 times as long, and still has to be reduced to constraints of the file.
    """
    solver = highs.load(program, integers=False, limit=limit)
    solver.run()
    _, there, ray = solver.getDualRay()
    if not there:
        return []
    row = np.array(ray)
    column = np.bincount(program.col, row[program.row] * program.val, minlength=len(program.cost))
    used = (owners.row[np.abs(row) > 1e-9], owners.column[np.abs(column) > 1e-9])
    return sorted({*np.concatenate(used).tolist()} - {-1})


def _nearest(problem: Problem, program: Program, owners: Owners, deadline: float) -> tuple[Change, ...]:
    """Return the cheapest integer violation: of movable constraints if that suffices, else of any."""
    movable = np.array([name.sort in MOVABLE for name in owners.names] + [False])  # index -1 is none
    for allowed in (movable, np.arange(len(movable)) < len(owners.names)):
        for integers in (True, False):
            limit = (deadline - time.perf_counter()) / 2  # each attempt leaves time for the next
            values = _relaxed(program, owners, allowed, limit, integers=integers) if limit > 0 else None
            if values is not None:
                return _changes(problem, program, owners, values)
    return ()


def _relaxed(
    program: Program, owners: Owners, allowed: npt.NDArray[np.bool_], limit: float, *, integers: bool
) -> Floats | None:
    """Return the values with the cheapest violation of the allowed constraints, each in proportion to its size, or None."""
    size = np.where(np.isfinite(program.row_lower), program.row_lower, program.row_upper)
    size = np.where(np.isfinite(size), size, 0.0)
    bound = np.where(np.isfinite(program.upper), program.upper, 0.0)
    solver = highs.load(replace(program, cost=np.zeros_like(program.cost)), integers=integers, limit=limit)
    status = solver.feasibilityRelaxation(
        -1.0,  # a negative penalty: never violated
        -1.0,
        -1.0,
        np.full(len(program.cost), -1.0),
        np.where(allowed[owners.column], 1 / np.maximum(1.0, np.abs(bound)), -1.0),
        np.where(allowed[owners.row], 1 / np.maximum(1.0, np.abs(size)), -1.0),
    )
    found = solver.getSolution()
    usable = status != highspy.HighsStatus.kError and found.value_valid
    return np.array(found.col_value) if usable else None


def _changes(problem: Problem, program: Program, owners: Owners, values: Floats) -> tuple[Change, ...]:
    """Describe how far `values` violate each constraint, at its worst step."""
    reached = np.bincount(program.row, program.val * values[program.col], minlength=len(owners.row))
    over_rows = np.maximum(program.row_lower - reached, reached - program.row_upper)
    worst: dict[int, tuple[float, int]] = {}
    for owner, over, width in (
        (owners.row, over_rows, program.rows),
        (owners.column, values - program.upper, program.columns),
    ):
        for k in np.flatnonzero((over > TOLERANCE) & (owner >= 0)):
            n = int(owner[k])
            if n not in worst or over[k] > worst[n][0] + TOLERANCE:
                worst[n] = float(over[k]), int(k) // width
    held = values.reshape(program.steps, -1)[:, : len(problem.pools)]
    changes = [_change(problem, owners.names[n], amount, t, held) for n, (amount, t) in sorted(worst.items())]
    if problem.demand.steps == 1:
        return tuple(changes)
    return tuple(replace(c, step=t + 1) for c, (_, (_, t)) in zip(changes, sorted(worst.items()), strict=True))


def _change(problem: Problem, name: Name, amount: float, t: int, held: Floats) -> Change:
    """Describe one change: `amount` is missing at step `t`, the worst one. `held` are the instances, [step, pool]."""
    key, policy, up = name.key, problem.policy, math.ceil(amount - TOLERANCE)
    pool = next((p for p in problem.pools if p.name == key), problem.pools[0])
    service = next((s for s in problem.services if s.name == key), problem.services[0])
    if name.sort == "supply":
        now = pool.start_bound(t == 0)
        word = "refused got" if now < pool.start_bound(False) else "supply"
        return Change(f"pools {key} {word}", now, now + up, "instances a step")
    counts = {
        "pool-quota": (f"pools {key} quota", pool.quota, up, "instances"),
        "quota": (f"quotas {key} gpus", next((q.gpus for q in problem.quotas if q.name == key), 0), up, "GPUs"),
        "start-limit": ("policy max_start", policy.max_start, up, "instances a step"),
        "stop-limit": ("policy max_stop", policy.max_stop, up, "instances a step"),
        "maximum": (f"services {key} max", service.maximum, up, "replicas"),
        "minimum": (f"services {key} min", service.minimum, -up, "replicas"),
    }
    if name.sort in counts:
        what, count, more, unit = counts[name.sort]
        return Change(what, count or 0, (count or 0) + more, unit)
    if name.sort in ("region-min", "region-max"):
        share = policy.region_mix[key]
        gpus = np.array([p.gpus for p in problem.pools], dtype=np.float64)
        here = np.array([p.region == key for p in problem.pools], dtype=np.float64)
        shares = [float((row * here).sum() / row.sum()) for row in held * gpus if row.sum() > 0] or [0.0]
        if name.sort == "region-min":
            return Change(f"policy region_mix {key} min", share.least, math.floor(min(shares) * 1000) / 1000, "")
        return Change(f"policy region_mix {key} max", share.most, math.ceil(max(shares) * 1000) / 1000, "")
    less = {
        "demand": (f"demand of {key}, at its worst step, served", f"{service.unit}/s less"),
        "zones": (f"{key} served on the loss of a zone", f"{service.unit}/s less"),
    }
    what, unit = less.get(name.sort, (name.text, "GPUs less"))
    return Change(what, 0.0, -amount, unit)
