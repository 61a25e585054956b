"""What the steps of a start read of the replica that they belong to (`replica.Replica`), so that they need not know it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from checkpoint.compatibility.check import Here
    from checkpoint.criu.binary import Criu
    from checkpoint.cuda.driver import Driver
    from checkpoint.errors import Incompatible
    from checkpoint.snapshot.library import Library
    from checkpoint.snapshot.manifest import Snapshot
    from launchers.base import Engine, EngineCommand
    from plugin.runtime.capabilities import Layers
    from plugin.runtime.config import LaunchSettings
    from plugin.runtime.model_mount import Weights
    from plugin.runtime.phases import PhaseTracker, Span


class StartContext(Protocol):
    """One start of one engine: what it was asked for, and what is known so far."""

    settings: LaunchSettings
    engine: Engine
    layers: Layers
    criu: Criu | None
    weights: Weights
    tracker: PhaseTracker
    library: Library
    stdout: int | None
    stderr: int | None
    command: EngineCommand
    """What the engine is started with."""
    snapshot: Snapshot | None
    """What was taken, or restored."""
    refused: Incompatible | None
    """Why the last restore was refused, where it was."""

    @property
    def identity(self) -> Here:
        """What this launch is, for choosing and checking a snapshot."""

    @property
    def snapshot_name(self) -> str:
        """The snapshot that this launch selects."""

    def driver(self) -> Driver | None:
        """The CUDA driver's checkpoint calls, where this host has an NVIDIA device."""

    def multi_gpu(self) -> bool:
        """Whether no driver can checkpoint this launch."""

    def on_exit(self) -> Callable[[int, int], None]:
        """What a sandbox calls when the engine ends."""

    def this_start(self) -> tuple[Span, ...]:
        """The finished phases of the current start."""

    def turn_off(self, why: str, error: Exception | None = None) -> None:
        """From now on start the engine as it would start alone."""
