"""Decide which replicas change now. Up at once; down only through gates, each of which is named in the report.

- `asleep`: a proxy in front holds requests and moves this workload from and to 0; the plan moves it between 1 and more.
- `shortage`: no plan satisfied every constraint.
- `hold_down`: fewer must have been wanted for the policy's `hold_down`.
- `unready`: of a StatefulSet, which removes its last pods and not the unready ones as a Deployment does, fewer are ready than would stay.
- `requests`: the requests that wait or are being answered need more replicas (their number over the service's `concurrency`).
- `half`: at most half of the replicas leave in a round, and the rest later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from capacity.actions.kubernetes import idle_pods
from capacity.cluster.api import Target
from capacity.cluster.observe import Observation, of_idle, of_service
from capacity.model import Service
from capacity.optimize.plan import Plan


@dataclass(frozen=True)
class Move:
    """A change of the replicas that a target wants."""

    target: Target
    before: int
    after: int


def wanted(plan: Plan, namespace: str, way: str) -> dict[Target, tuple[int, Service | None]]:
    """Return how many replicas the plan's first step wants of each target, with the service where it is one's workload."""
    found: dict[Target, tuple[int, Service | None]] = {}
    for j, service in enumerate(plan.problem.services):
        if (target := of_service(service)) is not None:
            found[target] = int(plan.replicas[0, :, j].sum()), service
    for (i, gpus), count in idle_pods(plan).items():
        found[of_idle(plan.problem.pools[i], gpus, namespace, way)] = count, None
    return found


def moves(
    wants: dict[Target, tuple[int, Service | None]],
    seen: Observation,
    down_since: dict[str, float],
    now: float,
    *,
    hold_down: float,
    short: bool,
) -> tuple[list[Move], dict[str, str]]:
    """Return the changes to make, those up first, and the gate that holds each other one back, by target.

    Changes `down_since`: when each target began to have more than is wanted, seconds on the caller's clock.
    """
    up: list[Move] = []
    down: list[Move] = []
    held: dict[str, str] = {}
    for target, (want, service) in wants.items():
        before, name, floor = seen.scales[target].replicas, str(target), 0
        if service is not None and service.name in seen.busy and service.minimum == 0:
            if before == 0:
                if want:
                    held[name] = "asleep"
                down_since.pop(name, None)
                continue
            floor = 1
        after = max(want, floor)
        if after >= before:
            down_since.pop(name, None)
            if after > before:
                up.append(Move(target, before, after))
            continue
        since = down_since.setdefault(name, now)
        busy = 0 if service is None else math.ceil(seen.busy.get(service.name, 0) / service.concurrency)
        if short:
            held[name] = "shortage"
        elif now - since < hold_down:
            held[name] = "hold_down"
        elif target.kind == "statefulset" and seen.pods[target].ready < after:
            held[name] = "unready"
        else:
            least = max(busy, before // 2 if service is not None else 0)
            if least > after:
                held[name] = "requests" if busy >= least else "half"
                after = least
            if after < before:
                down.append(Move(target, before, after))
    for gone in down_since.keys() - {str(target) for target in wants}:
        del down_since[gone]
    return up + down, held
