"""Solve a problem into a plan: delta, idle buffer, cost, utilization and shadow prices.

`check.py`, which shares no code with the solver, checks every plan before it is returned.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from capacity import requirements as need
from capacity.errors import Conflict, InfeasibleError, SolverError
from capacity.model import Floats, Kind, Problem
from capacity.optimize import explain, highs, program, solver
from capacity.optimize.check import violations
from capacity.optimize.program import Ints

NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Shadow:
    """Shadow price: dollars per hour saved by one more unit of a constraint, at the margin of the linear program."""

    constraint: str
    unit: str
    saves: float


@dataclass(frozen=True)
class Plan:
    """A plan. Arrays are [step, pool] or [step, pool, service]."""

    problem: Problem
    need: need.Need
    kind: Kind
    instances: Ints
    starts: Ints
    stops: Ints
    replicas: Ints
    idle: Ints  # [step, pool] GPUs reserved as idle blocks
    cost: float  # dollars over the horizon, held and started
    relaxed_cost: float
    exact_cost: float | None
    rounded_cost: float
    shadows: tuple[Shadow, ...]
    seconds: float
    blocks: tuple[dict[tuple[int, int], int], ...]  # [step] (pool, GPUs per block) -> count
    block_sizes: tuple[tuple[int, int], ...]  # possible (pool, GPUs per block)
    proven: bool  # the integer program was solved to optimality
    bound: float  # dollars: lower bound of all integer plans

    @property
    def hours(self) -> float:
        return self.problem.step_seconds / 3600

    @property
    def hourly_cost(self) -> Floats:
        """Dollars per hour of held instances, [step]."""
        prices = np.array([pool.price for pool in self.problem.pools])
        cost: Floats = self.instances.astype(np.float64) @ prices
        return cost

    @property
    def gpus(self) -> Floats:
        """GPUs held, [step]."""
        sizes = np.array([pool.gpus for pool in self.problem.pools], dtype=np.float64)
        held: Floats = self.instances.astype(np.float64) @ sizes
        return held

    @property
    def busy(self) -> Floats:
        """GPUs that the demand to expect keeps running application code, [step]."""
        total = np.zeros(len(self.instances))
        size = np.array([service.gpus for service in self.problem.services], dtype=np.float64)
        for t in range(len(total)):
            capacity = (self.replicas[t] * self.need.rate).sum(axis=0)
            replicas = self.replicas[t].sum(axis=0)
            load = np.divide(self.need.typical[:, t], capacity, out=np.zeros(len(size)), where=capacity > 0)
            total[t] = float((np.minimum(1.0, load) * replicas * size).sum())
        return total

    @property
    def utilization(self) -> float:
        """GPU Allocation Utilization: GPU-seconds running application code over GPU-seconds paid."""
        paid = float(self.gpus.sum())
        return float(self.busy.sum()) / paid if paid else 1.0

    def unused(self, step: int = 0) -> int:
        """Return the GPUs on which no replica runs."""
        sizes = np.array([service.gpus for service in self.problem.services])
        return int(self.gpus[step]) - int((self.replicas[step] @ sizes).sum())

    def idle_by_type(self, step: int = 0) -> dict[str, float]:
        """Return the GPUs left idle by the demand to expect, by type: hot spares, idle blocks and the rest."""
        found: dict[str, float] = {}
        capacity = (self.replicas[step] * self.need.rate).sum(axis=0)
        load = np.divide(self.need.typical[:, step], capacity, out=np.zeros(len(capacity)), where=capacity > 0)
        for i, pool in enumerate(self.problem.pools):
            busy = sum(
                min(1.0, float(load[j])) * int(self.replicas[step, i, j]) * service.gpus
                for j, service in enumerate(self.problem.services)
            )
            found[pool.gpu] = found.get(pool.gpu, 0.0) + float(self.instances[step, i] * pool.gpus) - busy
        return dict(sorted(found.items()))

    def buffer_by_type(self, step: int = 0) -> dict[str, int]:
        """Return the GPUs reserved as idle blocks, by type."""
        found: dict[str, int] = {}
        for i, pool in enumerate(self.problem.pools):
            found[pool.gpu] = found.get(pool.gpu, 0) + int(self.idle[step, i])
        return dict(sorted(found.items()))


def solve(
    problem: Problem,
    kind: Kind = "restored",
    *,
    exact: bool = False,
    quick: bool = False,
    thorough: bool = False,
    explained: bool = True,
    stay: bool = False,
    limit: float = 60.0,
) -> Plan:
    """Plan a problem with lead times of `kind`; each solve takes at most `limit` seconds.

    `exact` also solves the integer program to optimality; `quick` only constructs a plan, where that succeeds; `thorough`
    improves plans of any size. `explained` finds the conflict if there is no plan. `stay` forbids starts and stops in the
    first step. Raises InfeasibleError with the conflict and the nearest change, SolverError if HiGHS gives up.
    """
    began = time.perf_counter()
    required = need.compute(problem, kind)
    built, linear = program.build(problem, required), program.build(problem, required, shared=True)
    if stay:
        built, linear = (program.stay(one, [pool.held for pool in problem.pools]) for one in (built, linear))
        if (built.lower > built.upper).any():  # more is held than a quota allows
            raise InfeasibleError(Conflict((), False))
    relaxed = solver.relax(linear, limit=limit)
    if relaxed.values is None:
        raise explain.infeasible(problem, built, integers=False) if explained else InfeasibleError(Conflict((), False))
    near = replace(relaxed, values=program.as_columns_of(built, linear, relaxed.values))
    rounded = solver.integers(built, near, problem, required, quick=quick, thorough=thorough, limit=limit)
    if rounded.values is None:
        raise explain.infeasible(problem, built, integers=True) if explained else InfeasibleError(Conflict((), False))
    best = solver.search(built, start=rounded.values, bound=relaxed.objective, limit=limit) if exact else None
    values = rounded.values if best is None else best.values
    assert values is not None
    seconds = time.perf_counter() - began
    shadows = _shadows(problem, linear, relaxed)
    plan = _read(problem, required, built, relaxed.objective, shadows, values, kind, seconds, rounded, best)
    broken = violations(problem, required, plan.instances, plan.replicas, plan.blocks)
    if broken:
        raise SolverError("plan-breaks-constraint", f"the solver's plan breaks {broken[0]}; please report the input")
    return plan


def _blocks(built: program.Program, values: Floats) -> tuple[dict[tuple[int, int], int], ...]:
    """Return the idle blocks of each step: (pool, GPUs per block) -> count."""
    table = values.reshape(built.steps, built.columns)[:, built.at_b : built.at_s]
    return tuple(
        {(int(i), int(w)): round(v) for (i, w), v in zip(built.blocks, row, strict=True) if v > 0.5} for row in table
    )


def _read(
    problem: Problem,
    required: need.Need,
    built: program.Program,
    linear: float,
    shadows: tuple[Shadow, ...],
    values: Floats,
    kind: Kind,
    seconds: float,
    rounded: highs.Outcome,
    best: highs.Outcome | None,
) -> Plan:
    steps, pools = built.steps, len(problem.pools)
    table = values.reshape(steps, built.columns)
    instances = np.round(table[:, :pools]).astype(np.int64)
    before = np.vstack([np.array([pool.held for pool in problem.pools], dtype=np.int64)[None, :], instances[:-1]])
    replicas = np.zeros((steps, pools, len(problem.services)), dtype=np.int64)
    placed = np.round(table[:, built.at_x : built.at_b]).astype(np.int64)
    replicas[:, built.pairs[:, 0], built.pairs[:, 1]] = placed
    idle = np.zeros((steps, pools), dtype=np.int64)
    blocks = _blocks(built, values)
    for t, sizes in enumerate(blocks):
        for (i, width), many in sizes.items():
            idle[t, i] += width * many
    starts = np.maximum(0, instances - before)
    prices = np.array([pool.price for pool in problem.pools])
    cost = float(
        (instances @ (prices * (1 + required.loss))).sum() * problem.step_seconds / 3600
        + (starts @ prices).sum() * problem.policy.switching_cost
    )
    scale = built.price_scale
    return Plan(
        problem=problem,
        need=required,
        kind=kind,
        instances=instances,
        starts=starts,
        stops=np.maximum(0, before - instances),
        replicas=replicas,
        idle=idle,
        cost=cost,
        relaxed_cost=linear * scale,
        exact_cost=None if best is None else best.objective * scale,
        rounded_cost=rounded.objective * scale,
        shadows=shadows,
        seconds=seconds,
        blocks=blocks,
        block_sizes=tuple((int(i), int(w)) for i, w in built.blocks),
        proven=best is not None and best.proven,
        bound=(linear if best is None else best.objective if best.proven else best.bound) * scale,
    )


_UNITS = {
    "quota": "GPU",
    "pool-quota": "instance",
    "supply": "start a step",
    "start-limit": "start a step",
    "stop-limit": "stop a step",
    "maximum": "replica",
}


def _shadows(problem: Problem, built: program.Program, relaxed: highs.Outcome) -> tuple[Shadow, ...]:
    """Return the duals of movable bounds, summed over the horizon, as dollars saved per hour, largest first."""
    if relaxed.row_dual is None or relaxed.column_dual is None:
        return ()
    hours = built.steps * problem.step_seconds / 3600
    rows = relaxed.row_dual.reshape(built.steps, built.rows).sum(axis=0)
    columns = np.where(np.isfinite(built.upper), np.minimum(0.0, relaxed.column_dual), 0.0)
    columns = columns.reshape(built.steps, built.columns).sum(axis=0)
    found: dict[tuple[str, str], float] = {}
    for index, name in enumerate(built.row_names):
        if name.sort in _UNITS and rows[index] < -NEGLIGIBLE:
            key = (name.text, _UNITS[name.sort])
            found[key] = found.get(key, 0.0) - float(rows[index])
    for index, name in built.column_names.items():
        if columns[index] < -NEGLIGIBLE:
            key = (name.text, _UNITS[name.sort])
            found[key] = found.get(key, 0.0) - float(columns[index])
    shadows = [Shadow(text, unit, value * built.price_scale / hours) for (text, unit), value in found.items()]
    return tuple(sorted(shadows, key=lambda s: (-s.saves, s.constraint)))
