"""What needs an extra (`kubernetes`, `keda`), with an error of one line where that is not installed."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from plugin.proxy.kubernetes.keda import ExternalScaler
    from plugin.proxy.kubernetes.session import Session
    from plugin.proxy.kubernetes.workload import Workload
    from plugin.proxy.pool.pool import ReplicaPool


def connect(session: Session | None = None) -> tuple[type[Workload], Session]:
    """Return the class of workloads and the session to give it: `session`, or a new one.

    Raises ValueError: kubernetes-missing (the extra is not installed), cluster-unknown.
    """
    if importlib.util.find_spec("lightkube") is None:
        what = "kubernetes-missing: an upstream k8s://… needs lightkube"
        raise ValueError(f"{what}; install it with: pip install 'quickthaw[kubernetes]'")
    from plugin.proxy.kubernetes.session import Session
    from plugin.proxy.kubernetes.workload import Workload

    return Workload, session or Session.from_environment()


def scaler_of(pools: Mapping[str, ReplicaPool]) -> ExternalScaler:
    """Return KEDA's external scaler for these pools. Raises ValueError (keda-missing) if the extra is not installed."""
    if importlib.util.find_spec("grpc") is None or importlib.util.find_spec("google.protobuf") is None:
        what = "keda-missing: --keda-listen needs grpcio and protobuf"
        raise ValueError(f"{what}; install them with: pip install 'quickthaw[keda]'")
    from plugin.proxy.kubernetes.keda import ExternalScaler

    return ExternalScaler(pools)
