"""The three solves: the linear program with duals, a rounding that satisfies every constraint, the exact integer program.

The rounding works step by step, with the step before fixed. A small step is its own integer program; then windows of two
steps are solved again with the rest fixed (fix-and-optimize, Helber and Sahling 2010). `greedy.py` constructs a larger
step. Solving it again with the pools of one region free and the others fixed improves it (large neighbourhood search, Shaw
1998); for very large programs only on request. If construction fails, the integers next to the linear program's solution
are searched (relaxation-enforced neighbourhoods, Berthold 2014), then all.
"""

from __future__ import annotations

import time
from dataclasses import replace

import highspy
import numpy as np

from capacity.errors import SolverError
from capacity.model import Floats, Problem
from capacity.optimize import greedy, highs, sift, step_state
from capacity.optimize.highs import INTEGRALITY, Outcome
from capacity.optimize.program import Program
from capacity.requirements import Need

SMALL = 4000  # columns up to which a plain solve is fastest
FREE = 120  # integer columns of a step up to which it is solved as one program
MIDDLING = 1500  # integer columns of all steps up to which constructed steps are improved by default
# Nodes and rounds limit the work, not time, so that a busy machine computes the same plan.
STEP_GAP = 1e-4
STEP_NODES = 500
POLISH_NODES = 50
POLISH_ROUNDS = 2
SHADE = 1e-3  # share of the price added where duals do not decide
NEIGHBOUR_NODES = 30
NEIGHBOUR_GAP = 2e-3
NEIGHBOUR_LIMIT = 30.0
WINDOW = 8  # pools


def relax(program: Program, *, limit: float = 60.0) -> Outcome:
    """Solve the linear program; large ones through `sift.py`, which finds the same optimum faster."""
    if program.columns * program.steps <= SMALL:
        return highs.run(highs.load(program, whole=False, limit=limit), whole=False)
    return sift.relax(program, limit=limit)


def exact(program: Program, *, start: Floats, bound: float, limit: float = 60.0) -> Outcome:
    """Solve the integer program to a gap of zero.

    `start`: a known plan. `bound`: a lower bound of the cost. If time runs out, `proven` is False and the best plan found
    is at least as good as `start`. Raises SolverError.
    """
    solver = highs.load(program, whole=True, limit=limit)
    known = highspy.HighsSolution()
    known.col_value = list(start)
    solver.setSolution(known)
    price = float(program.cost @ start)
    try:
        outcome = highs.run(solver, whole=True)
    except SolverError:
        if solver.getModelStatus() != highspy.HighsModelStatus.kTimeLimit:
            raise
        return Outcome(start, price, bound, proven=False)
    if outcome.values is None:
        raise SolverError("solver-gave-up", "HiGHS calls a program infeasible that a known plan satisfies")
    values, objective = (start, price) if outcome.objective > price else (outcome.values, outcome.objective)
    return replace(outcome, values=snap(program, values), objective=objective, bound=max(bound, outcome.bound))


def snap(program: Program, values: Floats) -> Floats:
    """Round the integer columns to exact integers."""
    result: Floats = np.maximum(np.where(program.integer, np.round(values), values), 0.0)
    return result


def round_whole(
    program: Program,
    relaxed: Outcome,
    problem: Problem,
    need: Need,
    *,
    quick: bool = False,
    thorough: bool = False,
    limit: float = 30.0,
) -> Outcome:
    """Return an integer plan near `relaxed` that satisfies all constraints.

    Falls back to the integer program over all steps. Returns an Outcome without values if even that is infeasible.
    """
    deadline = time.perf_counter() + limit
    better = thorough or (not quick and int(program.integer.sum()) <= MIDDLING)
    large = quick or int(program.integer[: program.columns].sum()) > FREE
    assert relaxed.values is not None
    values = _constructed(program, relaxed, problem, need, thorough=better, hasty=quick) if large else None
    if values is None:
        for reach in (0, 2, None):
            values = _by_step(program, relaxed.values, reach, deadline)
            if values is not None:
                break
        if values is None:
            outcome = highs.run(highs.load(program, whole=True, limit=limit, gap=STEP_GAP), whole=True)
            if outcome.values is None:
                return outcome
            values = snap(program, outcome.values)
        values = _polish(program, values, deadline)
    return Outcome(values, float(program.cost @ values), -np.inf, proven=False)


def _constructed(
    program: Program, relaxed: Outcome, problem: Problem, need: Need, *, thorough: bool, hasty: bool
) -> Floats | None:
    """Construct the plan with `greedy.py`, step by step; None if any constraint is violated."""
    assert relaxed.values is not None
    worth = _worth(program, relaxed)
    shared = step_state.shape(problem, need, program)
    pairs = len(program.pairs)
    careful = thorough or (not hasty and pairs * program.steps <= greedy.MANY)
    first = thorough or (not hasty and pairs <= greedy.MANY)  # the step that is acted upon
    before = [pool.held for pool in problem.pools]
    found: list[Floats] = []
    for t in range(program.steps):
        want = relaxed.values[t * program.columns : (t + 1) * program.columns]
        values = greedy.step(
            problem,
            need,
            program,
            t,
            want,
            before,
            worth[t],
            found[-1] if found else None,
            shared,
            careful=careful if found else first,
        )
        if values is None:
            return None
        found.append(_neighbours(program, t, values, before, problem) if thorough else values)
        before = [int(v) for v in found[-1][: len(before)]]
    result = np.concatenate(found)
    reached = np.bincount(program.row, program.val * result[program.col], minlength=len(program.row_lower))
    slack = highs.FEASIBILITY * np.maximum(1.0, np.abs(reached)) * 10
    kept = (reached >= program.row_lower - slack) & (reached <= program.row_upper + slack)
    inside = (result <= program.upper + INTEGRALITY) & (result >= program.lower - INTEGRALITY)
    return result if bool(kept.all() and inside.all()) else None


def _worth(program: Program, relaxed: Outcome) -> Floats:
    """Return the shadow price of one GPU of a pool in a step, [step, pool].

    It is the dual of the row that counts the pool's GPUs, plus a small share of its price, which decides between equal or
    zero duals.
    """
    pools = program.at_u
    price = program.cost.reshape(program.steps, program.columns)[:, :pools]
    if relaxed.row_dual is None:
        return price
    dual: Floats = np.maximum(0.0, relaxed.row_dual.reshape(program.steps, program.rows)[:, :pools])
    own = (program.row < pools) & (program.col == program.row)
    gpus = np.ones(pools)
    gpus[program.row[own]] = program.val[own]
    worth: Floats = dual + SHADE * price / gpus
    return worth


def _neighbours(program: Program, t: int, values: Floats, before: list[int], problem: Problem) -> Floats:
    """Solve the step again, region after region, with that region's pools free and all others fixed."""
    previous = np.zeros(program.columns)
    previous[: len(before)] = before
    one = highs.step(program, highs.view(program), t, previous if t else None)
    best = values
    for window in _windows(problem):
        inside = np.zeros(len(before), dtype=np.bool_)
        inside[window] = True
        free = np.ones(program.columns, dtype=np.bool_)  # the sums over places, surplus and zones follow
        free[: program.at_u] = inside
        free[program.at_u : program.at_x] = inside
        free[program.at_x : program.at_b] = inside[program.pairs[:, 0]]
        free[program.at_b : program.at_s] = inside[program.blocks[:, 0]]
        part = replace(one, lower=np.where(free, one.lower, best), upper=np.where(free, one.upper, best))
        try:
            solver = highs.load(part, whole=True, limit=NEIGHBOUR_LIMIT, gap=NEIGHBOUR_GAP, nodes=NEIGHBOUR_NODES)
            outcome = highs.run(solver, whole=True)
        except SolverError:
            continue  # no better plan within the node limit
        if outcome.values is not None:
            found = snap(part, outcome.values)
            if float(part.cost @ found) < float(part.cost @ best) - 1e-9:
                best = found
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


def _by_step(program: Program, relaxed: Floats, reach: int | None, deadline: float) -> Floats | None:
    """Solve each step as an integer program.

    `reach`: how far instances may be from the neighbouring integers; None: anywhere. Returns None if a step fails or time
    runs out.
    """
    cut = highs.view(program)
    steps, wide, count = program.steps, program.columns, program.at_u
    whole = relaxed.reshape(steps, wide)
    result = np.zeros((steps, wide))
    placed = slice(program.at_x, program.at_b)
    for t in range(steps):
        one = highs.step(program, cut, t, result[t - 1] if t else None)
        want = whole[t]
        keep = np.ones(wide, dtype=np.bool_)
        if reach is not None and int(program.integer[:wide].sum()) > FREE:
            lower, upper = one.lower.copy(), one.upper.copy()
            lower[:count] = np.maximum(lower[:count], np.floor(want[:count] + INTEGRALITY) - reach)
            upper[:count] = np.minimum(upper[:count], np.ceil(want[:count] - INTEGRALITY) + 1 + reach)
            lower[placed] = np.maximum(0.0, np.floor(want[placed] + INTEGRALITY) - reach)
            if reach == 0:
                keep[placed] = want[placed] > INTEGRALITY
            one = replace(one, lower=lower, upper=upper)
        part, columns = sift.masked(one, keep)
        left = deadline - time.perf_counter()
        if left <= 0:
            return None
        try:
            outcome = highs.run(highs.load(part, whole=True, limit=left, gap=STEP_GAP, nodes=STEP_NODES), whole=True)
        except SolverError:
            return None
        if outcome.values is None:
            return None
        result[t][columns] = snap(part, outcome.values)
    return result.ravel()


def _polish(program: Program, values: Floats, deadline: float) -> Floats:
    """Solve windows of two steps again, the others fixed, while that saves money and time is left."""
    steps, wide = program.steps, program.columns
    if steps == 1 or program.integer.sum() > FREE * 8:
        return values
    best, cost = values, float(program.cost @ values)
    for _ in range(POLISH_ROUNDS):
        improved = False
        for t in range(steps - 1):
            left = deadline - time.perf_counter()
            if left <= 0:
                return best
            lower, upper = best.copy(), best.copy()
            window = slice(t * wide, (t + 2) * wide)
            lower[window], upper[window] = program.lower[window], program.upper[window]
            after = (t + 2) * wide
            if after < len(best):  # the next starts depend on the instances held now
                starts = slice(after + program.at_u, after + program.at_x)
                lower[starts], upper[starts] = program.lower[starts], program.upper[starts]
            part = replace(program, lower=lower, upper=upper)
            try:
                outcome = highs.run(
                    highs.load(part, whole=True, limit=left, gap=STEP_GAP, nodes=POLISH_NODES), whole=True
                )
            except SolverError:
                return best
            if outcome.values is not None:
                found = snap(program, outcome.values)
                price = float(program.cost @ found)
                if price < cost - 1e-7 * max(1.0, cost):
                    best, cost, improved = found, price, True
        if not improved:
            break
    return best
