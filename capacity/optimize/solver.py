"""Solve the linear program with duals, find a plan in integers near it, and find the optimum in integers.

A plan in integers is constructed (`construct.py`) and then improved, depending on its size:

- up to `SMALL` integers: by one integer program;
- up to `SEARCHED`: by neighbourhoods (solved again with the pools of one region free in one step and all others fixed, large
  neighbourhood search, Shaw 1998), then by one integer program;
- up to `IMPROVED`, or any size on request: by neighbourhoods alone.

If construction fails, HiGHS searches without a start.
"""

from __future__ import annotations

import time
from dataclasses import replace

import highspy
import numpy as np

from capacity.errors import SolverError
from capacity.model import Floats, Problem
from capacity.optimize import construct, highs
from capacity.optimize.highs import Outcome
from capacity.optimize.program import Program, first_step
from capacity.requirements import Need

SMALL, SEARCHED, IMPROVED = 200, 1000, 1500  # integer columns
LARGE = 5000  # columns from which a linear program of one step is scaled differently
# Nodes limit the search, not time, so that a busy machine computes the same plan.
NODES = 500
SEARCHED_NODES = 100
GAP = 1e-4
FIRST_GAP = 0.03  # relative gap of the first plan if construction fails
WINDOW = 8  # pools
WINDOW_NODES = 30
WINDOW_GAP = 2e-3


def relax(program: Program, *, limit: float = 60.0) -> Outcome:
    """Solve the linear program, each step from the basis that is optimal for the first one alone, which halves the time."""
    loaded = _linear(program, limit)
    if len(program.cost) > LARGE and program.steps == 1:
        loaded.setOptionValue("simplex_scale_strategy", 4)  # by the largest values: a quarter less
    elif program.steps > 1:
        first = _linear(first_step(program), limit)
        first.run()
        if first.getModelStatus() == highspy.HighsModelStatus.kOptimal:
            basis = first.getBasis()
            basis.col_status = list(basis.col_status) * program.steps
            basis.row_status = list(basis.row_status) * program.steps
            loaded.setBasis(basis)
    return highs.run(loaded, integers=False)


def _linear(program: Program, limit: float) -> highspy.Highs:
    """Load a linear program. Without presolve and with Devex prices HiGHS takes a quarter less on these programs."""
    loaded = highs.load(program, integers=False, limit=limit)
    loaded.setOptionValue("presolve", "off")
    loaded.setOptionValue("simplex_dual_edge_weight_strategy", 1)
    return loaded


def integers(
    program: Program,
    relaxed: Outcome,
    problem: Problem,
    need: Need,
    *,
    quick: bool = False,
    thorough: bool = False,
    limit: float = 60.0,
) -> Outcome:
    """Return a plan in integers that satisfies all constraints; an Outcome without values if there is none.

    `relaxed`: the linear program's solution. `quick`: construction only, unless it fails. `thorough`: improve plans of any
    size. Raises SolverError if HiGHS finds no plan within `limit` seconds.
    """
    assert relaxed.values is not None
    size = int(program.integer.sum())
    start = construct.plan(problem, need, program, relaxed.values)
    if start is None:
        found = search(program, start=None, bound=relaxed.objective, limit=limit, gap=FIRST_GAP)
        if found.values is None or quick:
            return found
        start = found.values
    if not quick and size > SMALL and (thorough or size <= IMPROVED):
        start = _improved(program, start, problem, limit)
    if not quick and size <= SEARCHED:
        nodes = NODES if size <= SMALL else SEARCHED_NODES
        return search(program, start=start, bound=relaxed.objective, limit=limit, gap=GAP, nodes=nodes)
    return Outcome(start, float(program.cost @ start), relaxed.objective, proven=False)


def _improved(program: Program, start: Floats, problem: Problem, limit: float) -> Floats:
    """Solve again, step after step and region after region, with the pools of that region free and all others fixed."""
    best, deadline = start, time.perf_counter() + limit
    pool_of = np.full(program.columns, -1)  # sums over places, surplus and zones follow from the rest: always free
    pool_of[: program.at.x] = np.tile(np.arange(program.at.u), 2)
    pool_of[program.at.x : program.at.b] = program.pairs[:, 0]
    pool_of[program.at.b : program.at.s] = program.blocks[:, 0]
    for t in range(program.steps):
        for window in _windows(problem):
            if time.perf_counter() > deadline:
                return best
            free = np.zeros((program.steps, program.columns), dtype=np.bool_)
            free[t] = np.isin(pool_of, [-1, *window])
            free[t + 1 :, program.at.u : program.at.x][:1] = True  # the next starts depend on the instances held now
            flat = free.ravel()
            part = replace(
                program, lower=np.where(flat, program.lower, best), upper=np.where(flat, program.upper, best)
            )
            found = search(part, start=best, bound=-np.inf, limit=limit, gap=WINDOW_GAP, nodes=WINDOW_NODES)
            assert found.values is not None
            best = found.values
    return best


def _windows(problem: Problem) -> list[list[int]]:
    """Return groups of pools that can replace each other: of one region, at most WINDOW each."""
    found = []
    for region in sorted({pool.region for pool in problem.pools}):
        inside = [i for i, pool in enumerate(problem.pools) if pool.region == region]
        inside.sort(key=lambda i: (problem.pools[i].gpu, problem.pools[i].zone, i))
        parts = -(-len(inside) // WINDOW)
        found += [inside[k::parts] for k in range(parts)]
    return found


def search(
    program: Program, *, start: Floats | None, bound: float, limit: float = 60.0, gap: float = 0.0, nodes: int = 0
) -> Outcome:
    """Solve the integer program to a relative gap, from a known plan `start`.

    `bound`: a lower bound of the cost. `limit` in seconds; `nodes`: maximum search nodes, 0 for no limit. When a limit is
    reached, the result is the best plan found, at least as good as `start`, with `proven` False. Raises SolverError if
    there is none.
    """
    solver = highs.load(program, integers=True, limit=limit, gap=gap, nodes=nodes)
    price = np.inf
    if start is not None:
        known = highspy.HighsSolution()
        known.col_value = list(start)
        solver.setSolution(known)
        price = float(program.cost @ start)
    try:
        outcome = highs.run(solver, integers=True)
    except SolverError:
        if start is None:
            raise
        return Outcome(start, price, bound, proven=False)
    if outcome.values is None:
        if start is None:
            return outcome
        raise SolverError("solver-gave-up", "HiGHS calls a program infeasible that a known plan satisfies")
    values = np.maximum(np.where(program.integer, np.round(outcome.values), outcome.values), 0.0)
    if start is not None and outcome.objective > price:
        values = start
    return replace(outcome, values=values, objective=min(price, outcome.objective), bound=max(bound, outcome.bound))
