"""Render the idle buffer as Kubernetes objects, in two ways of which a cluster needs one.

- `pause-pods`: Deployments of pods that do nothing, at a priority below all others, so that a real replica preempts them at
  once; with the PriorityClass they need. Works on any cluster.
- `capacity-buffer`: CapacityBuffer objects (autoscaling.x-k8s.io/v1beta1, published with the cluster autoscaler and
  Karpenter), each with its PodTemplate. No pod runs; the autoscaler keeps the capacity.
Every object has the label `quickthaw.dev/idle-by` with one of these values, for `kubectl apply -l`.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import yaml

from capacity.errors import InputError
from capacity.model import Pool, Problem, slot
from capacity.optimize.plan import Plan

WAYS = ("pause-pods", "capacity-buffer")
PRIORITY = "quickthaw-idle"
LABEL = "quickthaw.dev/idle-by"


_LABEL_VALUE = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def name(pool: str, gpus: int) -> str:
    """Return a DNS label of at most 63 characters.

    Invalid characters are replaced; a digest keeps such names distinct.
    """
    clean = re.sub(r"[^a-z0-9-]+", "-", pool.lower()).strip("-") or "pool"
    if clean != pool or len(clean) > 45:
        clean = f"{clean[:38].strip('-')}-{hashlib.sha256(pool.encode()).hexdigest()[:6]}"
    return f"idle-{clean}-{gpus}gpu"


def selector(pool: Pool) -> dict[str, str]:
    """Return the node labels of a pool, of those that the file names.

    Raises InputError for an invalid label value.
    """
    found: dict[str, str] = {}
    for field, label in (
        ("instance", "node.kubernetes.io/instance-type"),
        ("region", "topology.kubernetes.io/region"),
        ("zone", "topology.kubernetes.io/zone"),
    ):
        if field not in pool.labelled:
            continue
        value = str(getattr(pool, field))
        if not _LABEL_VALUE.fullmatch(value):
            raise InputError(
                "not-a-label",
                f"{value!r} cannot be the value of node label {label}",
                where=f"pool {pool.name}: {field}",
            )
        found[label] = value
    return found


def apart(pools: tuple[Pool, ...]) -> None:
    """Raise InputError if the pods of two pools would be scheduled to the same nodes."""
    seen: dict[tuple[tuple[str, str], ...], str] = {}
    for pool in pools:
        labels = tuple(sorted(selector(pool).items()))
        if labels in seen:
            raise InputError(
                "same-nodes",
                f"its nodes have the same labels as those of {seen[labels]}; give each its instance (the label "
                f"node.kubernetes.io/instance-type) or its zone",
                where=f"pool {pool.name}",
            )
        seen[labels] = pool.name


class _Plain(yaml.SafeDumper):
    """A YAML dumper without anchors, because people read and edit the manifests."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def objects(
    plan: Plan, *, namespace: str = "default", way: str | None = None, pause_image: str
) -> list[dict[str, Any]]:
    """Return the objects for the idle blocks of the plan's first step; `way` limits them to one of WAYS.

    Pools without idle blocks get zero replicas, so that applying a new plan removes the old buffer. Raises InputError if
    the nodes of two pools have the same labels.
    """
    found: list[dict[str, Any]] = []
    sizes = idle_pods(plan)
    apart(plan.problem.pools)
    if way in (None, "pause-pods"):
        found.append(
            {
                "apiVersion": "scheduling.k8s.io/v1",
                "kind": "PriorityClass",
                "metadata": {"name": PRIORITY, "labels": {LABEL: "pause-pods"}},
                "value": -10,  # the cluster autoscaler ignores pods below its default cutoff of -10
                "globalDefault": False,
                "preemptionPolicy": "Never",
                "description": "Holds GPUs idle until a replica needs them.",
            }
        )
        for (i, gpus), count in sizes.items():
            found.append(_deployment(plan.problem.pools[i], gpus, count, namespace, pause_image))
    if way in (None, "capacity-buffer"):
        for (i, gpus), count in sizes.items():
            found.extend(_buffer(plan.problem.pools[i], gpus, count, namespace, pause_image))
    return found


def idle_pods(plan: Plan) -> dict[tuple[int, int], int]:
    """Return (pool, GPUs per pod) -> pods, 0 where the plan holds none; a block of several instances becomes one pod per instance."""
    pods = dict.fromkeys(idle_sizes(plan.problem), 0)
    for (i, width), count in sorted(plan.blocks[0].items()):
        gpus = min(width, plan.problem.pools[i].gpus)
        pods[i, gpus] += count * (width // gpus)
    return pods


def idle_sizes(problem: Problem) -> list[tuple[int, int]]:
    """Return (pool, GPUs per pod) of all that can hold idle blocks: whatever the demand, the objects are the same."""
    found = []
    for i, pool in enumerate(problem.pools):
        fitting = [service.gpus for service in problem.services if service.fits(pool)]
        found += [(i, size) for size in sorted({min(slot(gpus, pool.gpus), pool.gpus) for gpus in fitting})]
    return found


def _pod(pool: Pool, gpus: int, image: str) -> dict[str, Any]:
    return {
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "nodeSelector": selector(pool),
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [
            {
                "name": "pause",
                "image": image,
                "resources": {
                    "requests": {"cpu": "10m", "memory": "16Mi", "nvidia.com/gpu": str(gpus)},
                    "limits": {"memory": "16Mi", "nvidia.com/gpu": str(gpus)},
                },
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "runAsNonRoot": True,
                    "runAsUser": 65535,
                    "capabilities": {"drop": ["ALL"]},
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
            }
        ],
    }


def _deployment(pool: Pool, gpus: int, count: int, namespace: str, image: str) -> dict[str, Any]:
    called = name(pool.name, gpus)
    labels = {"app.kubernetes.io/name": called, "app.kubernetes.io/managed-by": "quickthaw", LABEL: "pause-pods"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": called, "namespace": namespace, "labels": labels},
        "spec": {
            "replicas": count,
            "selector": {"matchLabels": {"app.kubernetes.io/name": called}},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"priorityClassName": PRIORITY, **_pod(pool, gpus, image)},
            },
        },
    }


def _buffer(pool: Pool, gpus: int, count: int, namespace: str, image: str) -> list[dict[str, Any]]:
    called = name(pool.name, gpus)
    labels = {"app.kubernetes.io/name": called, "app.kubernetes.io/managed-by": "quickthaw", LABEL: "capacity-buffer"}
    metadata = {"name": called, "namespace": namespace, "labels": labels}
    template = {
        "apiVersion": "v1",
        "kind": "PodTemplate",
        "metadata": metadata,
        "template": {"metadata": {"labels": labels}, "spec": _pod(pool, gpus, image)},
    }
    buffer = {
        "apiVersion": "autoscaling.x-k8s.io/v1beta1",
        "kind": "CapacityBuffer",
        "metadata": metadata,
        "spec": {
            "provisioningStrategy": "buffer.x-k8s.io/active-capacity",
            "podTemplateRef": {"name": called},
            "replicas": count,
        },
    }
    return [template, buffer]


def manifest(plan: Plan, *, namespace: str, way: str | None, pause_image: str) -> str:
    """Return the objects as a YAML stream, with instructions to apply it on top."""
    head = (
        "# Idle GPUs of a quickthaw plan, in two ways. Apply one of them; both together hold twice as many:\n"
        f"#   kubectl apply -l {LABEL}=pause-pods -f FILE\n"
        f"#   kubectl apply -l {LABEL}=capacity-buffer -f FILE\n"
        if way is None
        else ""
    )
    documents = objects(plan, namespace=namespace, way=way, pause_image=pause_image)
    return head + yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, explicit_start=True)
