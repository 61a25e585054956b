"""What several GPUs would need, probed on this machine: the driver, its entry points, and the engine's NCCL.

No launch on several GPUs is snapshotted yet, whatever is found: no test has passed on such a machine
(MULTI_GPU_SINCE of checkpoint.cuda.checkpoint). What each version allows, by its own documents, is in docs/gpu.md.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from checkpoint.cuda.driver import Driver, DriverError
from checkpoint.cuda.leaving import numbers
from checkpoint.errors import HostLacks

IPC_DRIVER = (610,)
"""The first driver that checkpoints memory shared by CUDA IPC, of processes that were started with one job file."""
SUSPENDS = (2, 29, 7)
"""The first NCCL with ncclCommSuspend and ncclCommResume."""
CUSTOM_STORAGE = "cuCheckpointOperationComplete"
"""Entry point of CustomStorage (CUDA 13.4)."""
LIMIT_S = 2.0
"""Maximum seconds to wait for the driver's helper: the engine's cold start waits meanwhile."""


def probe(driver_version: str, packages: Mapping[str, str], driver: Driver | None) -> str:
    """Return in words what this machine has of what several GPUs need. `packages`: the engine's, by name."""
    nccl = next((version for name, version in sorted(packages.items()) if name.startswith("nvidia_nccl")), "")
    return "; ".join(
        (
            f"driver {driver_version or 'unknown'}, CUDA IPC {_since(driver_version, IPC_DRIVER)}",
            f"CustomStorage {_custom_storage(driver)}",
            f"NCCL {nccl or 'unknown'}, ncclCommSuspend {_since(nccl, SUSPENDS)}",
        )
    )


def _since(version: str, first: tuple[int, ...]) -> str:
    return "there" if numbers(version) >= first else f"needs {'.'.join(map(str, first))}"


def _custom_storage(driver: Driver | None) -> str:
    if driver is None:
        return "not probed"
    found: list[str] = []

    def ask() -> None:
        try:
            found.append("there" if driver.finds(CUSTOM_STORAGE) else "missing")
        except (DriverError, HostLacks) as error:
            found.append(f"not probed ({getattr(error, 'result', error)})")

    asking = threading.Thread(target=ask, name="gpu-probe", daemon=True)
    asking.start()
    asking.join(LIMIT_S)
    return found[0] if found else f"not probed (the driver did not answer within {LIMIT_S:.0f} s)"
