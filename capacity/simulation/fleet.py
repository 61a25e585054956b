"""The simulated fleet: instances boot, replicas start, requests wait for a replica in order of arrival.

Time advances in ticks; within a tick requests are served at their exact times. A request waits from its arrival until a
slot of a ready replica takes it. A replica has `concurrency` slots and serves its rate when all are busy. Instances are
paid from the granted request until they are gone. A removed replica finishes its running requests. An interrupted instance
removes its replicas, and their requests wait again at the head of the queue.

With the ladder of sleep a drained replica rests in standby: it frees its GPUs and keeps host memory of its instance, the
oldest making room, and wakes there in its standby's wake time. Without one, a replica starts asleep (restored) or cold.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace

import numpy as np

from capacity.model import Floats, Kind, Problem, Service, slot

NEVER = float("inf")


@dataclass(eq=False)
class Instance:
    pool: int
    asked: float
    ready: float
    free: int  # GPUs
    replicas: list[Replica] = field(default_factory=list)
    resting: list[tuple[int, float]] = field(default_factory=list)  # service, since: in standby, oldest first

    def rests(self, service: int) -> bool:
        return any(j == service for j, _ in self.resting)


@dataclass(eq=False)
class Replica:
    service: int
    hosts: list[Instance]
    ready: float
    seconds: float  # per unit of work in one slot
    inflight: list[int]  # request in each slot, -1 before the first
    alive: bool = True
    drained: float = NEVER
    finishing: list[tuple[float, int]] = field(default_factory=list)  # end, request: of a removed replica


@dataclass
class Queue:
    """Requests of one service. `slots` is a heap of (free at, order, slot, replica)."""

    at: list[float]
    work: list[float]
    waits: Floats
    total: Floats  # cumulative work before each request
    head: int = 0
    retry: list[int] = field(default_factory=list)
    slots: list[tuple[float, int, int, Replica]] = field(default_factory=list)
    busy_gpu_seconds: float = 0.0

    def drop(self, replica: Replica) -> list[tuple[float, int]]:
        """Remove the slots of a replica; return the end and the number of each request in them."""
        found = [(end, replica.inflight[k]) for end, _, k, owner in self.slots if owner is replica]
        self.slots = sorted(entry for entry in self.slots if entry[3] is not replica)
        return [(end, request) for end, request in found if request >= 0]


class Fleet:
    """State of the fleet and the operations on it.

    `kind`: which lead times the replicas have. `ladder`: drained replicas go to standby where their service has one.
    """

    def __init__(
        self,
        problem: Problem,
        arrivals: list[tuple[Floats, Floats]],
        kind: Kind,
        *,
        seed: int,
        refusals: float,
        interruptions: float,
        ladder: bool = False,
    ) -> None:
        self.problem = problem
        self.kind = kind
        self.ladder = ladder
        self.standby_gib_seconds = 0.0
        self.starts = {"standby": 0, kind: 0}
        self.random = np.random.default_rng(seed)
        self.refusals = refusals
        self.interruptions = interruptions
        self.now = 0.0
        self.instances: list[list[Instance]] = [[] for _ in problem.pools]
        self.replicas: list[list[Replica]] = [[] for _ in problem.services]
        self.queues = [
            Queue(at.tolist(), work.tolist(), np.full(len(at), NEVER), np.concatenate([[0.0], np.cumsum(work)]))
            for at, work in arrivals
        ]
        self.draining: list[Replica] = []
        self.paid_gpu_seconds = 0.0
        self.cost = 0.0
        self.actions = 0
        self.order = 0
        self.refused: dict[int, tuple[int, int]] = {}
        self.width = [[slot(s.gpus, p.gpus) for s in problem.services] for p in problem.pools]
        self.last = max((queue.at[-1] for queue in self.queues if queue.at), default=0.0)  # length of the trace
        self.cheapest = [self._by_price(s) for s in problem.services]

    def _by_price(self, service: Service) -> list[int]:
        fits = [i for i, pool in enumerate(self.problem.pools) if service.fits(pool)]

        def price(i: int) -> tuple[float, int]:
            pool = self.problem.pools[i]
            return pool.price / pool.gpus * slot(service.gpus, pool.gpus) / (service.rate_on(pool.gpu) or 1.0), i

        return sorted(fits, key=price)

    def sample(self, samples: tuple[float, ...]) -> float:
        return samples[int(self.random.integers(len(samples)))]

    # Operations for policies.

    def room(self, i: int) -> int:
        """Return how many more instances of a pool its quotas allow."""
        pool = self.problem.pools[i]
        left = 10**9 if pool.quota is None else pool.quota - len(self.instances[i])
        for quota in self.problem.quotas:
            if quota.covers(pool):
                held = sum(
                    len(self.instances[k]) * other.gpus
                    for k, other in enumerate(self.problem.pools)
                    if quota.covers(other)
                )
                left = min(left, (quota.gpus - held) // pool.gpus)
        return max(0, left)

    def start_instances(self, i: int, count: int, *, booted: bool = False) -> int:
        """Request instances; return how many were granted. `booted`: ready from the beginning."""
        pool = self.problem.pools[i]
        count = min(count, self.room(i))
        granted = 0
        for _ in range(count):
            if not booted and self.refusals and self.random.random() < self.refusals:
                break
            ready = self.now if booted else self.now + self.sample(pool.boot)
            self.instances[i].append(Instance(i, self.now, ready, pool.gpus))
            granted += 1
        if granted < count:
            self.refused[i] = (count, granted)
        if not booted:
            self.actions += granted
        return granted

    def stop_empty(self, i: int, count: int) -> int:
        """Stop up to `count` instances of a pool without replicas, those without standby and the youngest first; return how many."""
        stopped = 0
        youngest = list(reversed(self.instances[i]))
        youngest.sort(key=lambda one: len(one.resting))
        for instance in youngest:
            if stopped == count:
                break
            if not instance.replicas:
                self._end(instance)
                stopped += 1
        self.actions += stopped
        return stopped

    def _end(self, instance: Instance) -> None:
        self.instances[instance.pool].remove(instance)
        self._pay(instance)

    def _pay(self, instance: Instance) -> None:
        pool = self.problem.pools[instance.pool]
        seconds = self.now - instance.asked
        self.paid_gpu_seconds += seconds * pool.gpus
        self.cost += seconds / 3600 * pool.price
        while instance.resting:
            self._wake(instance, 0)

    def start_replica(self, j: int, *, booting: bool = True, warm: bool = False) -> bool:
        """Start one replica on free GPUs: on the fullest booted instance, else, with `booting`, on a booting one.

        `warm`: it runs from the beginning. Returns False if there is no room.
        """
        service = self.problem.services[j]
        best: tuple[tuple[float, bool, int, int], list[Instance]] | None = None
        for rank, i in enumerate(self.cheapest[j]):
            width, gpus = self.width[i][j], self.problem.pools[i].gpus
            if width <= gpus:
                for instance in self.instances[i]:
                    if instance.free >= width and (booting or instance.ready <= self.now):
                        key = (max(instance.ready, self.now), not instance.rests(j), rank, instance.free)
                        if best is None or key < best[0]:
                            best = key, [instance]
            else:
                empty = [
                    inst for inst in self.instances[i] if inst.free == gpus and (booting or inst.ready <= self.now)
                ]
                empty.sort(key=lambda inst: inst.ready)
                if len(empty) >= width // gpus:
                    chosen = empty[: width // gpus]
                    key = (max(chosen[-1].ready, self.now), True, rank, 0)
                    if best is None or key < best[0]:
                        best = key, chosen
        if best is None:
            return False
        hosts = best[1]
        pool = self.problem.pools[hosts[0].pool]
        rung = "standby" if hosts[0].rests(j) else self.kind
        samples = service.lead_samples(self.kind)
        if rung == "standby":
            samples = service.standby
            self._wake(hosts[0], next(k for k, (one, _) in enumerate(hosts[0].resting) if one == j))
        ready = self.now if warm else best[0][0] + self.sample(samples)
        rate = service.rate_on(pool.gpu) or 1.0
        replica = Replica(j, hosts, ready, service.concurrency / rate, [-1] * service.concurrency)
        for host in hosts:
            host.free -= min(self.width[hosts[0].pool][j], pool.gpus)
            host.replicas.append(replica)
        self.replicas[j].append(replica)
        for k in range(service.concurrency):
            self.order += 1
            heappush(self.queues[j].slots, (ready, self.order, k, replica))
        if not warm:
            self.actions += 1
            self.starts[rung] += 1
        return True

    def stop_replica(self, j: int) -> bool:
        """Stop a replica of a service: one that is not ready, else the one on the emptiest instance.

        Returns False if it has none.
        """
        live = self.replicas[j]
        if not live:
            return False
        replica = max(live, key=lambda r: (r.ready > self.now, r.hosts[0].free, r.ready))
        live.remove(replica)
        replica.finishing = self.queues[j].drop(replica)
        replica.drained = max([self.now] + [end for end, _ in replica.finishing])
        self.draining.append(replica)
        self.actions += 1
        return True

    def _leave(self, replica: Replica) -> None:
        replica.alive = False
        for host in replica.hosts:
            pool = self.problem.pools[host.pool]
            host.free += min(self.width[host.pool][replica.service], pool.gpus)
            host.replicas.remove(replica)

    def _rest(self, replica: Replica) -> None:
        """Put a drained replica in standby on its instance, if its host memory can hold it."""
        service, host = self.problem.services[replica.service], replica.hosts[0]
        room = self.problem.pools[host.pool].host_memory
        if not self.ladder or not service.standby or len(replica.hosts) > 1 or service.standby_memory > room:
            return
        used = sum(self.problem.services[j].standby_memory for j, _ in host.resting)
        while used + service.standby_memory > room:
            used -= self.problem.services[host.resting[0][0]].standby_memory
            self._wake(host, 0)
        host.resting.append((replica.service, self.now))

    def _wake(self, host: Instance, k: int) -> None:
        """End one standby, because it wakes or makes room."""
        j, since = host.resting.pop(k)
        self.standby_gib_seconds += (self.now - since) * self.problem.services[j].standby_memory

    # Time.

    def advance(self, until: float) -> None:
        """Serve all requests that begin before `until`, then remove drained replicas and interrupted instances."""
        for j, queue in enumerate(self.queues):
            if queue.slots and (queue.retry or (queue.head < len(queue.at) and queue.at[queue.head] < until)):
                self._serve(j, queue, until)
        seconds = until - self.now
        self.now = until
        for replica in [r for r in self.draining if r.drained <= until]:
            self.draining.remove(replica)
            if replica.alive:
                self._leave(replica)
                self._rest(replica)
        if self.interruptions:
            self._interrupt(seconds)

    def _serve(self, j: int, queue: Queue, until: float) -> None:
        at, work, waits, slots = queue.at, queue.work, queue.waits, queue.slots
        gpus = self.problem.services[j].gpus / self.problem.services[j].concurrency
        count, head = len(at), queue.head
        busy = 0.0
        while slots:
            if queue.retry:
                request = queue.retry[0]
            elif head < count:
                request = head
            else:
                break
            free, order, k, replica = slots[0]
            arrived = at[request]
            begin = free if free > arrived else arrived
            if begin >= until:
                break
            if queue.retry:
                heappop(queue.retry)
                begin = max(begin, self.now)
            else:
                head += 1
            seconds = work[request] * replica.seconds
            heapreplace(slots, (begin + seconds, order, k, replica))
            replica.inflight[k] = request
            waits[request] = begin - arrived
            busy += seconds
        queue.head = head
        queue.busy_gpu_seconds += busy * gpus

    def _interrupt(self, seconds: float) -> None:
        for i, pool in enumerate(self.problem.pools):
            rate = pool.interruptions * self.interruptions
            if rate <= 0 or not self.instances[i]:
                continue
            lost = self.random.random(len(self.instances[i])) < rate * seconds / 3600
            for instance in [inst for inst, gone in zip(list(self.instances[i]), lost, strict=True) if gone]:
                for replica in list(instance.replicas):
                    self._kill(replica)
                self._end(instance)

    def _kill(self, replica: Replica) -> None:
        queue = self.queues[replica.service]
        if replica in self.replicas[replica.service]:
            self.replicas[replica.service].remove(replica)
        size = self.problem.services[replica.service].gpus / len(replica.inflight)
        for end, request in queue.drop(replica) or replica.finishing:
            if end > self.now:
                heappush(queue.retry, request)
                queue.waits[request] = NEVER
                queue.busy_gpu_seconds -= (end - self.now) * size
        if replica in self.draining:
            self.draining.remove(replica)
        self._leave(replica)

    def finish(self) -> None:
        """Add the costs of running instances and the busy time of running requests up to the end of the trace."""
        for j, queue in enumerate(self.queues):
            size = self.problem.services[j].gpus / self.problem.services[j].concurrency
            ends = [free for free, _, _, _ in queue.slots]
            ends += [end for replica in self.draining if replica.service == j for end, _ in replica.finishing]
            queue.busy_gpu_seconds -= sum(end - self.now for end in ends if self.now < end < NEVER) * size
        for held in self.instances:
            for instance in held:
                self._pay(instance)

    # State visible to policies.

    def waiting(self, j: int) -> tuple[int, float]:
        """Return the number of arrived requests of a service that have not begun, and their work."""
        queue = self.queues[j]
        tail = bisect_left(queue.at, self.now, queue.head)
        work = float(queue.total[tail] - queue.total[queue.head]) + sum(queue.work[r] for r in queue.retry)
        return tail - queue.head + len(queue.retry), work

    @property
    def done(self) -> bool:
        return all(queue.head == len(queue.at) and not queue.retry for queue in self.queues)

    def idle_gpus(self) -> int:
        """Return the GPUs of booted instances on which nothing runs or starts."""
        return sum(inst.free for held in self.instances for inst in held if inst.ready <= self.now)

    def held_gpus(self) -> int:
        return sum(len(held) * pool.gpus for held, pool in zip(self.instances, self.problem.pools, strict=True))
