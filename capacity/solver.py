"""HiGHS behind three calls: the linear program with its duals, a rounding that keeps every constraint, the exact integer program.

The rounding is relaxation-enforced neighbourhood search (Berthold 2014): an integer program over the two or three whole
numbers next to each value of the linear program, a step at a time, so that its size is that of one step's basis.
Deterministic: one thread, a fixed seed, no wall-clock choice other than the limits given.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import highspy
import numpy as np

from capacity.errors import SolverError
from capacity.model import Floats
from capacity.program import Ints, Program

FEASIBILITY = 1e-7
INTEGRALITY = 1e-6


@dataclass(frozen=True)
class Outcome:
    """`values` None when infeasible. Duals only from the linear program. `bound`: proven lower bound of the objective."""

    values: Floats | None
    objective: float
    bound: float
    row_dual: Floats | None = None
    column_dual: Floats | None = None
    seconds: float = 0.0
    proven: bool = True


@dataclass(frozen=True)
class Matrix:
    """Row-wise compressed constraint matrix."""

    start: Ints
    index: Ints
    value: Floats


def compress(program: Program) -> Matrix:
    high = program.rows * program.steps
    order = np.argsort(program.row, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(program.row, minlength=high))])
    return Matrix(start.astype(np.int32), program.col[order].astype(np.int32), program.val[order])


def load(program: Program, *, whole: bool, limit: float, gap: float = 0.0, matrix: Matrix | None = None) -> highspy.Highs:
    """A HiGHS instance holding the program. `whole`: with integrality. `limit` seconds."""
    matrix = compress(program) if matrix is None else matrix
    lp = highspy.HighsLp()
    lp.num_col_ = program.columns * program.steps
    lp.num_row_ = program.rows * program.steps
    lp.col_cost_ = program.cost
    lp.col_lower_ = program.lower
    lp.col_upper_ = program.upper
    lp.row_lower_ = program.row_lower
    lp.row_upper_ = program.row_upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = matrix.start
    lp.a_matrix_.index_ = matrix.index
    lp.a_matrix_.value_ = matrix.value
    if whole:
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        lp.integrality_ = [kinds[int(flag)] for flag in program.integer]
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("random_seed", 1)
    solver.setOptionValue("time_limit", max(0.01, limit))
    solver.setOptionValue("primal_feasibility_tolerance", FEASIBILITY)
    solver.setOptionValue("mip_feasibility_tolerance", INTEGRALITY)
    solver.setOptionValue("mip_rel_gap", gap)
    solver.setOptionValue("mip_abs_gap", 1e-9 if gap == 0 else 0.0)
    if solver.passModel(lp) == highspy.HighsStatus.kError:
        raise SolverError("solver-rejected", "HiGHS rejected the program; a coefficient is out of its range")
    return solver


def run(solver: highspy.Highs, *, whole: bool) -> Outcome:
    """Solves what is loaded. Raises SolverError on a time limit without a solution, or on numerical failure."""
    began = time.perf_counter()
    solver.run()
    seconds = time.perf_counter() - began
    status = solver.getModelStatus()
    info = solver.getInfo()
    known = highspy.HighsModelStatus
    if status in (known.kInfeasible, known.kUnboundedOrInfeasible):
        # Costs are not negative and variables not below zero, so unbounded is impossible.
        return Outcome(None, np.inf, np.inf, seconds=seconds)
    if status != known.kOptimal:
        usable = whole and info.primal_solution_status == int(highspy.SolutionStatus.kSolutionStatusFeasible)
        if not usable:
            raise SolverError("solver-gave-up", f"HiGHS stopped without a plan: {solver.modelStatusToString(status)}")
    solution = solver.getSolution()
    values = np.array(solution.col_value)
    objective = float(info.objective_function_value)
    if whole:
        return Outcome(
            values, objective, float(info.mip_dual_bound), seconds=seconds, proven=status == known.kOptimal
        )
    return Outcome(values, objective, objective, np.array(solution.row_dual), np.array(solution.col_dual), seconds)


def relax(program: Program, *, limit: float = 60.0) -> Outcome:
    """The linear program."""
    return run(load(program, whole=False, limit=limit), whole=False)


def exact(program: Program, *, limit: float = 300.0) -> Outcome:
    """The integer program, to a gap of zero."""
    outcome = run(load(program, whole=True, limit=limit), whole=True)
    return outcome if outcome.values is None else replace(outcome, values=snap(program, outcome.values))


def snap(program: Program, values: Floats) -> Floats:
    """Whole numbers exactly whole, and starts what the instances imply."""
    result = np.where(program.integer, np.round(values), values)
    return np.maximum(result, 0.0)


def round_whole(program: Program, relaxed: Floats, *, limit: float = 10.0, gap: float = 1e-3) -> Outcome:
    """A whole-number plan near `relaxed`, all constraints kept; falls back to the integer program over all steps.

    Returns an Outcome without values when even the integer program is infeasible.
    """
    began = time.perf_counter()
    deadline = began + limit
    for reach in (1, 3):
        values = _by_step(program, relaxed, reach, deadline, gap)
        if values is not None:
            objective = float(program.cost @ values)
            return Outcome(values, objective, -np.inf, seconds=time.perf_counter() - began, proven=False)
    outcome = run(load(program, whole=True, limit=max(limit, 30.0), gap=gap), whole=True)
    if outcome.values is None:
        return outcome
    values = snap(program, outcome.values)
    return Outcome(values, float(program.cost @ values), -np.inf, seconds=time.perf_counter() - began, proven=False)


@dataclass(frozen=True)
class _StepView:
    """The rows of one step over its own columns (row-wise), and its coefficients on the step before."""

    row: Ints
    col: Ints
    val: Floats
    before_row: Ints
    before_col: Ints
    before_val: Floats


def _view(program: Program) -> _StepView:
    """All steps share their matrix, so it is cut out of the first two."""
    first = (program.row < program.rows) & (program.col < program.columns)
    cross = (program.row >= program.rows) & (program.row < 2 * program.rows) & (program.col < program.columns)
    return _StepView(
        program.row[first],
        program.col[first],
        program.val[first],
        program.row[cross] - program.rows,
        program.col[cross],
        program.val[cross],
    )


def _by_step(program: Program, relaxed: Floats, reach: int, deadline: float, gap: float) -> Floats | None:
    view = _view(program)
    high, wide, steps = program.rows, program.columns, program.steps
    whole = relaxed.reshape(steps, wide)
    result = np.zeros((steps, wide))
    count = program.at_u
    integer = program.integer[:wide]
    for t in range(steps):
        want = whole[t]
        low = np.floor(want + INTEGRALITY)
        lower = program.lower[:wide].copy()
        upper = program.upper.reshape(steps, wide)[t].copy()
        instances = slice(0, count)
        lower[instances] = np.maximum(lower[instances], low[instances] - (reach - 1))
        upper[instances] = np.minimum(upper[instances], np.ceil(want[instances] - INTEGRALITY) + reach)
        placed = slice(program.at_x, program.at_b)
        lower[placed] = np.maximum(0.0, low[placed] - (reach - 1))
        # A pair the linear program leaves at zero stays out at first: its basis is what keeps this program small.
        keep = np.ones(wide, dtype=np.bool_)
        if reach == 1:
            keep[placed] = want[placed] > INTEGRALITY
        row_lower = program.row_lower.reshape(steps, high)[t].copy()
        row_upper = program.row_upper.reshape(steps, high)[t].copy()
        if t > 0 and len(view.before_row):
            shift = np.bincount(view.before_row, view.before_val * result[t - 1][view.before_col], minlength=high)
            row_lower -= shift
            row_upper -= shift
        columns = np.flatnonzero(keep)
        position = np.full(wide, -1, dtype=np.int64)
        position[columns] = np.arange(len(columns))
        inside = keep[view.col]
        part = replace(
            program,
            steps=1,
            columns=len(columns),
            row=view.row[inside],
            col=position[view.col[inside]],
            val=view.val[inside],
            row_lower=row_lower,
            row_upper=row_upper,
            lower=lower[columns],
            upper=upper[columns],
            cost=program.cost.reshape(steps, wide)[t][columns],
            integer=integer[columns],
        )
        left = deadline - time.perf_counter()
        if left <= 0:
            return None
        try:
            outcome = run(load(part, whole=True, limit=left / (steps - t) + 0.05, gap=gap), whole=True)
        except SolverError:
            return None
        if outcome.values is None:
            return None
        result[t][columns] = np.maximum(0.0, np.where(part.integer, np.round(outcome.values), outcome.values))
    return result.ravel()
