"""The cluster's API for the plan: few calls, each with its verb and its object, so that an error can name both.

lightkube is the client, as in the proxy; here its synchronous one. A call that meets 429, 5xx or no answer is made again, with
the pause that a 429 asks for, until `RETRY_S` have passed. What a retry cannot mend is a CapacityError at once.

Codes: kubernetes-missing, cluster-unknown, cluster-forbidden, cluster-unauthorized, cluster-unreachable, cluster-refused,
not-found, no-capacity-buffer, changed-by-others, apply-interrupted.
"""

from __future__ import annotations

import importlib.util
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from capacity.errors import CapacityError

CALL_LIMIT_S = 4.0
"""Seconds that the API may be silent; below the margin of the Lease (`lease.py`)."""
RETRY_S = 15.0
_PAUSE_S, _MOST_PAUSE_S = 0.2, 4.0
_CHUNK = 500
_CONFLICTS = 6
Value = TypeVar("Value")


@dataclass(frozen=True, order=True)
class Target:
    """An object whose number of replicas the plan moves. `kind`: deployment, statefulset or capacitybuffer."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def resource(self) -> str:
        """Return what a role calls it."""
        return "capacitybuffers" if self.kind == "capacitybuffer" else f"{self.kind}s/scale"


@dataclass(frozen=True)
class Scale:
    """How many replicas a target wants. `selector`: of its pods, as the API writes it; "" where it has none."""

    replicas: int
    version: str
    selector: str


class Status(Exception):
    """The API refused a call with a status that its caller decides about (404, 409, 410)."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(said)
        self.code, self.said = code, said


class Api:
    """One connection to the cluster; not for several threads."""

    def __init__(self, client: Any, stop: threading.Event) -> None:
        """`stop` ends pauses between retries."""
        self._client, self._stop = client, stop
        self.guard: Callable[[], None] = lambda: None
        """Called before each write of a scale; raises CapacityError if this process may not write."""

    @classmethod
    def from_environment(cls, stop: threading.Event) -> Api:
        """Connect as the environment says: in a pod by its service account, else by KUBECONFIG.

        Raises CapacityError (kubernetes-missing, cluster-unknown).
        """
        if importlib.util.find_spec("lightkube") is None:
            what = "--apply kubernetes needs lightkube; install it with: pip install 'quickthaw[kubernetes]'"
            raise CapacityError("kubernetes-missing", what)
        import httpx2
        from lightkube import Client, KubeConfig
        from lightkube.core.exceptions import ConfigError
        from yaml import YAMLError

        config = None
        try:
            config = KubeConfig.from_env().get()
            if config is None or config.user is None:
                raise ConfigError("the kubeconfig names no cluster or no user")
            client = Client(
                config, timeout=httpx2.Timeout(CALL_LIMIT_S), field_manager="quickthaw-plan", trust_env=False
            )
        except (ConfigError, OSError, KeyError, ValueError, YAMLError) as error:
            said = " ".join(str(error).split())
            if config is not None and config.user is not None:  # damaged certificates are OSErrors that name no file
                where = config.cluster.certificate_auth or config.fname or "the kubeconfig"
                said = f"the certificates of {where} cannot be read: {said}"
            raise CapacityError("cluster-unknown", f"{said}; run in a pod, or set KUBECONFIG") from error
        return cls(client, stop)

    # -- calls -------------------------------------------------------------------------------------

    def call(self, verb: str, resource: str, where: str, make: Callable[[], Value], retry_s: float = RETRY_S) -> Value:
        """Make a call, again where that may help. `verb`, `resource`: as a role names them; `where`: for errors.

        Raises Status (404, 409, 410), CapacityError.
        """
        import httpx2
        from lightkube import ApiError
        from lightkube.core.exceptions import ConfigError

        until, pause = time.monotonic() + retry_s, _PAUSE_S
        while True:
            try:
                return make()
            except (httpx2.HTTPError, ApiError, ConfigError, OSError, ValueError) as error:
                status, said = _status(error), " ".join(str(error).split())[:300] or type(error).__name__
                wait = _final(status, said, verb, resource, where, error)
                wait = pause if wait is None else wait
                if time.monotonic() + wait > until:
                    what = "does not answer" if status is None else f"answers {status}"
                    text = f"cannot {verb} {resource} {where}: the API {what}: {said}; tried for {retry_s:g} s"
                    raise CapacityError("cluster-unreachable", text) from error
            if self._stop.wait(wait * random.uniform(1.0, 1.25)):
                raise CapacityError("apply-interrupted", f"{verb} {resource} {where} was not finished")
            pause = min(_MOST_PAUSE_S, pause * 2)

    def listed(self, kind: Any, resource: str, namespace: str | None = None, labels: Any = None) -> list[Any]:
        """Return all objects of a kind, in chunks; a list that has expired meanwhile (410) begins again."""
        where = "of the cluster" if namespace is None else f"in namespace {namespace}"
        given = {"labels": labels, "chunk_size": _CHUNK, **({"namespace": namespace} if namespace else {})}
        for _ in range(3):
            try:
                return self.call("list", resource, where, lambda: list(self._client.list(kind, **given)))
            except Status as error:
                if error.code != 410:
                    raise CapacityError("cluster-refused", f"cannot list {resource} {where}: {error.said}") from error
        raise CapacityError("cluster-unreachable", f"cannot list {resource} {where}: each list expired before its end")

    def pods(self, namespace: str) -> list[Any]:
        """Return the pods of a namespace."""
        from lightkube.resources.core_v1 import Pod

        return self.listed(Pod, "pods", namespace)

    def nodes(self, labels: dict[str, str]) -> list[Any]:
        """Return the nodes with these labels."""
        from lightkube.resources.core_v1 import Node

        return self.listed(Node, "nodes", labels=labels)

    def scale(self, target: Target) -> Scale:
        """Return how many replicas a target wants. Raises CapacityError (not-found, no-capacity-buffer)."""
        try:
            found = self.call("get", target.resource, _where(target), lambda: self._get(target))
        except Status as error:
            raise _absent(target, error) from error
        spec, status = found.spec, getattr(found, "status", None)
        if target.kind == "capacitybuffer":
            return Scale(int((spec or {}).get("replicas") or 0), found.metadata.resourceVersion, "")
        selector = (status.selector if status else None) or ""
        return Scale(int((spec.replicas if spec else 0) or 0), found.metadata.resourceVersion, selector)

    def _get(self, target: Target) -> Any:
        return self._client.get(_class(target), target.name, namespace=target.namespace)

    def set_scale(self, target: Target, before: int, after: int) -> None:
        """Set how many replicas a target wants, if it still wants `before`.

        A write is bound to the version that was read. An object whose other fields changed meanwhile (409) is read again; a
        write whose answer was lost is found done. Raises CapacityError: changed-by-others if its replicas changed.
        """
        verb = "patch" if target.kind == "capacitybuffer" else "update"
        for attempt in range(_CONFLICTS):
            seen = self.scale(target)
            if seen.replicas == after:
                return
            if seen.replicas != before:
                text = f"{target} wants {seen.replicas} replicas, not {before} as observed: left for the next round"
                raise CapacityError("changed-by-others", text)
            try:
                self.call(verb, target.resource, _where(target), partial(self._write, target, seen.version, after))
                return
            except Status as error:
                if error.code != 409:
                    raise _absent(target, error) from error
            if self._stop.wait(0.02 * 2**attempt * random.uniform(0.5, 1.0)):
                raise CapacityError("apply-interrupted", f"{verb} {target.resource} {target} was not finished")
        raise CapacityError("changed-by-others", f"{target} was changed by others {_CONFLICTS} times in a row")

    def _write(self, target: Target, version: str, replicas: int) -> None:
        self.guard()
        from lightkube.models.autoscaling_v1 import ScaleSpec
        from lightkube.models.meta_v1 import ObjectMeta
        from lightkube.types import PatchType

        if target.kind == "capacitybuffer":
            change = {"metadata": {"resourceVersion": version}, "spec": {"replicas": replicas}}
            self._client.patch(
                _class(target), target.name, change, namespace=target.namespace, patch_type=PatchType.MERGE
            )
            return
        meta = ObjectMeta(name=target.name, namespace=target.namespace, resourceVersion=version)
        wanted = _class(target)(metadata=meta, spec=ScaleSpec(replicas=replicas))
        self._client.replace(wanted, target.name, namespace=target.namespace)

    def get(self, kind: Any, resource: str, namespace: str, name: str, retry_s: float = RETRY_S) -> Any:
        """Return an object; None if there is none."""
        where = f"{name} in namespace {namespace}"
        try:
            return self.call("get", resource, where, lambda: self._client.get(kind, name, namespace=namespace), retry_s)
        except Status as error:
            if error.code == 404:
                return None
            raise CapacityError("cluster-refused", f"cannot get {resource} {where}: {error.said}") from error

    def put(self, verb: str, resource: str, thing: Any, retry_s: float = RETRY_S) -> bool:
        """Create or replace (`verb` create or update) an object; return False if another was quicker (404, 409)."""
        meta = thing.metadata
        make = self._client.create if verb == "create" else self._client.replace
        try:
            self.call(verb, resource, f"{meta.name} in namespace {meta.namespace}", lambda: make(thing), retry_s)
        except Status as error:
            if error.code in (404, 409):
                return False
            raise CapacityError("cluster-refused", f"cannot {verb} {resource} {meta.name}: {error.said}") from error
        return True

    def close(self) -> None:
        """Close all connections."""
        self._client.close()


def _where(target: Target) -> str:
    return f"{target.name} in namespace {target.namespace}"


def _class(target: Target) -> Any:
    from lightkube.generic_resource import create_namespaced_resource
    from lightkube.resources.apps_v1 import Deployment, StatefulSet

    if target.kind == "capacitybuffer":
        return create_namespaced_resource("autoscaling.x-k8s.io", "v1beta1", "CapacityBuffer", "capacitybuffers")
    return Deployment.Scale if target.kind == "deployment" else StatefulSet.Scale


def _status(error: Exception) -> int | None:
    from lightkube import ApiError

    if isinstance(error, ApiError) and error.status is not None and error.status.code:
        return error.status.code
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _final(status: int | None, said: str, verb: str, resource: str, where: str, error: Exception) -> float | None:
    """Return after how many seconds to try again, None where the API does not say; raise what a retry cannot mend."""
    if status == 429:
        try:
            return max(_PAUSE_S, min(_MOST_PAUSE_S, float(error.response.headers.get("retry-after", ""))))  # type: ignore[attr-defined]
        except (AttributeError, ValueError):
            return None
    if status is None or status >= 500:
        return None
    if status == 401:
        text = f"cannot {verb} {resource} {where}: the API does not accept the token of the service account or KUBECONFIG: {said}"
        raise CapacityError("cluster-unauthorized", text) from error
    if status == 403:
        role = "a ClusterRole" if where == "of the cluster" else "its Role"
        remedy = f"give the service account the verb {verb} on {resource} in {role} (docs/kubernetes.md)"
        text = f"cannot {verb} {resource} {where}: {remedy}: {said}"
        raise CapacityError("cluster-forbidden", text) from error
    if status in (404, 409, 410):
        raise Status(status, said) from error
    raise CapacityError(
        "cluster-refused", f"cannot {verb} {resource} {where}: the API answers {status}: {said}"
    ) from error


def _absent(target: Target, error: Status) -> CapacityError:
    """Return the error of a target that is not there."""
    if target.kind == "capacitybuffer":
        text = f"{target}: {error.said}; the cluster lacks the kind (autoscaling.x-k8s.io/v1beta1) or the object"
        remedy = "apply `quickthaw plan FILE --emit kubernetes --idle-by capacity-buffer`, or use --idle-by pause-pods"
        return CapacityError("no-capacity-buffer", f"{text}: {remedy}")
    remedy = "correct the plan's `workload`"
    if target.name.startswith("idle-"):
        remedy = "apply `quickthaw plan FILE --emit kubernetes --idle-by pause-pods` once"
    return CapacityError("not-found", f"{target.kind} {_where(target)}: {error.said}; {remedy}")
