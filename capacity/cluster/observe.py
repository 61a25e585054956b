"""What a cluster looks like now: replicas wanted, pods ready and pending, nodes held, and the demand that proxies see."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from capacity.actions.kubernetes import apart, idle_sizes, name, selector
from capacity.cluster.api import Api, Scale, Target
from capacity.cluster.demand import Proxies
from capacity.errors import CapacityError, Waiting
from capacity.model import Forecast, Pool, Problem, Service

_BOOT_FACTOR, _BOOT_SPARE_S = 1.5, 60.0
"""An idle pod that has no node for so many times the slowest boot, and a minute, says that its pool gets no more instances."""
_SETS = re.compile(r"(?P<key>\S+) (?P<op>in|notin) \((?P<values>[^)]*)\)")


@dataclass(frozen=True)
class Pods:
    """Pods of a target that are not being deleted. `pending`: those without a node."""

    ready: int = 0
    pending: int = 0


@dataclass(frozen=True)
class Observation:
    """One look at the cluster; `at` is when it began (monotonic seconds).

    `held`: nodes by pool; None where a command observes them. `rates`: requests a second by service, of those that a proxy
    serves; `busy`: their requests that wait or are being answered.
    """

    at: float
    scales: dict[Target, Scale]
    pods: dict[Target, Pods]
    held: dict[str, int] | None
    rates: dict[str, float] = field(default_factory=dict)
    busy: dict[str, int] = field(default_factory=dict)


def of_service(service: Service) -> Target | None:
    """Return what runs a service; None if the file names nothing."""
    workload = service.workload
    return None if workload is None else Target(workload.kind, workload.namespace, workload.name)


def of_idle(pool: Pool, gpus: int, namespace: str, way: str) -> Target:
    """Return the object that holds idle blocks of a pool, as `--emit kubernetes` names it."""
    return Target("deployment" if way == "pause-pods" else "capacitybuffer", namespace, name(pool.name, gpus))


class Observer:
    """Looks at the cluster once a round."""

    def __init__(self, api: Api, *, proxies: Proxies | None, namespace: str, way: str, nodes: bool) -> None:
        """`nodes`: whether to count them."""
        self.api, self.proxies, self.namespace, self.way, self.nodes = api, proxies, namespace, way, nodes
        self._pending_since: dict[str, float] = {}

    def observe(self, problem: Problem) -> Observation:
        """Look at all that the plan's file names. Raises CapacityError: nothing is planned on half an observation."""
        at = time.monotonic()
        targets = [target for service in problem.services if (target := of_service(service)) is not None]
        if not targets:
            text = "no service of the plan names its workload; write workload: k8s://NAMESPACE/DEPLOYMENT"
            raise CapacityError("no-workload", text)
        apart(problem.pools)
        targets += [of_idle(problem.pools[i], gpus, self.namespace, self.way) for i, gpus in idle_sizes(problem)]
        rates, busy = self._demand(problem)
        held = self._held(problem) if self.nodes else None
        scales = {target: self.api.scale(target) for target in targets}
        listed = {namespace: self.api.pods(namespace) for namespace in {t.namespace for t in targets}}
        pods = {target: _count(listed[target.namespace], scale.selector) for target, scale in scales.items()}
        return Observation(at, scales, pods, held, rates, busy)

    def _demand(self, problem: Problem) -> tuple[dict[str, float], dict[str, int]]:
        if self.proxies is None:
            return {}, {}
        seen = self.proxies.observe()
        rates: dict[str, float] = {}
        busy: dict[str, int] = {}
        for service in problem.services:
            if service.workload is None:
                continue
            if service.name not in seen.busy:
                known = ", ".join(sorted(seen.busy))
                text = (
                    f"no proxy has a pool named {service.name}; give the service the pool's name (they have: {known})"
                )
                raise CapacityError("demand-unknown", text)
            if service.unit != "requests":
                text = f"service {service.name} counts {service.unit}, and proxies count requests: give its rate in requests"
                raise CapacityError("demand-unknown", text)
            busy[service.name] = seen.busy[service.name]
            if seen.rates is not None:
                rates[service.name] = seen.rates.get(service.name, 0.0)
        if seen.rates is None:
            raise Waiting("observing", "the proxies were asked for the first time; the next round knows their rates")
        return rates, busy

    def _held(self, problem: Problem) -> dict[str, int]:
        """Count the nodes of each pool by their labels."""
        held = {}
        for pool in problem.pools:
            labels = selector(pool)
            if not labels:
                text = f"pool {pool.name} names no instance, region or zone, so its nodes cannot be counted: name one, or give --observe"
                raise CapacityError("no-labels", text)
            found = self.api.nodes(labels)
            held[pool.name] = sum(node.metadata.deletionTimestamp is None for node in found)
        return held

    def refused(self, problem: Problem, seen: Observation) -> dict[str, list[int]]:
        """Return pools that get no more instances now: [asked, got], for the next plan.

        A pool counts as such while pods of its idle blocks have had no node for longer than its instances take to boot.
        """
        now, found = time.monotonic(), dict[str, list[int]]()
        for i, pool in enumerate(problem.pools):
            mine = [of_idle(pool, gpus, self.namespace, self.way) for each, gpus in idle_sizes(problem) if each == i]
            pending = sum(seen.pods[target].pending for target in mine)
            if not pending:
                self._pending_since.pop(pool.name, None)
                continue
            since = self._pending_since.setdefault(pool.name, now)
            if now - since > _BOOT_FACTOR * max(pool.boot) + _BOOT_SPARE_S:
                found[pool.name] = [pending, 0]
        return found


def with_demand(problem: Problem, rates: Mapping[str, float]) -> Problem:
    """Return the problem with the observed rates as the demand of its first step.

    The quantiles keep their distances from the mean, in parts of it; where the file expects nothing all are the rate itself.
    """
    forecasts = dict(problem.demand.forecasts)
    for service, rate in rates.items():
        old = forecasts[service]
        usual = float(old.typical()[0])
        rows = tuple((row[0] * rate / usual if usual > 0 else rate, *row[1:]) for row in old.values)
        mean = None if old.mean is None else (rate, *old.mean[1:])
        forecasts[service] = Forecast(old.levels, rows, mean)
    return replace(problem, demand=replace(problem.demand, forecasts=forecasts))


def _count(pods: list[Any], labels: str) -> Pods:
    ready = pending = 0
    for pod in pods:
        if not labels or pod.metadata.deletionTimestamp is not None or not _matches(labels, pod.metadata.labels or {}):
            continue
        status = pod.status
        if status is not None and status.phase in ("Failed", "Succeeded"):
            continue
        conditions = {each.type: each.status for each in (status.conditions if status else None) or ()}
        ready += conditions.get("Ready") == "True"
        pending += not (pod.spec and pod.spec.nodeName)
    return Pods(ready, pending)


def _matches(labels: str, has: Mapping[str, str]) -> bool:
    """Return whether labels match a selector as a `scale` writes it: `app=x,tier in (a,b),!old`."""
    for part in map(str.strip, re.split(r",(?![^(]*\))", labels)):
        if sets := _SETS.fullmatch(part):
            inside = has.get(sets["key"]) in [value.strip() for value in sets["values"].split(",")]
            if inside != (sets["op"] == "in"):
                return False
        elif "!=" in part:
            key, _, value = part.partition("!=")
            if has.get(key.strip()) == value.strip():
                return False
        elif "=" in part:
            key, _, value = part.partition("=")
            if has.get(key.strip()) != value.lstrip("=").strip():
                return False
        elif (part[1:] in has) if part.startswith("!") else (part not in has):
            return False
    return True
