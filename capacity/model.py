"""Inputs of a plan as immutable values: pools, services, quotas, demand and policy.

Units: seconds, GiB, dollars per instance-hour, requests (or tokens) per second, fractions. `inputs/load.py` creates these
values from a file and names lines in errors; `Problem.__post_init__` checks values created in code the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from capacity.errors import InputError

Kind = Literal["cold", "restored"]
Floats = npt.NDArray[np.float64]
KINDS: tuple[Kind, Kind] = ("cold", "restored")


@dataclass(frozen=True)
class Pool:
    """Instances of one type in one zone.

    `supply`: maximum number of instances that can be started in a step; None is unknown. `labelled`: which of instance,
    region and zone are known to be node labels, not filled in from another field.
    """

    name: str
    instance: str
    gpu: str
    gpus: int
    memory: float  # GiB a GPU; 0: the file does not say, and no service asks
    region: str  # "": the file does not say
    zone: str
    price: float
    quota: int | None = None
    supply: int | None = None
    held: int = 0
    boot: tuple[float, ...] = (0.0,)
    interruptions: float = 0.0
    host_memory: float = math.inf  # GiB an instance, for models in standby; simulation only
    refused: tuple[int, int] | None = None  # asked, got in the last step
    labelled: frozenset[str] = frozenset({"instance", "region", "zone"})

    def start_bound(self, first: bool) -> float:
        """Return the maximum number of instances that can be started in a step.

        A refusal in the last step bounds only the first step.
        """
        bound = math.inf if self.supply is None else float(self.supply)
        if first and self.refused is not None and self.refused[1] < self.refused[0]:
            bound = min(bound, float(self.refused[1]))
        return bound


@dataclass(frozen=True, order=True)
class Workload:
    """The Deployment or StatefulSet that runs a service's replicas: `kind` is `deployment` or `statefulset`."""

    namespace: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Service:
    """One model behind one endpoint.

    `rates` maps a GPU type ("*": any type) to the units per second that a replica serves.
    """

    name: str
    gpus: int
    rates: dict[str, float]
    cold: tuple[float, ...]
    restored: tuple[float, ...]
    memory: float = 0.0
    unit: str = "requests"
    target_wait: float = 0.0
    probability: float = 0.99
    regions: tuple[str, ...] | None = None
    minimum: int = 0
    maximum: int | None = None
    concurrency: int = 1
    standby: tuple[float, ...] = ()  # wake times from standby; none: the service has no standby; simulation only
    standby_memory: float = 0.0  # GiB of host memory
    workload: Workload | None = None  # for `--apply kubernetes`

    def rate_on(self, gpu: str) -> float | None:
        return self.rates.get(gpu, self.rates.get("*"))

    def fits(self, pool: Pool) -> bool:
        """Return whether a replica can run in the pool (memory per GPU, region, a known rate)."""
        return (
            self.memory <= pool.memory
            and (self.regions is None or pool.region in self.regions)
            and self.rate_on(pool.gpu) is not None
        )

    def no_pool(self) -> str:
        """Return the text of an error that says why no pool fits."""
        return (
            f"{self.name} fits no pool: {self.memory:g} GiB a GPU, in {', '.join(self.regions or ('any region',))}, "
            f"with a rate for the GPU type"
        )

    def lead_samples(self, kind: Kind) -> tuple[float, ...]:
        return self.cold if kind == "cold" else self.restored


@dataclass(frozen=True)
class Quota:
    """Maximum number of GPUs of one type held over several pools; region None means all regions."""

    name: str
    gpu: str
    region: str | None
    gpus: int

    def covers(self, pool: Pool) -> bool:
        return pool.gpu == self.gpu and self.region in (None, pool.region)


@dataclass(frozen=True)
class Forecast:
    """Demand of one service in units per second: `levels` ascending in (0, 1), `values[level][step]`."""

    levels: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    mean: tuple[float, ...] | None = None  # [step]; None: unknown

    def typical(self) -> Floats:
        """Return the demand to expect, [step]: the mean, or the median if that is all that is known."""
        return self.at(0.5) if self.mean is None else np.asarray(self.mean, dtype=np.float64)

    def at(self, level: float) -> Floats:
        """Return the value at a level, interpolated between the two nearest given levels, clamped outside them."""
        table = np.asarray(self.values, dtype=np.float64)
        above = int(np.searchsorted(self.levels, level))
        if above == 0 or above == len(self.levels):
            edge: Floats = table[min(above, len(self.levels) - 1)]
            return edge
        low, high = self.levels[above - 1], self.levels[above]
        share = (level - low) / (high - low)
        between: Floats = table[above - 1] * (1 - share) + table[above] * share
        return between


@dataclass(frozen=True)
class History:
    """Past rates on a common grid, from which growth is learned: `rates[service, bin]`, units per second.

    `levels`: the demand that each moment would have been planned for (None: the rates themselves); growth is counted from
    there. `nearest`: the share of past moments that count, those with the level nearest to the last one; 1.0 is all.
    """

    bin_seconds: float
    rates: Floats
    levels: Floats | None = None
    nearest: float = 1.0


@dataclass(frozen=True)
class Demand:
    """Forecasts per service. `quantile` is the demand level to be served without a wait.

    `begin`: time of the first step, seconds since 1970 on the user's clock; None if unknown. `notes`: sentences that say
    how the demand was learned.
    """

    quantile: float
    forecasts: dict[str, Forecast]
    history: History | None = None
    begin: float | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def steps(self) -> int:
        return min((len(f.values[0]) for f in self.forecasts.values()), default=0)


@dataclass(frozen=True)
class Share:
    """Minimum and maximum share of all held GPUs that a region may have."""

    least: float = 0.0
    most: float = 1.0


@dataclass(frozen=True)
class Hysteresis:
    """Damping of plan changes.

    `band`: demand within this fraction of the last planned demand counts as unchanged. `saving`: a change that only saves
    money must save this share of the cost. `hold_down`: seconds that a lower need must last before instances are stopped.
    """

    band: float = 0.05
    saving: float = 0.02
    hold_down: float = 300.0


@dataclass(frozen=True)
class Policy:
    """Planning policy. `switching_cost` is in hours of an instance's own price, so plans do not depend on the currency."""

    headroom: float = 0.1
    region_mix: dict[str, Share] = field(default_factory=dict)
    hysteresis: Hysteresis = Hysteresis()
    switching_cost: float = 0.1
    zone_loss: float = 1.0
    max_start: int | None = None
    max_stop: int | None = None
    lead_quantile: float = 0.9
    correlation: float = 0.2


@dataclass(frozen=True)
class Problem:
    """All inputs of a plan. Raises InputError if names clash or a service fits no pool."""

    pools: tuple[Pool, ...]
    services: tuple[Service, ...]
    demand: Demand
    policy: Policy = Policy()
    quotas: tuple[Quota, ...] = ()
    step_seconds: float = 3600.0
    source: str = "plan"

    def __post_init__(self) -> None:
        for what, names in (("pools", [p.name for p in self.pools]), ("services", [s.name for s in self.services])):
            if not names:
                raise self._wrong("empty", f"no {what}", what)
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise self._wrong("repeated-name", f"two of one name: {', '.join(twice)}", what)
        for service in self.services:
            if service.name not in self.demand.forecasts:
                raise self._wrong("no-demand", f"no forecast for {service.name}", "demand.forecast")
            if not any(service.fits(pool) for pool in self.pools):
                raise self._wrong("no-pool", service.no_pool(), "services")
            where = f"service {service.name}: rate or lead_time"
            self._finite(where, *service.rates.values(), *service.cold, *service.restored)
            where = f"service {service.name}: memory, target_wait or probability"
            self._finite(where, service.memory, service.target_wait, service.probability)
            if service.workload and service.workload in [s.workload for s in self.services if s is not service]:
                text = f"{service.name}: another service has the workload {service.workload}, too"
                raise self._wrong("repeated-name", text, "services")
        for pool in self.pools:
            where = f"pool {pool.name}: price, memory, interruptions or boot"
            self._finite(where, pool.price, pool.memory, pool.interruptions, *pool.boot)
        for name, forecast in self.demand.forecasts.items():
            self._finite(f"demand.forecast.{name}", *(v for row in forecast.values for v in row))
        if self.demand.steps < 1:
            raise self._wrong("empty", "the forecast has no step", "demand")

    def _wrong(self, code: str, text: str, where: str) -> InputError:
        return InputError(code, text, file=self.source, where=where)

    def _finite(self, where: str, *values: float) -> None:
        """Raise InputError for NaN, infinity or a negative number, which no comparison in a solver would reject."""
        for value in values:
            if not math.isfinite(value) or value < 0:
                raise self._wrong("not-a-number", f"expected a number of at least 0, found {value}", where)


@lru_cache(maxsize=4096)
def slot(gpus: int, instance_gpus: int) -> int:
    """Return the GPUs that a replica of `gpus` GPUs takes on an instance.

    A replica larger than an instance takes whole instances. Otherwise the result is the next size up in a chain of divisors
    of the instance (8, 4, 2, 1). Since each size divides the next, any set of replicas whose slots sum to at most the held
    GPUs can be packed, so no bin packing is needed.
    """
    if gpus >= instance_gpus:
        return -(-gpus // instance_gpus) * instance_gpus
    size = instance_gpus
    while True:
        divisor = next((d for d in range(2, size + 1) if size % d == 0), None)
        if divisor is None or size // divisor < gpus:
            return size
        size //= divisor


def quantile(samples: tuple[float, ...], level: float) -> float:
    """Return the order statistic at or above `level` ("higher" rule: never optimistic with few samples)."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(level * len(ordered)) - 1))]
