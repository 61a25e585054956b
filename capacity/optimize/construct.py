"""Construct a plan in integers, step by step, for plans too large for an integer program.

`cover.py` places the replicas of each service where they are cheapest and there is room. Then idle blocks go to free GPUs,
instances are opened where none are free, and instances whose tenants fit elsewhere are closed, the most expensive first.
Every move preserves demand, zones, idle blocks, quotas and supply; stop limits keep instances open. Region shares, start
limits and maximum replicas are only checked at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from capacity.model import Floats, Problem
from capacity.optimize import cover, step_state
from capacity.optimize.highs import FEASIBILITY, INTEGRALITY
from capacity.optimize.program import Program
from capacity.optimize.step_state import EPS, Shape, State
from capacity.requirements import Need

SWEEPS = 3
GOOD = 1.01  # times the usual cost of a service
SEVERAL = 1500  # integers
RETRIES = 6  # orders of the services that are tried


@dataclass(frozen=True)
class Prices:
    """Prices of a GPU by pool, on instances held already and on those to be started.

    `usual`: the cost of a unit per second of each service in the step before; one of at most GOOD times that is not improved further.
    """

    held: list[float]
    started: list[float]
    usual: list[float]


def plan(problem: Problem, need: Need, program: Program, near: Floats) -> Floats | None:
    """Construct all steps near the linear program's solution `near`; None if a constraint cannot be satisfied this way.

    A plan of up to `SEVERAL` integers is constructed twice, also as if starts cost nothing, and the cheaper one counts.
    """
    shape = step_state.shape(problem, need, program)
    weights = (1.0, 0.0) if int(program.integer.sum()) <= SEVERAL else (1.0,)
    plans = [_plan(problem, need, program, near, shape, weight) for weight in weights]
    return min((p for p in plans if p is not None), key=lambda p: float(program.cost @ p), default=None)


def _plan(problem: Problem, need: Need, program: Program, near: Floats, shape: Shape, weight: float) -> Floats | None:
    """Construct all steps with the cost of a start times `weight`."""
    before = [pool.held for pool in problem.pools]
    gpus, cost = [pool.gpus for pool in problem.pools], program.cost[: program.columns]
    held, start = cost[: len(gpus)] / gpus, cost[program.at_u : program.at_x] / gpus
    prices = Prices(held.tolist(), (held + weight * start).tolist(), [0.0] * len(problem.services))
    steps: list[Floats] = []
    for t in range(program.steps):
        # Starting from the replicas of the step before avoids needless moves.
        values = _step(
            problem, need, program, t, before, steps[-1] if steps else near[: program.columns], shape, prices
        )
        if values is None:
            return None
        steps.append(values)
        before = [int(v) for v in values[: len(before)]]
    result = np.concatenate(steps)
    reached = np.bincount(program.row, program.val * result[program.col], minlength=len(program.row_lower))
    slack = FEASIBILITY * np.maximum(1.0, np.abs(reached)) * 10
    satisfied = (reached >= program.row_lower - slack) & (reached <= program.row_upper + slack)
    inside = (result <= program.upper + INTEGRALITY) & (result >= program.lower - INTEGRALITY)
    return result if bool(satisfied.all() and inside.all()) else None


def _step(
    problem: Problem,
    need: Need,
    program: Program,
    t: int,
    before: list[int],
    near: Floats,
    shape: Shape,
    prices: Prices,
) -> Floats | None:
    """Construct step `t` after `before` instances per pool; None if something does not fit."""
    pools = len(problem.pools)
    replicas: list[dict[int, int]] = [{} for _ in problem.services]
    for k in np.flatnonzero(near[program.at_x : program.at_b] > EPS):
        i, j = program.pairs[k]
        replicas[int(j)][int(i)] = int(near[program.at_x + k] + EPS)
    order = sorted(range(len(problem.services)), key=lambda j: (-problem.services[j].gpus, j))
    for _ in range(RETRIES):
        state = step_state.start(problem, need, program, t, before, shape)
        failed = next((j for j in order if not _place(state, j, replicas[j], prices)), None)
        if failed is None:
            break
        order = [failed, *(j for j in order if j != failed)]  # the service without room goes first
    else:
        return None
    if not _lay_blocks(state, near[:pools].tolist(), prices.held):
        return None
    _close(state, prices.held)
    return _values(state, program, before)


def _place(state: State, j: int, near: dict[int, int], price: Prices) -> bool:
    """Place the cheapest replicas of a service at these prices per GPU; return whether there was room for all of them."""
    options, pools = _options(state, j, price)
    if not pools:
        return state.target[j] <= EPS and not state.problem.services[j].minimum
    start, left = np.zeros(len(pools), dtype=np.int64), dict(near)
    for k, (p, room) in enumerate(zip(pools, options.room.tolist(), strict=True)):
        start[k] = min(left.get(p, 0), room)
        left[p] = left.get(p, 0) - int(start[k])
    counts = cover.cheapest(options, start, GOOD * price.usual[j] * state.target[j])
    if counts is not None and state.target[j] > EPS:
        price.usual[j] = float(options.cost @ counts) / state.target[j]
    return counts is not None and all(
        _seat(state, j, p, count) for p, count in zip(pools, counts.tolist(), strict=True) if count
    )


def _seat(state: State, j: int, p: int, count: int) -> bool:
    """Place `count` replicas of a service on a pool, opening instances if allowed; all or none."""
    width = state.shape.width[p][j] * count
    if state.room(p) < width:
        return False  # pools that share a quota have less room together
    lacking = max(0, width - state.free[p])
    if lacking:
        state.open(p, -(-lacking // state.problem.pools[p].gpus))
    state.put(p, j, count)
    return True


def _options(state: State, j: int, price: Prices) -> tuple[cover.Options, list[int]]:
    """Return the options of a service: of similar pools (type, zone), the cheapest ones that hold all it could need."""
    target = state.target[j]
    rest = state.rest[j] if j in state.shape.spread else 0.0
    least = state.problem.services[j].minimum
    pools: list[int] = []
    rooms: list[int] = []
    costs: list[float] = []
    for cell in state.shape.cells_of[j]:
        enough = max(math.ceil((target + rest) / state.shape.rate[cell[0]][j]), least, 1)
        parts: list[tuple[float, int, int]] = []
        for p in cell:
            width, room = state.shape.width[p][j], state.room(p) // state.shape.width[p][j]
            held = state.free[p] + max(0, state.before[p] - state.n[p]) * state.problem.pools[p].gpus
            parts += [
                (price.held[p], p, min(room, held // width)),
                (price.started[p], p, room - min(room, held // width)),
            ]
        for each, p, room in sorted(parts):
            if room > 0 and enough > 0:
                pools.append(p)
                costs.append(each * state.shape.width[p][j])
                rooms.append(min(room, enough))
                enough -= room
    zones: dict[str, int] = {}
    options = cover.Options(
        cost=np.array(costs),
        rate=np.array([state.shape.rate[p][j] for p in pools]),
        zone=np.array([zones.setdefault(state.shape.zone[p], len(zones)) for p in pools], dtype=np.int64),
        room=np.array(rooms, dtype=np.int64),
        target=target,
        rest=rest,
        least=least,
        zones=len(zones),
    )
    return options, pools


def _lay_blocks(state: State, fraction: list[float], price: list[float]) -> bool:
    """Reserve the idle blocks of every group, on free GPUs first; return whether there was room for all of them."""
    groups, place = state.need.groups, state.need.place
    for g in sorted(range(len(groups)), key=lambda g: (-groups[g].size, len(groups[g].weights))):
        weights = groups[g].weights
        required = float(groups[g].required[state.t])
        covered = state.covered(g)
        pools = [p for p in range(len(price)) if place[p] in weights]

        def rank(p: int, weights: dict[int, tuple[int, float]] = weights) -> tuple[bool, float, float, int]:
            size, weight = weights[place[p]]
            full = state.free[p] < size
            return full, state.n[p] - fraction[p] if full else 0.0, price[p] / weight, p

        while covered < required - EPS * max(1.0, required):
            for p in sorted(pools, key=rank):
                size, weight = weights[place[p]]
                while state.free[p] < size and state.more(p) > 0:
                    state.open(p)
                if state.free[p] >= size:
                    state.add_block(p, size, 1)
                    covered += size * weight
                    break
            else:
                return False
    return True


def _close(state: State, price: list[float]) -> None:
    """Close empty instances, and those whose tenants fit elsewhere. Reopen instances above the stop limit."""
    for p, pool in enumerate(state.problem.pools):
        spare = min(state.free[p] // pool.gpus, state.n[p] - state.least[p])
        if spare > 0:
            state.open(p, -spare)
    for _ in range(SWEEPS):
        closed = False
        for p in sorted(range(len(price)), key=lambda p: (-state.free[p] * price[p], -price[p], p)):
            while state.n[p] > state.least[p] and _empty_one(state, p):
                closed = True
        if not closed:
            break
    limit = state.problem.policy.max_stop
    if limit is not None:
        over = sum(max(0, b - n) for b, n in zip(state.before, state.n, strict=True)) - limit
        for p in sorted(range(len(price)), key=lambda p: state.problem.pools[p].price):
            while over > 0 and state.n[p] < state.before[p] and state.more(p) > 0:
                state.open(p)
                over -= 1


def _empty_one(state: State, p: int) -> bool:
    """Move tenants until one whole instance of pool p is free, then close it; all or nothing."""
    undo: list[tuple[bool, int, int]] = []
    while state.free[p] < state.problem.pools[p].gpus:
        if not (_move_replica(state, p, undo) or _move_block(state, p, undo)):
            for is_replica, what, target in reversed(undo):
                move = state.put if is_replica else state.add_block
                move(target, what, -1)
                move(p, what, 1)
            return False
    state.open(p, -1)
    return True


def _move_replica(state: State, p: int, undo: list[tuple[bool, int, int]]) -> bool:
    roomy = [q for q, free in enumerate(state.free) if free > 0 and q != p]
    for j in sorted(state.tenants[p], key=lambda j: state.shape.width[p][j]):
        state.put(p, j, -1)
        free, rate = state.free, state.shape.rate[p][j]  # no slower pool: surplus may be spare
        targets = [q for q in roomy if free[q] >= state.shape.width[q][j] and state.shape.rate[q][j] >= rate]
        targets.sort(key=lambda q: (state.free[q] - state.shape.width[q][j], q))
        for q in targets:
            if not state.zone_would_lack(j, q):
                state.put(q, j, 1)
                undo.append((True, j, q))
                return True
        state.put(p, j, 1)
    return False


def _move_block(state: State, p: int, undo: list[tuple[bool, int, int]]) -> bool:
    for size in sorted(state.blocks[p]):
        for q in state.shape.alike[state.need.place[p]]:
            if q != p and state.free[q] >= size:
                state.add_block(p, size, -1)
                state.add_block(q, size, 1)
                undo.append((False, size, q))
                return True
    return False


def _values(state: State, program: Program, before: list[int]) -> Floats:
    """Return the values of a step's columns."""
    pools = len(state.n)
    values = np.zeros(program.columns)
    values[:pools] = state.n
    values[program.at_u : program.at_u + pools] = np.maximum(0, np.array(state.n) - np.array(before))
    for k, (i, j) in enumerate(program.pairs.tolist()):
        values[program.at_x + k] = state.tenants[i].get(j, 0)
    for k, (i, size) in enumerate(program.blocks.tolist()):
        values[program.at_b + k] = state.blocks[i].get(size, 0)
    for m, (place, size) in enumerate(program.sums):
        values[program.at_s + m] = sum(state.blocks[p].get(size, 0) for p in state.shape.alike[place])
    for k, j in enumerate(program.spare):
        values[program.at_h + k] = state.surplus(j)
    for k, j in enumerate(program.spread):
        values[program.at_y + k] = max(state.by_zone[j].values(), default=0.0) / program.spread_unit[k]
    return values
