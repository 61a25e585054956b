"""Solve a problem into a plan: delta, idle buffer, cost, utilization and shadow prices.

`check.py`, which shares no code with the solver, checks every plan before it is returned.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

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
    replicas: Ints
    blocks: tuple[dict[tuple[int, int], int], ...]  # [step] idle blocks: (pool, GPUs of a block) -> count
    relaxed_cost: float
    exact_cost: float | None
    rounded_cost: float
    shadows: tuple[Shadow, ...]
    seconds: float
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

    @cached_property
    def _changes(self) -> Ints:
        """Instances more than in the step before, [step, pool]."""
        changes: Ints = np.diff(self.instances, axis=0, prepend=[[pool.held for pool in self.problem.pools]])
        return changes

    @property
    def starts(self) -> Ints:
        return np.maximum(0, self._changes)

    @property
    def stops(self) -> Ints:
        return np.maximum(0, -self._changes)

    @property
    def cost(self) -> float:
        """Dollars over the horizon: instances held, what interruptions cost, and starts."""
        prices, policy = np.array([pool.price for pool in self.problem.pools]), self.problem.policy
        held = float((self.instances @ (prices * (1 + self.need.loss))).sum()) * self.hours
        return held + float((self.starts @ prices).sum()) * policy.switching_cost

    @cached_property
    def idle(self) -> Ints:
        """GPUs reserved as idle blocks, [step, pool]."""
        idle = np.zeros_like(self.instances)
        for t, blocks in enumerate(self.blocks):
            for (i, width), many in blocks.items():
                idle[t, i] += width * many
        return idle

    @cached_property
    def busy(self) -> Floats:
        """GPUs that the demand to expect keeps running application code, [step, pool]."""
        capacity = (self.replicas * self.need.rate).sum(axis=1)  # [step, service]
        load = np.divide(self.need.typical.T, capacity, out=np.zeros_like(capacity), where=capacity > 0)
        sizes = [service.gpus for service in self.problem.services]
        busy: Floats = (self.replicas * (np.minimum(1.0, load) * sizes)[:, None, :]).sum(axis=2)
        return busy

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
        sizes = np.array([pool.gpus for pool in self.problem.pools])
        return self._by_type(self.instances[step] * sizes - self.busy[step])

    def buffer_by_type(self, step: int = 0) -> dict[str, int]:
        """Return the GPUs reserved as idle blocks, by type."""
        return self._by_type(self.idle[step])

    def _by_type(self, values: npt.NDArray[Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for pool, value in zip(self.problem.pools, values.tolist(), strict=True):
            found[pool.gpu] = found.get(pool.gpu, 0) + value
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
    built = program.build(problem, required)
    if stay:
        built = program.stay(built, [pool.held for pool in problem.pools])
        if (built.lower > built.upper).any():  # more is held than a quota allows
            raise InfeasibleError(Conflict((), False))
    linear, kept = program.with_shared_columns(built, problem.pools)
    relaxed = solver.relax(linear, limit=limit)
    if relaxed.values is None:
        raise explain.infeasible(problem, built, integers=False) if explained else InfeasibleError(Conflict((), False))
    near = np.zeros(len(built.cost))
    near[kept] = relaxed.values
    relaxed_full = replace(relaxed, values=near)
    rounded = solver.integers(built, relaxed_full, problem, required, quick=quick, thorough=thorough, limit=limit)
    if rounded.values is None:
        raise explain.infeasible(problem, built, integers=True) if explained else InfeasibleError(Conflict((), False))
    best = solver.search(built, start=rounded.values, bound=relaxed.objective, limit=limit) if exact else None
    values = rounded.values if best is None else best.values
    assert values is not None
    instances, replicas, blocks = _read(built, required, values)
    bound = max(relaxed.objective, rounded.bound)
    if best is not None:
        bound = best.objective if best.proven else best.bound
    plan = Plan(
        problem=problem,
        need=required,
        kind=kind,
        instances=instances,
        replicas=replicas,
        blocks=blocks,
        relaxed_cost=relaxed.objective * built.price_scale,
        exact_cost=None if best is None else best.objective * built.price_scale,
        rounded_cost=rounded.objective * built.price_scale,
        shadows=_shadows(problem, linear, relaxed),
        seconds=time.perf_counter() - began,
        proven=best is not None and best.proven,
        bound=bound * built.price_scale,
    )
    broken = violations(problem, required, plan.instances, plan.replicas, plan.blocks)
    if broken:
        raise SolverError("plan-breaks-constraint", f"the solver's plan breaks {broken[0]}; please report the input")
    return plan


def _read(
    built: program.Program, required: need.Need, values: Floats
) -> tuple[Ints, Ints, tuple[dict[tuple[int, int], int], ...]]:
    """Return instances, replicas and blocks of a plan whose columns have these values."""
    table = np.round(values).astype(np.int64).reshape(built.steps, built.columns)
    replicas = np.zeros((built.steps, *required.rate.shape), dtype=np.int64)
    replicas[:, built.pairs[:, 0], built.pairs[:, 1]] = table[:, built.at.x : built.at.b]
    keys = [(i, w) for i, w in built.blocks.tolist()]
    rows = table[:, built.at.b : built.at.s].tolist()
    blocks = tuple({key: n for key, n in zip(keys, row, strict=True) if n} for row in rows)
    return table[:, : built.at.u], replicas, blocks


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
