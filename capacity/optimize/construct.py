"""Construct a plan in integers, step by step, for plans too large for an integer program.

`cover.py` places the replicas of each service where they are cheapest and there is room. Then idle blocks go to free GPUs,
instances are opened where none are free, and instances whose tenants fit elsewhere are closed, the most expensive first.
Every move preserves demand, zones, idle blocks, quotas and supply; stop limits keep instances open. Region shares, start
limits and maximum replicas are only checked at the end.
"""

from __future__ import annotations

import math

import numpy as np

from capacity.model import Floats, Problem, slot
from capacity.optimize import cover
from capacity.optimize.highs import FEASIBILITY, INTEGRALITY
from capacity.optimize.program import Program, stand_ins
from capacity.requirements import Need

EPS = 1e-7
SWEEPS = 3
GOOD = 1.005  # times the usual cost of a service: replicas of at most this cost are not improved further
SEVERAL = 1500  # integers
RETRIES = 6  # orders of the services that are tried


class State:
    """The step under construction: what is placed so far, and the room left for more.

    By pool: `n` instances, at least `least` and at most `most`, `before` them in the step before, `free` GPUs. `x[pool, service]`
    replicas, `b[column]` idle blocks. `served[service]` and `load[service, zone]` in units per second. `left[quota]` GPUs. Prices
    are per GPU and pool: `held` already, `started`; `usual[service]` is the cost of a unit per second in the step before.
    """

    def __init__(self, problem: Problem, need: Need, program: Program, weight: float) -> None:
        """`weight` is that of the cost of a start."""
        pools, services = problem.pools, problem.services
        self.problem, self.need, self.program = problem, need, program
        self.gpus = [pool.gpus for pool in pools]
        widths = {gpus: [slot(s.gpus, gpus) for s in services] for gpus in set(self.gpus)}
        self.width = [widths[gpus] for gpus in self.gpus]
        self.rate = need.rate.tolist()
        self.zone = np.unique([f"{p.region}/{p.zone}" for p in pools], return_inverse=True)[1].tolist()
        self.quotas_of = [[q for q, quota in enumerate(problem.quotas) if quota.covers(pool)] for pool in pools]
        self.alike = [[p for p in range(len(pools)) if need.place[p] == k] for k in range(max(need.place) + 1)]
        cells: dict[int, list[int]] = {}  # pools of the same type and zone
        for p, stand_in in enumerate(stand_ins(pools).tolist()):
            cells.setdefault(stand_in, []).append(p)
        self.cells_of = [[c for c in cells.values() if self.rate[c[0]][j] > 0] for j in range(len(services))]
        self.block_at = {(p, size): k for k, (p, size) in enumerate(program.blocks.tolist())}
        place, size = np.array(need.place)[program.blocks[:, 0]], program.blocks[:, 1]
        self.sum_of = [program.sums.index(key) for key in zip(place.tolist(), size.tolist(), strict=True)]
        self.relief = np.zeros((len(need.groups), len(services)))
        self.weight = np.zeros((len(need.groups), len(size)))  # normalised GPUs of an idle block
        for g, group in enumerate(need.groups):
            self.relief[g, list(group.relief)] = list(group.relief.values())
            for k, (least, each) in group.weights.items():
                self.weight[g] += (place == k) * (size >= least) * size * each
        cost = program.cost[: program.at_u]
        self.held = (cost / self.gpus).tolist()
        self.started = ((cost + weight * program.cost[program.at_u : program.at_x]) / self.gpus).tolist()
        self.usual = [0.0] * len(services)

    def begin(self, t: int, before: list[int]) -> None:
        """Begin step `t` after `before` instances per pool: the least instances are open, and nothing is placed."""
        pools, need, columns = self.problem.pools, self.need, self.program.columns
        bounds = slice(t * columns, t * columns + len(pools))
        upper = self.program.upper[bounds].tolist()
        self.t, self.before = t, before
        self.most = [
            int(min(10**9, most, held + pool.start_bound(t == 0)))
            for pool, most, held in zip(pools, upper, before, strict=True)
        ]
        self.least = [int(v) for v in self.program.lower[bounds]]
        self.n, self.free = [0] * len(pools), [0] * len(pools)
        self.x, self.b = np.zeros(need.rate.shape, dtype=np.int64), np.zeros(len(self.block_at), dtype=np.int64)
        self.served, self.load = (
            np.zeros(len(self.problem.services)),
            np.zeros((len(self.problem.services), max(self.zone) + 1)),
        )
        self.left = [
            quota.gpus - sum(pool.gpus * held for pool, held in zip(pools, before, strict=True) if quota.covers(pool))
            for quota in self.problem.quotas
        ]
        self.target, self.base, self.cap = need.target[:, t], need.base[:, t], need.cap[:, t]
        self.rest = np.zeros(len(self.served))  # required without the largest zone
        self.rest[list(self.program.spread)] = need.typical[list(self.program.spread), t]
        self.rest *= self.problem.policy.zone_loss
        for p, least in enumerate(self.least):
            self.open(p, least)

    def more(self, p: int) -> int:
        """Return how many more instances may be opened.

        Instances held before count towards a quota until all starts are done, so only starts use up the rest of a quota.
        """
        bound = self.most[p] - self.n[p]
        if not self.quotas_of[p]:
            return bound
        starts = min(self.left[q] // self.gpus[p] for q in self.quotas_of[p])
        return min(bound, max(0, self.before[p] - self.n[p]) + max(0, starts))

    def room(self, p: int) -> int:
        """Return the GPUs that are free or on instances that may still be opened."""
        return self.free[p] + max(0, self.more(p)) * self.gpus[p]

    def open(self, p: int, count: int = 1) -> None:
        """Open instances, or close them (negative `count`)."""
        started = max(0, self.n[p] + count - self.before[p]) - max(0, self.n[p] - self.before[p])
        self.n[p] += count
        self.free[p] += self.gpus[p] * count
        for q in self.quotas_of[p]:
            self.left[q] -= self.gpus[p] * started

    def put(self, p: int, j: int, count: int) -> None:
        """Place replicas on free GPUs, or take them away (negative `count`)."""
        rate = self.rate[p][j] * count
        self.x[p, j] += count
        self.free[p] -= self.width[p][j] * count
        self.served[j] += rate
        self.load[j, self.zone[p]] += rate

    def add_block(self, p: int, size: int, count: int) -> None:
        self.b[self.block_at[p, size]] += count
        self.free[p] -= size * count

    def zone_would_lack(self, j: int, q: int) -> bool:
        """Return whether a service with one more replica on pool q serves too little without its largest zone."""
        rest, rate = float(self.rest[j]), self.rate[q][j]
        largest = max(float(self.load[j].max()), float(self.load[j, self.zone[q]]) + rate)
        return rest > 0 and float(self.served[j]) + rate - largest < rest - EPS * max(1.0, rest)

    def surplus(self) -> Floats:
        """Return the rate of each service beyond the plan that counts as spare, in units per second."""
        spare: Floats = np.clip(self.served - self.base, 0.0, self.cap)
        return spare

    def values(self) -> Floats:
        """Return the values of the step's columns."""
        program, n = self.program, np.array(self.n)
        sums = np.bincount(self.sum_of, self.b, minlength=len(program.sums))
        largest = self.load[list(program.spread)].max(axis=1) / program.spread_unit
        return np.concatenate(
            [
                n,
                np.maximum(0, n - self.before),
                self.x[program.pairs[:, 0], program.pairs[:, 1]],
                self.b,
                sums,
                self.surplus()[list(program.spare)],
                largest,
            ]
        )


def plan(problem: Problem, need: Need, program: Program, near: Floats) -> Floats | None:
    """Construct all steps near the linear program's solution `near`; None if a constraint cannot be satisfied this way.

    A plan of up to `SEVERAL` integers is constructed twice, also as if starts cost nothing, and the cheaper one counts.
    """
    weights = (1.0, 0.0) if int(program.integer.sum()) <= SEVERAL else (1.0,)
    plans = [_plan(State(problem, need, program, weight), near) for weight in weights]
    return min((p for p in plans if p is not None), key=lambda p: float(program.cost @ p), default=None)


def _plan(state: State, near: Floats) -> Floats | None:
    """Construct all steps; None if something does not fit."""
    program = state.program
    before = [pool.held for pool in state.problem.pools]
    steps: list[Floats] = []
    for t in range(program.steps):
        # Starting from the replicas of the step before avoids needless moves.
        if not _step(state, t, before, steps[-1] if steps else near[: program.columns]):
            return None
        steps.append(state.values())
        before = state.n
    result = np.concatenate(steps)
    reached = np.bincount(program.row, program.val * result[program.col], minlength=len(program.row_lower))
    slack = FEASIBILITY * np.maximum(1.0, np.abs(reached)) * 10
    satisfied = (reached >= program.row_lower - slack) & (reached <= program.row_upper + slack)
    inside = (result <= program.upper + INTEGRALITY) & (result >= program.lower - INTEGRALITY)
    return result if bool(satisfied.all() and inside.all()) else None


def _step(state: State, t: int, before: list[int], near: Floats) -> bool:
    """Construct step `t` after `before` instances per pool; return whether everything fits."""
    program, services = state.program, state.problem.services
    replicas: list[dict[int, int]] = [{} for _ in services]
    for k in np.flatnonzero(near[program.at_x : program.at_b] > EPS):
        i, j = program.pairs[k]
        replicas[int(j)][int(i)] = int(near[program.at_x + k] + EPS)
    order = sorted(range(len(services)), key=lambda j: (-services[j].gpus, j))
    for _ in range(RETRIES):
        state.begin(t, before)
        failed = next((j for j in order if not _place(state, j, replicas[j])), None)
        if failed is None:
            break
        order = [failed, *(j for j in order if j != failed)]  # the service without room goes first
    else:
        return False
    if not _lay_blocks(state, near[: program.at_u].tolist()):
        return False
    _close(state)
    return True


def _place(state: State, j: int, near: dict[int, int]) -> bool:
    """Place the cheapest replicas of a service, opening instances; return whether there was room for all of them."""
    options, pools = _options(state, j)
    target = float(state.target[j])
    if not pools:
        return target <= EPS and not state.problem.services[j].minimum
    start, left = np.zeros(len(pools), dtype=np.int64), dict(near)
    for k, (p, room) in enumerate(zip(pools, options.room.tolist(), strict=True)):
        start[k] = min(left.get(p, 0), room)
        left[p] = left.get(p, 0) - int(start[k])
    counts = cover.cheapest(options, start, GOOD * state.usual[j] * target)
    if counts is None:
        return False
    if target > EPS:
        state.usual[j] = float(options.cost @ counts) / target
    for k in np.flatnonzero(counts).tolist():
        p, count = pools[k], int(counts[k])
        width = state.width[p][j] * count
        if state.room(p) < width:
            return False  # pools that share a quota have less room together
        state.open(p, -(-max(0, width - state.free[p]) // state.gpus[p]))
        state.put(p, j, count)
    return True


def _options(state: State, j: int) -> tuple[cover.Options, list[int]]:
    """Return the options of a service: of similar pools (type, zone), the cheapest ones that hold all it could need."""
    target, rest, least = float(state.target[j]), float(state.rest[j]), state.problem.services[j].minimum
    found: list[tuple[float, int, int]] = []  # cost of a replica, pool, room
    for cell in state.cells_of[j]:
        enough = max(math.ceil((target + rest) / state.rate[cell[0]][j]), least, 1)
        width = state.width[cell[0]][j]
        parts: list[tuple[float, int, int]] = []
        for p in cell:
            room = state.room(p) // width
            held = min(room, (state.free[p] + max(0, state.before[p] - state.n[p]) * state.gpus[p]) // width)
            if held > 0:
                parts.append((state.held[p] * width, p, held))
            if room > held:
                parts.append((state.started[p] * width, p, room - held))
        for cost, p, room in sorted(parts):
            if enough > 0:
                found.append((cost, p, min(room, enough)))
                enough -= room
    pools = [p for _, p, _ in found]
    zones: dict[int, int] = {}
    options = cover.Options(
        cost=np.array([cost for cost, _, _ in found]),
        rate=np.array([state.rate[p][j] for p in pools]),
        zone=np.array([zones.setdefault(state.zone[p], len(zones)) for p in pools], dtype=np.int64),
        room=np.array([room for _, _, room in found], dtype=np.int64),
        target=target,
        rest=rest,
        least=least,
        zones=len(zones),
    )
    return options, pools


def _lay_blocks(state: State, fraction: list[float]) -> bool:
    """Reserve the idle blocks of every group, on free GPUs first; return whether there was room for all of them."""
    groups, place = state.need.groups, state.need.place
    for g in sorted(range(len(groups)), key=lambda g: (-groups[g].size, len(groups[g].weights))):
        weights = groups[g].weights
        required = float(groups[g].required[state.t])
        covered = float(state.relief[g] @ state.surplus() + state.weight[g] @ state.b)
        pools = [p for p in range(len(place)) if place[p] in weights]

        def rank(p: int, weights: dict[int, tuple[int, float]] = weights) -> tuple[bool, float, float, int]:
            size, weight = weights[place[p]]
            full = state.free[p] < size
            return full, state.n[p] - fraction[p] if full else 0.0, state.held[p] / weight, p

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


def _close(state: State) -> None:
    """Close empty instances, and those whose tenants fit elsewhere. Reopen instances above the stop limit."""
    price, pools = state.held, range(len(state.held))
    for p in pools:
        state.open(p, -max(0, min(state.free[p] // state.gpus[p], state.n[p] - state.least[p])))
    for _ in range(SWEEPS):
        closed = False
        for p in sorted(pools, key=lambda p: (-state.free[p] * price[p], -price[p], p)):
            while state.n[p] > state.least[p] and _empty_one(state, p):
                closed = True
        if not closed:
            break
    limit = state.problem.policy.max_stop
    if limit is not None:
        over = sum(max(0, b - n) for b, n in zip(state.before, state.n, strict=True)) - limit
        for p in sorted(pools, key=lambda p: state.problem.pools[p].price):
            while over > 0 and state.n[p] < state.before[p] and state.more(p) > 0:
                state.open(p)
                over -= 1


def _empty_one(state: State, p: int) -> bool:
    """Move tenants until one whole instance of pool p is free, then close it; all or nothing."""
    undo: list[tuple[bool, int, int]] = []
    while state.free[p] < state.gpus[p]:
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
    for j in sorted(np.flatnonzero(state.x[p]).tolist(), key=lambda j: state.width[p][j]):
        state.put(p, j, -1)
        free, rate = state.free, state.rate[p][j]  # no slower pool: surplus may be spare
        targets = [q for q in roomy if free[q] >= state.width[q][j] and state.rate[q][j] >= rate]
        targets.sort(key=lambda q: (state.free[q] - state.width[q][j], q))
        for q in targets:
            if not state.zone_would_lack(j, q):
                state.put(q, j, 1)
                undo.append((True, j, q))
                return True
        state.put(p, j, 1)
    return False


def _move_block(state: State, p: int, undo: list[tuple[bool, int, int]]) -> bool:
    for k in np.flatnonzero((state.program.blocks[:, 0] == p) & (state.b > 0)):
        size = int(state.program.blocks[k, 1])
        for q in state.alike[state.need.place[p]]:
            if q != p and state.free[q] >= size:
                state.add_block(p, size, -1)
                state.add_block(q, size, 1)
                undo.append((False, size, q))
                return True
    return False
