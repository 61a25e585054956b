"""What a pod and its endpoints say: whether it serves, how far its start is, and why it cannot start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plugin.proxy.kubernetes.address import WorkloadAddress

if TYPE_CHECKING:
    from lightkube.models.core_v1 import ContainerStatus
    from lightkube.resources.core_v1 import Pod
    from lightkube.resources.discovery_v1 import EndpointSlice

_IMAGE = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"})
_CONFIG = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
_DEFAULT_PORT = 8000


@dataclass(frozen=True)
class Listed:
    """What the EndpointSlices say of one pod."""

    serving: bool
    terminating: bool
    port: int | None


@dataclass(frozen=True)
class Fault:
    """Why a pod does not start: a stable code, one line for clients, and for the log and the admin endpoints what the node says.

    The scheduler's sentence is for clients. What a node says is not: it names registries and secrets.
    """

    code: str
    message: str
    detail: str = ""

    @property
    def whole(self) -> str:
        """Return all that is known."""
        return self.detail or self.message


@dataclass(frozen=True)
class PodState:
    """One pod as its workload's owner sees it."""

    name: str
    uid: str
    address: str
    """Its IP address, "" until it has one."""
    port: int
    ready: bool
    leaving: bool
    """True once it is being deleted, or its processes have ended for good."""
    running: bool
    """True once all its containers run."""
    restarts: int
    step: str
    """How far its start is, in words: `unscheduled`, `scheduled`, `pulling or creating`, `initialising`, `running`."""
    fault: Fault | None


def listed_by_pod(slices: Iterable[EndpointSlice], port: int | None) -> dict[str, Listed]:
    """Return what EndpointSlices say of each pod. `port`: that of the address; None takes the slice's first one.

    By the pod's uid, or by its name where a slice has none: a StatefulSet's next pod has the name of the one before.
    """
    found: dict[str, Listed] = {}
    for one in slices:
        named = port or next((each.port for each in one.ports or () if each.port), None)
        for endpoint in one.endpoints or ():
            target, conditions = endpoint.targetRef, endpoint.conditions
            if target is None or target.kind != "Pod" or not target.name:
                continue
            # `ready` is always true where a Service publishes addresses that are not ready; `serving` is not.
            serving = conditions.serving if conditions and conditions.serving is not None else None
            if serving is None:
                serving = conditions is None or conditions.ready is not False
            terminating = bool(conditions and conditions.terminating)
            key = target.uid or target.name
            before = found.get(key)
            if before is not None:  # several Services: one that has it serving is enough
                serving, terminating = serving or before.serving, terminating or before.terminating
            found[key] = Listed(serving, terminating, named or (before.port if before else None))
    return found


def state_of(pod: Pod, listed: Mapping[str, Listed], address: WorkloadAddress) -> PodState:
    """Return the state of a pod from its own object and from what the EndpointSlices say of it."""
    meta, status = pod.metadata, pod.status
    assert meta is not None and meta.name is not None, "the API gives every object a name"
    endpoint = listed.get(meta.uid or "") or listed.get(meta.name)
    conditions = {each.type: each for each in (status.conditions if status else None) or ()}
    containers = list((status.containerStatuses if status else None) or ())
    ended = bool(status and status.phase in ("Failed", "Succeeded"))
    ready = "Ready" in conditions and conditions["Ready"].status == "True"
    running = bool(containers) and all(each.state and each.state.running for each in containers)
    step, fault = _step(pod, containers, running)
    return PodState(
        name=meta.name,
        uid=meta.uid or meta.name,
        address=(status.podIP if status else None) or "",
        port=address.port or (endpoint.port if endpoint else None) or _container_port(pod) or _DEFAULT_PORT,
        ready=ready or bool(endpoint and endpoint.serving and running),
        leaving=ended or meta.deletionTimestamp is not None or bool(endpoint and endpoint.terminating),
        running=running,
        restarts=sum(each.restartCount or 0 for each in containers),
        step=step,
        fault=fault,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1000]


def _container_port(pod: Pod) -> int | None:
    containers = (pod.spec.containers if pod.spec else None) or ()
    return next((port.containerPort for each in containers for port in each.ports or ()), None)


def _step(pod: Pod, containers: list[ContainerStatus], running: bool) -> tuple[str, Fault | None]:
    status = pod.status
    scheduled = next(
        (each for each in (status.conditions if status else None) or () if each.type == "PodScheduled"), None
    )
    if scheduled is not None and scheduled.status == "False":
        message = _one_line(scheduled.message or scheduled.reason or "no node takes the pod")
        return "unscheduled", Fault("pod-unschedulable", message)
    if scheduled is None and not (pod.spec and pod.spec.nodeName):
        return "unscheduled", None
    initial = list((status.initContainerStatuses if status else None) or ())
    for each in (*initial, *containers):
        waiting = each.state.waiting if each.state else None
        if waiting is None or not waiting.reason:
            continue
        said = f"container {each.name}: {waiting.reason}"
        detail = _one_line(f"{said}: {waiting.message}") if waiting.message else ""
        if waiting.reason in _IMAGE:
            return "pulling", Fault("pod-image", said, detail)
        if waiting.reason in _CONFIG:
            return "creating", Fault("pod-config", said, detail)
        if waiting.reason == "CrashLoopBackOff":
            last = each.lastState.terminated if each.lastState else None
            code = f", last with code {last.exitCode}" if last is not None else ""
            return "restarting", Fault("pod-crashes", f"container {each.name} keeps ending{code}")
    if running:
        return "running", None
    if any(each.state and each.state.running for each in initial):
        return "initialising", None
    known = [*initial, *containers]
    if known and all(each.imageID for each in known):
        return "pulled", None
    return ("pulling or creating" if known else "scheduled"), None
