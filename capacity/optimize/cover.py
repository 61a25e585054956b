"""Find the cheapest replicas of one service that cover its demand, also without its largest zone.

A plan step decomposes by service once every GPU has a price. What remains per service is a small covering problem over its
options, one per GPU type and zone. Starting points are a dynamic program over rounded loads and the linear program's solution.
Each is improved by exchanging up to three replicas of one option for up to three of another while that is
cheaper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from capacity.model import Floats
from capacity.optimize.program import Ints

EPS = 1e-7
GRID = 64  # maximum units of load
MANY = 50  # options from which only the dynamic program is a starting point
CAPS = 12  # maximum caps on a zone's load that are tried
ROUNDS = 60
GIVE = np.array([1, 1, 2, 1, 3, 1, 3, 2])[:, None, None]
TAKE = np.array([0, 1, 1, 2, 1, 3, 2, 3])[:, None, None]


@dataclass(frozen=True)
class Options:
    """Options for the replicas of a service; arrays of equal length.

    `cost` of one replica, `rate` in units per second per replica, `zone` numbers from 0, `room` the maximum replicas.
    `target`: units per second in total; `rest`: units per second without the largest zone; `least`: minimum replicas;
    `zones`: number of zones.
    """

    cost: Floats
    rate: Floats
    zone: Ints
    room: Ints
    target: float
    rest: float
    least: int
    zones: int

    @property
    def slack(self) -> float:
        return EPS * max(1.0, self.target)

    def loads(self, count: Ints) -> Floats:
        """Return the units per second served in each zone."""
        found: Floats = np.bincount(self.zone, count * self.rate, minlength=self.zones).astype(np.float64)
        return found

    def missing(self, loads: Floats) -> float:
        """Return the missing units per second, in total or without the largest zone, whichever is larger."""
        total = float(loads.sum())
        lack = self.target - total
        return max(lack, self.rest - (total - float(loads.max()))) if self.rest > 0 else lack

    def enough(self, count: Ints) -> bool:
        return self.missing(self.loads(count)) <= self.slack and int(count.sum()) >= self.least


def cheapest(options: Options, near: Ints, good: float = 0.0) -> Ints | None:
    """Return the number of replicas per option; None if there is no room.

    `near`: the first starting point, completed if it does not suffice. If it leads to a cost of at most `good`, no other is tried.
    """
    best: Ints | None = None
    for begin in (_divide,) if not good and len(options.cost) > MANY else (_near, _divide):
        start = begin(options, near)
        if start is not None:
            found = _exchange(options, start)
            if best is None or options.cost @ found < options.cost @ best:
                best = found
            if options.cost @ best <= good:
                break
    return best


def _near(options: Options, near: Ints) -> Ints | None:
    return _complete(options, np.minimum(near, options.room))


def _divide(options: Options, _near: Ints) -> Ints | None:
    """Return the cheapest replicas by dynamic programming over loads of the zones, in whole units of the demand.

    First the cheapest way to serve each load in each zone, one rate after the other. Then, for each of a few caps on the
    load of a zone, the cheapest division of the demand, which the cap decides: the rest without a zone at its cap must do.
    Loads are rounded down to units, so the result suffices, and where the rates are multiples of the unit it is the optimum.
    """
    spread = options.rest > 0
    rates = np.unique(options.rate)
    unit = _unit(rates, max(options.target, 2 * options.rest))
    top = max(1, math.ceil((options.rest if spread else options.target) / unit - EPS))
    if spread:
        top = max(top, math.ceil(options.target / unit / options.zones - EPS))
    load = np.arange(top + 1)
    most = np.ceil(top * unit / rates - EPS).astype(np.int64)
    prices = _prices(options, rates, most)
    served = [np.where(load == 0, 0.0, np.inf) * np.ones((options.zones, 1))]  # [zone, load] cost, after each rate
    left = []  # [replicas, load] load that is left, of each rate
    for rate, many, price in zip(rates, most, prices, strict=True):
        taken = np.arange(many + 1)[:, None] * (rate / unit)
        left.append(np.maximum(0, np.ceil(load - taken - EPS)).astype(np.int64))
        served.append((served[-1].take(left[-1], axis=1) + price[:, : many + 1, None]).min(axis=1))
    caps = np.unique(np.geomspace(1, top, CAPS).round().astype(np.int64)) if spread else np.array([top])
    need = np.maximum(options.target, options.rest + caps * unit) if spread else np.array([options.target])
    need = np.ceil(need / unit - EPS).astype(np.int64)
    caps, need = caps[caps * options.zones >= need], need[caps * options.zones >= need]
    if not len(caps):
        return None
    zone_cost = served[-1][:, None] + np.where(load <= caps[:, None], 0.0, np.inf)  # [zone, cap, load]
    cost = [np.full((len(caps), int(need.max()) + 1), np.inf)]  # [cap, load of all zones so far], after each zone
    cost[0][:, 0] = 0.0
    before = np.maximum(0, np.arange(cost[0].shape[1]) - load[:, None])  # [load here, load]; beyond the need is free
    for here in zone_cost:
        cost.append((cost[-1].take(before, axis=1) + here[:, :, None]).min(axis=1))
    cap = int(cost[-1][np.arange(len(caps)), need].argmin())
    at = int(need[cap])
    if not np.isfinite(cost[-1][cap, at]):
        return None
    # Only minima were kept; the choices are found again along the cheapest way alone.
    order = np.argsort(options.cost, kind="stable")
    result = np.zeros(len(options.cost), dtype=np.int64)
    for z in reversed(range(options.zones)):
        here = int((cost[z][cap, before[:, at]] + zone_cost[z, cap]).argmin())
        at = int(before[here, at])
        for k in reversed(range(len(rates))):
            many = int((served[k][z, left[k][:, here]] + prices[k, z, : most[k] + 1]).argmin())
            here = int(left[k][many, here])
            for o in order[(options.zone[order] == z) & (options.rate[order] == rates[k])].tolist():
                result[o] = min(many, int(options.room[o]))
                many -= int(result[o])
    return _complete(options, result)  # for the minimum number of replicas


def _prices(options: Options, rates: Floats, most: Ints) -> Floats:
    """Return the cost of the cheapest 0, 1, 2, … replicas of each rate in each zone, as [rate, zone, replicas]."""
    kind = np.searchsorted(rates, options.rate)
    group = kind * options.zones + options.zone
    order = np.lexsort((options.cost, group))
    each = np.repeat(order, np.minimum(options.room, most[kind])[order])
    rank = np.arange(len(each)) - np.searchsorted(group[each], group[each])
    each, rank = each[rank < most.max()], rank[rank < most.max()]
    price = np.full((len(rates), options.zones, int(most.max()) + 1), np.inf)
    price[:, :, 0] = 0.0
    price[kind[each], options.zone[each], rank + 1] = options.cost[each]
    result: Floats = price.cumsum(axis=2)
    return result


def _unit(rates: Floats, most: float) -> float:
    """Return the unit of load: one of which all rates are multiples, if `most` is not too many of it."""
    least = float(rates[0])
    parts = next((d for d in range(1, 9) if np.abs(rates / least * d - np.round(rates / least * d)).max() < EPS), 1)
    return next((least / d for d in (parts, 2, 1) if d <= parts and most * d <= GRID * least), most / GRID)


def _complete(options: Options, start: Ints) -> Ints | None:
    """Add replicas one at a time, each the cheapest per unit of missing rate that it adds; None if there is no room."""
    count = start.copy()
    while True:
        loads = options.loads(count)
        missing = options.missing(loads)
        short = missing > options.slack
        if not short and int(count.sum()) >= options.least:
            return count
        useful = count < options.room
        if short and options.rest > 0 and float(loads.max()) > 0:
            # Another replica in the largest zone adds nothing to the rate without that zone.
            elsewhere = useful & (options.zone != int(loads.argmax()))
            if not elsewhere.any() and options.target - float(loads.sum()) <= options.slack:
                return None
            useful = elsewhere if elsewhere.any() else useful
        if not useful.any():
            return None
        each = options.cost / np.minimum(options.rate, missing) if short else options.cost
        count[int(np.where(useful, each, np.inf).argmin())] += 1


def _exchange(options: Options, count: Ints) -> Ints:
    """Exchange replicas while that is cheaper and the requirements stay met."""
    cost, rate, zone = options.cost, options.rate, options.zone
    won, paid, gained = TAKE * rate, TAKE * cost, TAKE - GIVE
    tolerance, floor = -1e-9 * float(cost.max()), options.target - options.slack
    count = count.copy()
    loads = options.loads(count)
    for _ in range(ROUNDS):
        give = count.nonzero()[0]
        saving = paid - GIVE * cost[give][None, :, None]
        lost = GIVE * rate[give][None, :, None]
        after = float(loads.sum()) + won - lost
        kept = (saving < tolerance) & (after >= floor)
        kept &= (count[give][None, :, None] >= GIVE) & (options.room - count >= TAKE)
        if options.least:
            kept &= int(count.sum()) + gained >= options.least
        if not kept.any():
            break
        if options.rest > 0:
            source, target = zone[give][:, None], zone[None, :]
            inside = source == target
            fuller = loads[target] + won - lost * inside
            emptier = np.where(inside, 0.0, loads[source] - lost)
            largest = np.maximum(np.maximum(_others(loads)[source, target], fuller), emptier)
            kept &= after - largest >= options.rest - options.slack
        k = int(np.where(kept, saving, np.inf).argmin())
        how, i, o = np.unravel_index(k, kept.shape)
        if not kept[how, i, o]:
            break
        count[give[i]] -= int(GIVE[how, 0, 0])
        count[o] += int(TAKE[how, 0, 0])
        loads = options.loads(count)
    return count


def _others(loads: Floats) -> Floats:
    """Return, as [zone, zone], the largest load of all zones except these two."""
    order = np.argsort(-loads, kind="stable")[:3]
    size = len(loads)
    found = np.full((size, size), float(loads[order[0]]))
    first = int(order[0])
    second = float(loads[order[1]]) if size > 1 else 0.0
    found[first, :] = found[:, first] = second
    if size > 1:
        third = float(loads[order[2]]) if size > 2 else 0.0
        found[first, int(order[1])] = found[int(order[1]), first] = third
    return found
