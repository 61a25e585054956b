"""The names and sizes of what a pool serves, for the admin page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """The names of what one pool serves; "" or empty where its owner does not know. `snapshot_bytes` is the size on disk."""

    model: str = ""
    engine: str = ""
    snapshot: str = ""
    snapshot_bytes: int = 0
    gpus: tuple[str, ...] = ()
    """The GPUs that the engine sees, by the driver's names."""
    gpu_memory: int = 0
    """Bytes of GPU memory that it takes while it is awake, as configured or as its snapshot says."""
