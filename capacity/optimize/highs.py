"""Wrap HiGHS in two calls, `load` and `run`.

Deterministic: one thread, a fixed seed, no dependence on time except the given limits.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

import highspy
import numpy as np

from capacity.errors import SolverError
from capacity.model import Floats
from capacity.optimize.program import Program

FEASIBILITY = 1e-7
INTEGRALITY = 1e-6


@dataclass(frozen=True)
class Outcome:
    """Result of a solve.

    `values`: None if infeasible. Duals: from a linear program only. `bound`: proven lower bound of the objective.
    """

    values: Floats | None
    objective: float
    bound: float
    row_dual: Floats | None = None
    column_dual: Floats | None = None
    proven: bool = True


def _swallow_banner() -> None:
    """Create the first HiGHS instance of the process with file descriptor 1 redirected.

    It prints a banner there before any option can be set, which would corrupt JSON on standard output.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            highspy.Highs()
            ctypes.CDLL(None).fflush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)


_swallow_banner()


def load(program: Program, *, integers: bool, limit: float, gap: float = 0.0, nodes: int = 0) -> highspy.Highs:
    """Return a HiGHS instance with the program loaded. Raises SolverError if HiGHS rejects it.

    `integers`: with integrality. `limit`: seconds. `nodes`: maximum search nodes, 0 for no limit.
    """
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("random_seed", 1)
    solver.setOptionValue("time_limit", max(0.01, limit))
    solver.setOptionValue("primal_feasibility_tolerance", FEASIBILITY)
    solver.setOptionValue("mip_feasibility_tolerance", INTEGRALITY)
    if nodes:
        solver.setOptionValue("mip_max_nodes", nodes)
    solver.setOptionValue("mip_rel_gap", gap)
    solver.setOptionValue("mip_abs_gap", 1e-9 if gap == 0 else 0.0)
    order = np.argsort(program.row, kind="stable")
    starts = np.searchsorted(program.row[order], np.arange(len(program.row_lower))).astype(np.int32)
    # As arrays: filling a HighsLp field by field takes seven times as long.
    status = solver.passModel(
        len(program.cost),
        len(program.row_lower),
        len(program.val),
        int(highspy.MatrixFormat.kRowwise),
        int(highspy.ObjSense.kMinimize),
        0.0,
        program.cost,
        program.lower,
        program.upper,
        program.row_lower,
        program.row_upper,
        starts,
        program.col[order].astype(np.int32),
        program.val[order],
        program.integer.astype(np.int32) if integers else np.zeros(len(program.cost), dtype=np.int32),
    )
    if status == highspy.HighsStatus.kError:
        raise SolverError("solver-rejected", "HiGHS rejected the program; a coefficient is out of its range")
    return solver


def run(solver: highspy.Highs, *, integers: bool) -> Outcome:
    """Solve the loaded program.

    Raises SolverError on a time limit without a solution, or on numerical failure.
    """
    solver.run()
    status = solver.getModelStatus()
    info = solver.getInfo()
    known = highspy.HighsModelStatus
    if status in (known.kInfeasible, known.kUnboundedOrInfeasible):
        # Costs and variables are not negative, so unbounded is impossible.
        return Outcome(None, np.inf, np.inf)
    if status != known.kOptimal:
        usable = integers and info.primal_solution_status == int(highspy.SolutionStatus.kSolutionStatusFeasible)
        if not usable:
            raise SolverError("solver-gave-up", f"HiGHS stopped without a plan: {solver.modelStatusToString(status)}")
    solution = solver.getSolution()
    values = np.array(solution.col_value)
    objective = float(info.objective_function_value)
    if integers:
        return Outcome(values, objective, float(info.mip_dual_bound), proven=status == known.kOptimal)
    return Outcome(values, objective, objective, np.array(solution.row_dual), np.array(solution.col_dual))
