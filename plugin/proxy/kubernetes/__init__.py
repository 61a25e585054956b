"""Workloads of a Kubernetes cluster as upstreams: woken and put to sleep through their `scale`, their pods followed by watches.

Only `address` and `extra` are imported without the extra `kubernetes` (lightkube); the rest when an upstream is `k8s://…`.
"""
