"""Find the cheapest replicas of one service that cover its demand, also without its largest zone.

A plan step decomposes by service once every GPU has a price. What remains per service is a small covering problem over its
options, one per GPU type and zone. Starting points are even spreads over 1, 2, … zones and the linear program's solution.
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
ZONES = 6  # maximum number of zones in a starting point
ROUNDS = 60
SCARCE = 3  # replicas: an option with less room does not rule out others of its zone
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


def cheapest(options: Options, near: Ints) -> Ints | None:
    """Return the number of replicas per option; None if there is no room.

    `near`: the first starting point, completed if it does not suffice.
    """
    starts = [c for c in (_complete(options, np.minimum(near, options.room)), _spread(options)) if c is not None]
    improved = [_exchange(options, count) for count in starts]
    return min(improved, key=lambda count: float(options.cost @ count), default=None)


def _spread(options: Options) -> Ints | None:
    """Return the cheapest of even spreads over 1, 2, … zones.

    Tries each zone's cheapest option, and each rate used everywhere.
    """
    unit = options.cost / options.rate
    order = np.argsort(unit, kind="stable").tolist()
    rates, zones, rooms = options.rate.tolist(), options.zone.tolist(), options.room.tolist()
    costs = options.cost.tolist()
    best: tuple[float, list[tuple[int, int]]] | None = None
    for only in (None, *sorted(set(rates))):
        first: dict[int, int] = {}
        for o in order:
            if rooms[o] > 0 and (only is None or rates[o] == only):
                first.setdefault(zones[o], o)
        chosen = list(first.values())
        for many in range(2 if options.rest > 0 else 1, min(ZONES, len(chosen)) + 1):
            each = options.target / many
            if options.rest > 0:
                each = max(each, options.rest / (many - 1))
            each = max(each - EPS, EPS)
            price, counts = 0.0, []
            for o in chosen[:many]:
                count = math.ceil(each / rates[o])
                price += costs[o] * count
                if count > rooms[o] or (best is not None and price >= best[0]):
                    break
                counts.append((o, count))
            else:
                best = price, counts
    if best is None:
        return None
    result = np.zeros(len(unit), dtype=np.int64)
    for o, count in best[1]:
        result[o] = count
    return _complete(options, result)  # for the minimum number of replicas


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
    take = _undominated(options)
    its_cost, its_rate, its_zone = cost[take][None, None, :], rate[take][None, None, :], zone[take]
    won, paid = TAKE * its_rate, TAKE * its_cost
    gained = TAKE - GIVE
    tolerance, floor = -1e-9 * float(cost.max()), options.target - options.slack
    count = count.copy()
    loads = options.loads(count)
    for _ in range(ROUNDS):
        give = np.flatnonzero(count)
        saving = paid - GIVE * cost[give][None, :, None]
        lost = GIVE * rate[give][None, :, None]
        after = float(loads.sum()) + won - lost
        kept = (saving < tolerance) & (after >= floor)
        kept &= (count[give][None, :, None] >= GIVE) & ((options.room - count)[take][None, None, :] >= TAKE)
        if options.least:
            kept &= int(count.sum()) + gained >= options.least
        if not kept.any():
            break
        if options.rest > 0:
            source, target = zone[give][:, None], its_zone[None, :]
            inside = source == target
            fuller = loads[target] + won - lost * inside
            emptier = np.where(inside, 0.0, loads[source] - lost)
            largest = np.maximum(np.maximum(_others(loads)[source, target], fuller), emptier)
            kept &= after - largest >= options.rest - options.slack
        k = int(np.where(kept, saving, np.inf).argmin())
        how, i, o = np.unravel_index(k, kept.shape)
        if not kept[how, i, o]:
            break
        while True:  # repeat the same exchange while possible: most starting points are far off
            count[give[i]] -= int(GIVE[how, 0, 0])
            count[take[o]] += int(TAKE[how, 0, 0])
            loads = options.loads(count)
            again = count.copy()
            again[give[i]] -= int(GIVE[how, 0, 0])
            again[take[o]] += int(TAKE[how, 0, 0])
            if again[give[i]] < 0 or again[take[o]] > options.room[take[o]] or not options.enough(again):
                break
    return count


def _undominated(options: Options) -> Ints:
    """Return the options that no option of the same zone beats in both cost and rate."""
    cost, rate = options.cost, options.rate
    order = np.lexsort((-rate, cost, options.zone))
    zone = options.zone[order].tolist()
    rates, rooms = rate[order].tolist(), options.room[order].tolist()
    found, at, best = [], -1, 0.0
    for o, z, r, room in zip(order.tolist(), zone, rates, rooms, strict=True):
        if z != at:
            at, best = z, 0.0
        if r > best:
            found.append(o)
            best = r if room > SCARCE else best  # an option with little room does not rule out others
    return np.array(found, dtype=np.int64)


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
