"""Solve a large linear program by adding columns as needed, step by step first.

Three ideas, all exact (the last solve prices every column of the whole program):
- Pools that differ only in price, quota, supply or boot time share the columns of replicas and blocks and the row that
  counts GPUs: their common load can be divided like their instances.
- Sifting (Forrest; Bixby et al. 1992): only the cheapest places of each service enter at first, the others when their
  reduced cost requires it.
- All steps share one matrix, so each is solved from the basis of the step before, and the bases of all steps together are a
  nearly optimal basis of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import highspy
import numpy as np
import numpy.typing as npt

from capacity.model import Floats
from capacity.optimize import highs
from capacity.optimize.highs import Outcome
from capacity.optimize.program import Ints, Program

FIRST = 6  # cheapest pairs per service that enter at first
MORE = 16  # pairs per service that enter per round
ROUNDS = 60
ALONE = 0.1  # share of the switching cost in a single step: instances started there run in later steps too
PRICE = 1e-7
PRIMAL = 4  # HiGHS: simplex_strategy
Flags = npt.NDArray[np.bool_]


@dataclass
class _Basis:
    """Status of every column and row of one step, as HiGHS values."""

    columns: npt.NDArray[np.object_]
    rows: list[Any]


def relax(program: Program, *, limit: float) -> Outcome:
    """Solve the linear program faster than a plain solve, to the same optimum.

    Falls back to the plain solve if a shortcut fails.
    """
    if (program.stand_in == np.arange(program.at_u)).all():
        return _relax(program, limit)
    together, row_of = merged(program)
    return _divided(program, together, row_of, _relax(together, limit))


def merged(program: Program) -> tuple[Program, Ints]:
    """Count replicas and blocks on stand-in pools only.

    Return that program, and the new position of each row of a step.
    """
    stand_in, pools = program.stand_in, program.at_u
    stands = stand_in == np.arange(pools)
    keep = np.ones(program.columns, dtype=np.bool_)
    keep[program.at_x : program.at_b] = stands[program.pairs[:, 0]]
    keep[program.at_b : program.at_s] = stands[program.blocks[:, 0]]
    part, _ = masked(program, keep)
    stays = np.ones(program.rows, dtype=np.bool_)
    stays[:pools] = stands  # the first rows count the GPUs, one row per pool
    position = np.cumsum(stays) - 1
    row_of = position.copy()
    row_of[:pools] = position[stand_in]
    every = np.tile(stays, program.steps)
    rows = int(stays.sum())
    pairs, blocks = keep[program.at_x : program.at_b], keep[program.at_b : program.at_s]
    at_b = program.at_x + int(pairs.sum())
    at_s = at_b + int(blocks.sum())
    less = program.at_s - at_s
    return replace(
        part,
        rows=rows,
        row=row_of[part.row % program.rows] + part.row // program.rows * rows,
        row_lower=program.row_lower[every],
        row_upper=program.row_upper[every],
        row_names=tuple(name for name, flag in zip(program.row_names, stays.tolist(), strict=True) if flag),
        pairs=program.pairs[pairs],
        blocks=program.blocks[blocks],
        pair_price=program.pair_price[pairs],
        at_b=at_b,
        at_s=at_s,
        at_h=program.at_h - less,
        at_y=program.at_y - less,
    ), row_of


def _divided(program: Program, together: Program, row_of: Ints, outcome: Outcome) -> Outcome:
    """Divide a solution of the merged program among the pools in proportion to their instances."""
    if outcome.values is None or outcome.row_dual is None:
        return outcome
    steps, stand_in = program.steps, program.stand_in
    found = outcome.values.reshape(steps, together.columns)
    held = found[:, : program.at_u]
    of_all = np.array([np.bincount(stand_in, row, minlength=program.at_u) for row in held])
    share = np.divide(held, of_all[:, stand_in], out=np.zeros_like(held), where=of_all[:, stand_in] > 0)
    values = np.zeros((steps, program.columns))
    values[:, : program.at_x] = found[:, : program.at_x]
    for listed, columns, source, start in (
        (program.pairs, slice(program.at_x, program.at_b), together.pairs, together.at_x),
        (program.blocks, slice(program.at_b, program.at_s), together.blocks, together.at_b),
    ):
        if len(listed):
            index = np.full((program.at_u, int(listed[:, 1].max()) + 1), -1, dtype=np.int64)
            index[source[:, 0], source[:, 1]] = start + np.arange(len(source))
            values[:, columns] = found[:, index[stand_in[listed[:, 0]], listed[:, 1]]] * share[:, listed[:, 0]]
    values[:, program.at_s :] = found[:, together.at_s :]
    row_dual = outcome.row_dual.reshape(steps, together.rows)[:, row_of].ravel()
    return replace(outcome, values=values.ravel(), row_dual=row_dual, column_dual=_reduced(program, row_dual))


def _relax(program: Program, limit: float) -> Outcome:
    keep = cheapest(program)
    view = highs.view(program)
    bases: list[_Basis] = []
    previous: Floats | None = None
    basis: _Basis | None = None
    for t in range(program.steps):
        step = highs.step(program, view, t, previous)
        if program.steps > 1:
            cost = step.cost.copy()
            cost[program.at_u : program.at_x] *= ALONE
            step = replace(step, cost=cost)
        outcome, basis, keep = _sift(step, keep, basis, limit)
        if outcome.values is None:
            break  # alone, this step cannot follow the one before: solve the whole program
        bases.append(basis)
        previous = outcome.values
        if program.steps == 1:
            return outcome
    else:
        whole = _whole(program, keep, bases, limit)
        if whole is not None:
            return whole
    return highs.run(highs.load(program, whole=False, limit=limit), whole=False)


def cheapest(program: Program, first: int = FIRST) -> Flags:
    """Return which columns of a step enter at first: the `first` cheapest pairs of each service, and all other columns."""
    keep = np.ones(program.columns, dtype=np.bool_)
    pairs = program.pairs
    if not len(pairs):
        return keep
    order = np.lexsort((program.pair_price, pairs[:, 1]))
    rank = np.empty(len(pairs), dtype=np.int64)
    rank[order] = _rank(pairs[order, 1])
    keep[program.at_x : program.at_b] = rank < first
    return keep


def _rank(groups: Ints) -> Ints:
    """Return 0, 1, 2, … within each run of equal values."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))


def masked(program: Program, keep: Flags) -> tuple[Program, Ints]:
    """Drop the columns of a step that are not kept.

    Return that program, and the indices of the remaining columns.
    """
    every = np.tile(keep, program.steps)
    columns = np.flatnonzero(every)
    position = np.full(len(every), -1, dtype=np.int64)
    position[columns] = np.arange(len(columns))
    inside = every[program.col]
    part = replace(
        program,
        columns=int(keep.sum()),
        row=program.row[inside],
        col=position[program.col[inside]],
        val=program.val[inside],
        lower=program.lower[columns],
        upper=program.upper[columns],
        cost=program.cost[columns],
        integer=program.integer[columns],
    )
    return part, columns


def _reduced(program: Program, row_dual: Floats) -> Floats:
    priced = np.bincount(program.col, row_dual[program.row] * program.val, minlength=len(program.cost))
    reduced: Floats = program.cost - priced
    return reduced


def _enter(program: Program, reduced: Floats, keep: Flags) -> Flags:
    """Add columns: of each service, the pairs with the most negative reduced cost over the steps."""
    worst = reduced.reshape(program.steps, program.columns).min(axis=0)
    candidates = np.flatnonzero((worst < -PRICE) & ~keep)
    added = keep.copy()
    if len(candidates):
        service = program.pairs[candidates - program.at_x, 1]
        order = np.lexsort((worst[candidates], service))
        added[candidates[order][_rank(service[order]) < MORE]] = True
    return added


def _spread_out(program: Program, part: Outcome, columns: Ints, row_dual: Floats) -> Outcome:
    values = np.zeros(len(program.cost))
    if part.values is not None:
        values[columns] = part.values
    return replace(part, values=values, column_dual=_reduced(program, row_dual))


def _sift(step: Program, keep: Flags, basis: _Basis | None, limit: float) -> tuple[Outcome, _Basis, Flags]:
    """Solve one step to optimality, from a basis if given."""
    warm, first = basis, FIRST
    for _ in range(ROUNDS):
        part, columns = masked(step, keep)
        solver = highs.load(part, whole=False, limit=limit)
        if warm is not None:
            _set(solver, list(warm.columns[columns]), warm.rows)
            if warm is not basis:
                solver.setOptionValue("simplex_strategy", PRIMAL)  # new columns leave the basis feasible
        outcome = highs.run(solver, whole=False)
        if outcome.values is None or outcome.row_dual is None:
            if keep.all():
                return outcome, _Basis(np.array([]), []), keep
            first *= 4  # too few places: admit more before all
            keep = keep | cheapest(step, first)
            warm = None
            continue
        warm = _get(solver, step.columns, columns)
        added = _enter(step, _reduced(step, outcome.row_dual), keep)
        if (added == keep).all():
            return _spread_out(step, outcome, columns, outcome.row_dual), warm, keep
        keep = added
    keep = np.ones_like(keep)
    solver = highs.load(step, whole=False, limit=limit)
    outcome = highs.run(solver, whole=False)
    return outcome, _get(solver, step.columns, np.arange(step.columns)), keep


def _get(solver: highspy.Highs, width: int, columns: Ints) -> _Basis:
    found = solver.getBasis()
    status = np.full(width, highspy.HighsBasisStatus.kLower, dtype=np.object_)
    status[columns] = np.array(list(found.col_status), dtype=np.object_)
    return _Basis(status, list(found.row_status))


def _set(solver: highspy.Highs, columns: list[Any], rows: list[Any]) -> None:
    basis = highspy.HighsBasis()
    basis.col_status = columns
    basis.row_status = rows
    basis.valid = True
    solver.setBasis(basis)


def _whole(program: Program, keep: Flags, bases: list[_Basis], limit: float) -> Outcome | None:
    rows = [status for basis in bases for status in basis.rows]
    columns_status = np.concatenate([basis.columns for basis in bases])
    for turn in range(ROUNDS):
        part, columns = masked(program, keep)
        solver = highs.load(part, whole=False, limit=limit)
        _set(solver, list(columns_status[columns]), rows)
        if turn:
            solver.setOptionValue("simplex_strategy", PRIMAL)
        outcome = highs.run(solver, whole=False)
        if outcome.values is None or outcome.row_dual is None:
            return None
        added = _enter(program, _reduced(program, outcome.row_dual), keep)
        if (added == keep).all():
            return _spread_out(program, outcome, columns, outcome.row_dual)
        found = _get(solver, len(program.cost), columns)
        columns_status, rows = found.columns, found.rows
        keep = added
    return None
