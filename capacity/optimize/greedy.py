"""Construct integer instances from a linear program's solution, for steps too large for an integer program.

`cover.py` places the replicas of each service at the linear program's GPU prices, and again at prices closer to the pools'
own (if the duals of quotas leave a quota unused, its GPUs are cheap after all). Then idle blocks go to free GPUs, instances
are opened where none are free, and instances whose tenants fit elsewhere are closed, the most expensive first. Every move
preserves demand, zones, idle blocks, quotas and supply; stop limits keep instances open. The caller checks the rest (region
mix, start limits, maximum replicas) and falls back to an integer program.
"""

from __future__ import annotations

import math

import numpy as np

from capacity.model import Floats, Problem
from capacity.optimize import cover, step_state
from capacity.optimize.program import Program
from capacity.optimize.step_state import EPS, Known, Shape, State
from capacity.requirements import Need

SWEEPS = 3
RETRIES = 6  # orders of the services that are tried
MANY = 20_000  # maximum pool-service pairs for careful construction
# Factors, pass after pass, on the part of a GPU's shadow price that exceeds its own price: in the first step with care,
# in the first step without, in the first step with over MANY pairs, and in every later step.
SLOWLY = (1.0, 0.7, 0.4, 0.2, 0.0)
FIRST = (1.0, 0.0)
HUGE = (0.3,)
NEXT = (0.0,)


def step(
    problem: Problem,
    need: Need,
    program: Program,
    t: int,
    want: Floats,
    before: list[int],
    worth: Floats,
    last: Floats | None,
    shared: Shape,
    *,
    careful: bool,
) -> Floats | None:
    """Construct step `t` after `before` instances per pool, near the fractional `want`; None if something does not fit.

    `worth`: shadow price of a GPU of each pool in this step. `last`: values of the step before; starting from its replicas
    avoids needless moves. `careful` takes twice the time.
    """
    bounds = slice(t * program.columns, t * program.columns + len(problem.pools))
    own = program.cost[bounds] / np.array([p.gpus for p in problem.pools])
    fraction = [float(v) for v in want[: len(problem.pools)]]
    price = [p.price / p.gpus for p in problem.pools]
    table: list[dict[int, float]] = [{} for _ in problem.services]
    shares = (want if last is None else last)[program.at_x : program.at_b]
    for k in np.flatnonzero(shares > EPS):
        table[int(program.pairs[k, 1])][int(program.pairs[k, 0])] = float(shares[k])
    order = sorted(range(len(problem.services)), key=lambda j: (-problem.services[j].gpus, j))
    keeps: tuple[float, ...]
    if last is not None:
        keeps = NEXT
    elif careful:
        keeps = SLOWLY
    else:
        keeps = HUGE if len(program.pairs) > MANY else FIRST
    for _ in range(RETRIES):
        state = step_state.start(problem, need, program, t, before, shared)
        failed = _fill(state, order, table, [own + keep * (worth - own) for keep in keeps], 2 if careful else 1)
        if failed is None:
            break
        order = [failed, *(j for j in order if j != failed)]  # the service without room goes first
    else:
        return None
    if not _lay_blocks(state, fraction, price):
        return None
    _close(state, price)
    if _trim(state, price):
        _close(state, price)
    _run_spares(state)
    return _values(state, program, before)


def _fill(
    state: State, order: list[int], table: list[dict[int, float]], prices: list[Floats], effort: int
) -> int | None:
    """Place every service at the first prices, then again at the others.

    Return a service without room, else None.
    """
    for worth in prices:
        for j in order:
            if not _place(state, j, table[j], worth, effort):
                return j
    return None


def _seat(state: State, j: int, p: int, count: int) -> bool:
    """Place `count` replicas of service j on pool p, opening instances if allowed; all or none.

    Return whether it succeeded.
    """
    width, gpus = state.shape.width[p][j], state.problem.pools[p].gpus
    lacking = -(-max(0, width * count - state.free[p]) // gpus)
    if lacking:
        if state.room(p) < width * count:
            return False
        state.open(p, lacking)
    state.put(p, j, count)
    return True


def _place(state: State, j: int, share: dict[int, float], worth: Floats, effort: int) -> bool:
    """Place the cheapest replicas of a service at the GPU prices `worth`, where there is room; return whether it is covered.

    Replicas that it already has are put back if nothing cheaper is found.
    """
    had = [(p, state.tenants[p][j]) for p in state.shape.fits[j] if j in state.tenants[p]]
    for p, count in had:
        state.put(p, j, -count)
        state.release(p)
    options, pools = _options(state, j, worth)
    counts = None
    if pools:
        near = dict(had) if had else share
        counts = cover.cheapest(options, np.array([int(near.get(p, 0) + EPS) for p in pools], dtype=np.int64), effort)
    before = sum(float(worth[p]) * state.shape.width[p][j] * count for p, count in had)
    if counts is not None and (not had or float(options.cost @ counts) < before * (1 - EPS)):
        chosen = [(p, count) for p, count in zip(pools, counts.tolist(), strict=True) if count]
        if all(_seat(state, j, p, count) for p, count in chosen):
            return True
        for p in pools:  # pools that share a quota have less room together
            state.put(p, j, -state.tenants[p].get(j, 0))
            state.release(p)
    for p, count in had:
        _seat(state, j, p, count)
    return bool(had) or not (state.lacks(j) or state.zone_lacks(j))


def _options(state: State, j: int, worth: Floats) -> tuple[cover.Options, list[int]]:
    """Return the options of a service: of similar pools (type, zone), the cheapest ones that hold all it could need."""
    target = state.target[j]
    rest = state.rest[j] if j in state.shape.spread else 0.0
    least = state.problem.services[j].minimum
    chosen: list[int] = []
    rooms: list[int] = []
    for cell in state.shape.cells_of[j]:
        enough = max(math.ceil((target + rest) / state.shape.rate[cell[0]][j]), least, 1)
        for p in sorted(cell, key=lambda p: worth[p]) if len(cell) > 1 else cell:
            room = state.room(p) // state.shape.width[p][j]
            if room > 0:
                chosen.append(p)
                rooms.append(min(room, enough))
                enough -= room
            if enough <= 0:
                break
    known = state.shape.known.get(j)
    if known is None or known.pools != chosen:
        numbers: dict[str, int] = {}
        known = state.shape.known[j] = Known(
            chosen,
            np.array(chosen, dtype=np.int64),
            np.array([numbers.setdefault(state.shape.zone[p], len(numbers)) for p in chosen], dtype=np.int64),
            np.array([state.shape.rate[p][j] for p in chosen]),
            np.array([float(state.shape.width[p][j]) for p in chosen]),
            len(numbers),
        )
    most = np.array(rooms, dtype=np.int64)
    cost = worth[known.index] * known.width
    return cover.Options(cost, known.rate, known.zone, most, target, rest, least, known.zones), chosen


def _lay_blocks(state: State, fraction: list[float], price: list[float]) -> bool:
    groups = state.need.groups
    order = sorted(range(len(groups)), key=lambda g: (-groups[g].size, len(groups[g].weights)))
    for g in order:
        group = groups[g]
        required = float(group.required[state.t])
        worth = state.block_worth(g)
        enough = required - EPS * max(1.0, required)
        if worth >= enough:
            continue
        pools = [p for p in range(len(price)) if state.need.place[p] in group.weights]
        while worth < enough:
            ranked = sorted(
                pools,
                key=lambda p: (
                    state.free[p] < group.weights[state.need.place[p]][0],
                    state.n[p] - fraction[p] if state.free[p] < group.weights[state.need.place[p]][0] else 0.0,
                    price[p] / group.weights[state.need.place[p]][1],
                    p,
                ),
            )
            for p in ranked:
                size, weight = group.weights[state.need.place[p]]
                while state.free[p] < size and state.can_open(p):
                    state.open(p)
                if state.free[p] >= size:
                    state.add_block(p, size, 1)
                    worth += size * weight
                    break
            else:
                return False
    return True


def _trim(state: State, price: list[float]) -> bool:
    """Remove unneeded replicas; return whether any was.

    Rounding up for demand and for zones may have added the same one twice.
    """
    taken = False
    uses: list[list[int]] = [[] for _ in state.served]
    for g, group in enumerate(state.need.groups):
        for j in group.relief:
            uses[j].append(g)
    for j in range(len(state.served)):
        held = [p for p in state.shape.fits[j] if state.tenants[p].get(j)]
        for p in sorted(held, key=lambda p: (-price[p] * state.shape.width[p][j], p)):
            one = state.shape.rate[p][j]
            while state.tenants[p].get(j):
                if state.served[j] - one < state.target[j] - EPS * max(1.0, state.target[j]):
                    break
                before = state.surplus(j)
                state.put(p, j, -1)
                spare = before > EPS and state.surplus(j) < before - EPS
                if state.lacks(j) or state.zone_lacks(j) or (spare and any(_short(state, g) for g in uses[j])):
                    state.put(p, j, 1)
                    break
                taken = True
    return taken


def _run_spares(state: State) -> None:
    """Replace idle blocks held for one service only by replicas: same cost, without a wait for their start."""
    groups, t = state.need.groups, state.t
    if not state.with_blocks or all(len(group.services) > 1 for group in groups):
        return
    slack = [state.block_worth(g) - float(group.required[t]) for g, group in enumerate(groups)]
    for group in groups:
        if len(group.services) > 1:
            continue
        j = group.services[0]
        most = state.problem.services[j].maximum
        for p in state.shape.fits[j]:
            size, place = state.shape.width[p][j], state.need.place[p]
            while state.blocks[p].get(size) and (most is None or state.total[j] < most):
                before = state.surplus(j)
                state.add_block(p, size, -1)
                state.put(p, j, 1)
                won = state.surplus(j) - before
                after = list(slack)
                for g, other in enumerate(groups):
                    weight = other.weights.get(place)
                    lost = size * weight[1] if weight is not None and size >= weight[0] else 0.0
                    after[g] += won * other.relief.get(j, 0.0) - lost
                if any(now < -EPS * max(1.0, float(g.required[t])) for now, g in zip(after, groups, strict=True)):
                    state.put(p, j, -1)
                    state.add_block(p, size, 1)
                    break
                slack = after


def _short(state: State, g: int) -> bool:
    required = float(state.need.groups[g].required[state.t])
    return state.block_worth(g) < required - EPS * max(1.0, required)


def _close(state: State, price: list[float]) -> None:
    """Close empty instances, and those whose tenants fit elsewhere.

    Reopen instances above the stop limit.
    """
    for p in range(len(price)):
        state.release(p)
    for _ in range(SWEEPS):
        closed = False
        order = sorted(range(len(price)), key=lambda p: (-state.free[p] * price[p], -price[p], p))
        for p in order:
            while state.n[p] > state.least[p] and _empty_one(state, p):
                closed = True
        if not closed:
            break
    limit = state.problem.policy.max_stop
    if limit is not None:
        over = sum(max(0, b - n) for b, n in zip(state.before, state.n, strict=True)) - limit
        for p in sorted(range(len(price)), key=lambda p: state.problem.pools[p].price):
            while over > 0 and state.n[p] < state.before[p] and state.can_open(p):
                state.open(p)
                over -= 1


def _empty_one(state: State, p: int) -> bool:
    """Move tenants until one whole instance of pool p is free, then close it; all or nothing."""
    gpus = state.problem.pools[p].gpus
    undo: list[tuple[str, int, int, int]] = []
    while state.free[p] < gpus:
        if not (_move_replica(state, p, undo) or _move_block(state, p, undo)):
            for sort, j, source, target in reversed(undo):
                if sort == "replica":
                    state.put(target, j, -1)
                    state.put(source, j, 1)
                else:
                    state.add_block(target, j, -1)
                    state.add_block(source, j, 1)
            return False
    state.open(p, -1)
    return True


def _move_replica(state: State, p: int, undo: list[tuple[str, int, int, int]]) -> bool:
    roomy = [q for q, free in enumerate(state.free) if free > 0 and q != p]
    for j in sorted(state.tenants[p], key=lambda j: state.shape.width[p][j]):
        state.put(p, j, -1)
        free, rate = state.free, state.shape.rate[p][j]  # no slower pool: surplus may be spare
        targets = [q for q in roomy if free[q] >= state.shape.width[q][j] and state.shape.rate[q][j] >= rate]
        targets.sort(key=lambda q: (state.free[q] - state.shape.width[q][j], q))
        for q in targets:
            if not state.zone_would_lack(j, q):
                state.put(q, j, 1)
                undo.append(("replica", j, p, q))
                return True
        state.put(p, j, 1)
    return False


def _move_block(state: State, p: int, undo: list[tuple[str, int, int, int]]) -> bool:
    for size in sorted(state.blocks[p]):
        for q in state.shape.alike[state.need.place[p]]:
            if q != p and state.free[q] >= size:
                state.add_block(p, size, -1)
                state.add_block(q, size, 1)
                undo.append(("block", size, p, q))
                return True
    return False


def _values(state: State, program: Program, before: list[int]) -> Floats:
    count = len(state.n)
    values = np.zeros(program.columns)
    values[:count] = state.n
    values[program.at_u : program.at_u + count] = np.maximum(0, np.array(state.n) - np.array(before))
    placed = np.zeros((count, len(state.total)))
    for p, tenants in enumerate(state.tenants):
        for j, many in tenants.items():
            placed[p, j] = many
    values[program.at_x : program.at_b] = placed[program.pairs[:, 0], program.pairs[:, 1]]
    for k, (i, size) in enumerate(program.blocks):
        values[program.at_b + k] = state.blocks[int(i)].get(int(size), 0)
    for m, (place, size) in enumerate(program.sums):
        values[program.at_s + m] = sum(state.blocks[p].get(size, 0) for p in state.shape.alike[place])
    for k, j in enumerate(program.spare):
        values[program.at_h + k] = state.surplus(j)
    for k, j in enumerate(program.spread):
        unit = program.spread_unit[k]
        values[program.at_y + k] = max(state.by_zone[j].values(), default=0.0) / unit
    return values
