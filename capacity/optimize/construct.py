"""Construct a plan in integers, step by step, for plans too large for an integer program.

`cover.py` places the replicas of each service where they are cheapest and there is room. Then idle blocks go to free GPUs,
instances are opened where none are free, and instances whose tenants fit elsewhere are closed, the most expensive first.
Every move preserves demand, zones, idle blocks, quotas and supply; stop limits keep instances open. Region shares, start
limits and maximum replicas are only checked at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from capacity.model import Floats, Problem, slot
from capacity.optimize import cover
from capacity.optimize.highs import FEASIBILITY, INTEGRALITY
from capacity.optimize.program import Ints, Program, stand_ins
from capacity.requirements import Need

EPS = 1e-7
MOST = 10**9  # instances, where nothing limits them
SWEEPS = 3
GOOD = 1.005  # times the usual cost of a service: replicas of at most this cost are not improved further
SEVERAL = 1500  # integers
RETRIES = 6  # orders of the services that are tried


class State:
    """The step under construction: what is placed so far, and the room left for more.

    By pool: `n` instances, at least `least` and at most `most`, `before` them in the step before, `free` GPUs. `x[pool, tenant]`:
    tenants are the replicas of each service, then the idle blocks of each place and size, which serve nothing. `served[tenant]` and
    `load[tenant, zone]` in units per second. `left[quota]` GPUs. Prices are per GPU and pool: `held` already, `started`;
    `usual[service]` is the cost of a unit per second in the step before.
    """

    def __init__(self, problem: Problem, need: Need, program: Program, weight: float) -> None:
        """`weight` is that of the cost of a start."""
        services = problem.services
        self.problem, self.need, self.program = problem, need, program
        self.gpus, self.place = np.array([pool.gpus for pool in problem.pools]), np.array(need.place)
        widths = {gpus: [slot(s.gpus, gpus) for s in services] for gpus in set(self.gpus.tolist())}
        place, size = np.array(program.sums, dtype=np.int64).reshape(-1, 2).T
        blocks = np.where(self.place[:, None] == place, size, MOST)
        self.width = np.hstack([np.array([widths[gpus] for gpus in self.gpus.tolist()]), blocks])  # GPUs of a tenant
        self.rate = np.hstack([need.rate, np.zeros(blocks.shape)])
        self.block = {key: len(services) + k for k, key in enumerate(program.sums)}
        self.column = [self.block[need.place[i], w] for i, w in program.blocks.tolist()]  # the tenant of a column
        zones: dict[tuple[str, str], int] = {}
        self.zone = np.array([zones.setdefault((p.region, p.zone), len(zones)) for p in problem.pools])
        self.covers = np.array(
            [[quota.covers(pool) for quota in problem.quotas] for pool in problem.pools], dtype=np.bool_
        )
        self.relief = np.zeros((len(need.groups), len(services)))
        self.weight = np.zeros((len(need.groups), len(size)))  # normalised GPUs of an idle block
        self.blocks_of: list[tuple[Ints, Ints, Floats]] = []  # pools, GPUs of a block, weight of a GPU in it; by group
        for g, group in enumerate(need.groups):
            self.relief[g, list(group.relief)] = list(group.relief.values())
            least, each = np.full(max(need.place) + 1, np.inf), np.zeros(max(need.place) + 1)
            least[list(group.weights)], each[list(group.weights)] = zip(*group.weights.values(), strict=True)
            self.weight[g] = (size >= least[place]) * size * each[place]
            pools = np.flatnonzero(each[self.place])
            self.blocks_of.append((pools, least[self.place[pools]].astype(np.int64), each[self.place[pools]]))
        cost = program.cost[: program.at.u]
        self.held = cost / self.gpus
        self.started = (cost + weight * program.cost[program.at.u : program.at.x]) / self.gpus
        # A replica runs on an instance held before, or on one to be started, the latter at a price of its own. Choices on
        # pools of the same type and zone are a cell: next to each other, the cheapest first.
        pool, start = np.tile(np.arange(len(cost)), 2), np.repeat([False, True], len(cost))
        price, cell = np.where(start, self.started[pool], self.held[pool]), stand_ins(problem.pools)[pool]
        order = np.lexsort((start, pool, price, cell))
        self.choice, self.choice_starts, self.choice_price, self.cell = (v[order] for v in (pool, start, price, cell))
        self.usual = [0.0] * len(services)

    def begin(self, t: int, before: Ints) -> None:
        """Begin step `t` after `before` instances per pool: the least instances are open, and nothing is placed."""
        need, program = self.need, self.program
        upper = program.upper[t * program.columns :]
        self.t, self.before = t, before
        self.most = np.minimum(upper[: program.at.u], before + upper[program.at.u : program.at.x])
        self.most = np.minimum(self.most, MOST).astype(np.int64)
        self.least = program.lower[t * program.columns :][: program.at.u].astype(np.int64)
        self.n, self.free = np.zeros_like(before), np.zeros_like(before)
        self.x = np.zeros(self.rate.shape, dtype=np.int64)
        self.served, self.load = np.zeros(len(self.x.T)), np.zeros((len(self.x.T), int(self.zone.max()) + 1))
        self.left = np.array([quota.gpus for quota in self.problem.quotas]) - (self.gpus * before) @ self.covers
        self.target, self.base, self.cap = need.target[:, t], need.base[:, t], need.cap[:, t]
        self.rest = np.zeros(len(self.x.T))  # required without the largest zone
        self.rest[list(program.spread)] = need.typical[list(program.spread), t] * self.problem.policy.zone_loss
        for p in range(len(before)):
            self.open(p, int(self.least[p]))

    def more(self, p: Any) -> Any:
        """Return how many more instances of a pool, or of each pool of an array, may be opened.

        Instances held before count towards a quota until all starts are done, so only starts use up the rest of a quota.
        """
        bound = self.most[p] - self.n[p]
        if not len(self.left):
            return bound
        starts = np.where(self.covers[p], self.left // self.gpus[p, None], MOST).min(axis=-1)
        return np.minimum(bound, np.maximum(0, self.before[p] - self.n[p]) + np.maximum(0, starts))

    def room(self, p: Any) -> Any:
        """Return the GPUs that are free or on instances that may still be opened, of a pool or of an array of pools."""
        return self.free[p] + np.maximum(0, self.more(p)) * self.gpus[p]

    def open(self, p: int, count: int = 1) -> None:
        """Open instances, or close them (negative `count`)."""
        started = max(0, self.n[p] + count - self.before[p]) - max(0, self.n[p] - self.before[p])
        self.n[p] += count
        self.free[p] += self.gpus[p] * count
        self.left -= self.gpus[p] * started * self.covers[p]

    def put(self, p: int, j: int, count: int) -> None:
        """Place tenants on free GPUs, or take them away (negative `count`)."""
        rate = self.rate[p, j] * count
        self.x[p, j] += count
        self.free[p] -= self.width[p, j] * count
        self.served[j] += rate
        self.load[j, self.zone[p]] += rate

    def zone_would_lack(self, j: int, q: int) -> bool:
        """Return whether a service with one more replica on pool q serves too little without its largest zone."""
        rest, rate = float(self.rest[j]), float(self.rate[q, j])
        largest = max(float(self.load[j].max()), float(self.load[j, self.zone[q]]) + rate)
        return rest > 0 and float(self.served[j]) + rate - largest < rest - EPS * max(1.0, rest)

    def surplus(self) -> Floats:
        """Return the rate of each service beyond the plan that counts as spare, in units per second."""
        spare: Floats = np.clip(self.served[: len(self.base)] - self.base, 0.0, self.cap)
        return spare

    def values(self) -> Floats:
        """Return the values of the step's columns."""
        program, n = self.program, self.n
        largest = self.load[list(program.spread)].max(axis=1) / program.spread_unit
        return np.concatenate(
            [
                n,
                np.maximum(0, n - self.before),
                self.x[program.pairs[:, 0], program.pairs[:, 1]],
                self.x[program.blocks[:, 0], self.column],
                self.x[:, len(self.base) :].sum(axis=0),
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
    before = np.array([pool.held for pool in state.problem.pools])
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


def _step(state: State, t: int, before: Ints, near: Floats) -> bool:
    """Construct step `t` after `before` instances per pool; return whether everything fits."""
    program, services = state.program, state.problem.services
    replicas = np.zeros(state.need.rate.shape, dtype=np.int64)
    replicas[tuple(program.pairs.T)] = near[program.at.x : program.at.b] + EPS
    order = sorted(range(len(services)), key=lambda j: (-services[j].gpus, j))
    for _ in range(RETRIES):
        state.begin(t, before)
        failed = next((j for j in order if not _place(state, j, replicas[:, j])), None)
        if failed is None:
            break
        order = [failed, *(j for j in order if j != failed)]  # the service without room goes first
    else:
        return False
    if not _lay_blocks(state, near[: program.at.u]):
        return False
    _close(state)
    return True


def _place(state: State, j: int, near: Ints) -> bool:
    """Place the cheapest replicas of a service, `near` those per pool, opening instances; return whether all had room."""
    options, pools, start = _options(state, j, near)
    target = float(state.target[j])
    if not len(pools):
        return target <= EPS and not state.problem.services[j].minimum
    counts = cover.cheapest(options, start, GOOD * state.usual[j] * target)
    if counts is None:
        return False
    if target > EPS:
        state.usual[j] = float(options.cost @ counts) / target
    for k in np.flatnonzero(counts).tolist():
        p, count = int(pools[k]), int(counts[k])
        width = int(state.width[p, j]) * count
        if state.room(p) < width:
            return False  # pools that share a quota have less room together
        state.open(p, -(-max(0, width - int(state.free[p])) // int(state.gpus[p])))
        state.put(p, j, count)
    return True


def _options(state: State, j: int, near: Ints) -> tuple[cover.Options, Ints, Ints]:
    """Return the options of a service: of similar pools (type, zone), the cheapest ones that hold all it could need."""
    target, rest, least = float(state.target[j]), float(state.rest[j]), state.problem.services[j].minimum
    fits = state.need.rate[state.choice, j] > 0
    pool, starts, cell = state.choice[fits], state.choice_starts[fits], state.cell[fits]
    rate, width = state.need.rate[pool, j], state.width[pool, j]
    held = (state.free + np.maximum(0, state.before - state.n) * state.gpus)[pool]
    room = state.room(np.arange(len(state.n)))[pool] // width
    held = np.minimum(room, held // width)
    room = np.where(starts, room - held, held)
    enough = np.maximum(np.ceil((target + rest) / rate).astype(np.int64), max(least, 1))
    cheaper = np.cumsum(room) - room  # replicas that the cheaper choices hold, those of other cells included
    room = np.clip(enough - (cheaper - cheaper[np.searchsorted(cell, cell)]), 0, room)
    start, taken = np.minimum(near[pool], room), np.zeros_like(near)
    taken[pool[~starts]] = start[~starts]
    start[starts] = np.minimum((near - taken)[pool], room)[starts]
    kept = room > 0
    pool, start = pool[kept], start[kept]
    zone = np.unique(state.zone[pool], return_inverse=True)[1]
    options = cover.Options(
        cost=(state.choice_price[fits] * width)[kept],
        rate=rate[kept],
        zone=zone,
        room=room[kept],
        target=target,
        rest=rest,
        least=least,
        zones=int(zone.max(initial=-1)) + 1,
    )
    return options, pool, start


def _lay_blocks(state: State, fraction: Floats) -> bool:
    """Reserve the idle blocks of every group, on free GPUs first; return whether there was room for all of them."""
    groups = state.need.groups
    for g in sorted(range(len(groups)), key=lambda g: (-groups[g].size, len(groups[g].weights))):
        required = float(groups[g].required[state.t])
        covered = float(state.relief[g] @ state.surplus() + state.weight[g] @ state.x[:, len(state.base) :].sum(axis=0))
        pools, size, weight = state.blocks_of[g]
        while covered < required - EPS * max(1.0, required):
            full = state.free[pools] < size
            opened = np.where(full, state.n[pools] - fraction[pools], 0.0)
            for k in np.lexsort((state.held[pools] / weight, opened, full)).tolist():
                p, wide = int(pools[k]), int(size[k])
                while state.free[p] < wide and state.more(p) > 0:
                    state.open(p)
                if state.free[p] >= wide:
                    state.put(p, state.block[int(state.place[p]), wide], 1)
                    covered += wide * float(weight[k])
                    break
            else:
                return False
    return True


def _close(state: State) -> None:
    """Close empty instances, and those whose tenants fit elsewhere. Reopen instances above the stop limit."""
    empty = np.minimum(state.free // state.gpus, state.n - state.least)
    for p in np.flatnonzero(empty > 0).tolist():
        state.open(p, -int(empty[p]))
    for _ in range(SWEEPS):
        closed = False
        for p in np.lexsort((-state.held, -state.free * state.held)).tolist():
            while state.n[p] > state.least[p] and _empty_one(state, p):
                closed = True
        if not closed:
            break
    limit = state.problem.policy.max_stop
    if limit is not None:
        over = int(np.maximum(0, state.before - state.n).sum()) - limit
        for p in np.argsort([pool.price for pool in state.problem.pools], kind="stable").tolist():
            while over > 0 and state.n[p] < state.before[p] and state.more(p) > 0:
                state.open(p)
                over -= 1


def _empty_one(state: State, p: int) -> bool:
    """Move tenants until one whole instance of pool p is free, then close it; all or nothing."""
    moved: list[tuple[int, int]] = []
    while state.free[p] < state.gpus[p]:
        move = _move_one(state, p)
        if move is None:
            for j, q in reversed(moved):
                state.put(q, j, -1)
                state.put(p, j, 1)
            return False
        moved.append(move)
    state.open(p, -1)
    return True


def _move_one(state: State, p: int) -> tuple[int, int] | None:
    """Move a tenant of pool p, the smallest replica or else a block, to the fullest pool with room; return which and where."""
    placed = state.x[p].nonzero()[0]
    for j in placed[np.lexsort((state.width[p, placed], placed >= len(state.base)))].tolist():
        state.put(p, j, -1)
        left = state.free - state.width[:, j]
        fits = (left >= 0) & (state.rate[:, j] >= state.rate[p, j])  # no slower pool: surplus may be spare
        fits[p] = False
        targets = fits.nonzero()[0]
        for q in targets[np.argsort(left[targets], kind="stable")].tolist():
            if not state.zone_would_lack(j, q):
                state.put(q, j, 1)
                return j, q
        state.put(p, j, 1)
    return None
