"""The address of a workload: `k8s://NAMESPACE/NAME[:PORT]`, or with its kind, `k8s://NAMESPACE/statefulset/NAME[:PORT]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

SCHEME = "k8s://"
_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_FORM = re.compile(
    rf"k8s://(?P<namespace>{_LABEL})/(?:(?P<kind>deployment|statefulset)/)?(?P<name>{_LABEL}(?:\.{_LABEL})*)(?::(?P<port>\d+))?/?"
)


@dataclass(frozen=True)
class WorkloadAddress:
    """A Deployment or StatefulSet. `port` is that of its pods; None takes the one that its Service or its first container names."""

    namespace: str
    kind: str
    name: str
    port: int | None = None

    def __str__(self) -> str:
        """Return the address as it is written, with the kind where it is not a Deployment."""
        kind = "" if self.kind == "deployment" else f"{self.kind}/"
        return f"{SCHEME}{self.namespace}/{kind}{self.name}" + (f":{self.port}" if self.port else "")


def is_workload(url: str | None) -> bool:
    """Return True if the upstream is a workload of a cluster rather than a place."""
    return url is not None and url.startswith(SCHEME)


def parse(url: str) -> WorkloadAddress:
    """Return the workload that a URL names. Raises ValueError, which says the forms."""
    found = _FORM.fullmatch(url)
    port = int(found["port"]) if found and found["port"] else None
    if found is None or (port is not None and not 0 < port < 65536):
        forms = "k8s://NAMESPACE/DEPLOYMENT[:PORT] or k8s://NAMESPACE/statefulset/NAME[:PORT]"
        raise ValueError(f"{url!r} names no workload of a cluster: give {forms}")
    return WorkloadAddress(found["namespace"], found["kind"] or "deployment", found["name"], port)
