"""Protocols of a replica (`replica.Replica`) for the steps of a start, which therefore need not import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import threading

    from checkpoint.compatibility.check import CurrentIdentity
    from checkpoint.compatibility.check import Identity as IdentityRecord
    from checkpoint.criu.binary import Criu
    from checkpoint.cuda.driver import Driver
    from checkpoint.errors import Incompatible
    from checkpoint.snapshot.library import Library
    from checkpoint.snapshot.manifest import Canary, Snapshot
    from checkpoint.snapshot.restore import Cancellation
    from launchers.base import Engine, EngineCommand
    from plugin.runtime.capabilities import Capabilities
    from plugin.runtime.config import LaunchSettings
    from plugin.runtime.phases import PhaseTracker, Span
    from plugin.runtime.steps.engine_process import Running
    from plugin.runtime.steps.model_mount import Weights
    from plugin.runtime.steps.paging import PageFollower
    from plugin.runtime.steps.snapshot_fetch import Fetching


class StartContext(Protocol):
    """One start of one engine: its settings and its state so far."""

    settings: LaunchSettings
    engine: Engine
    capabilities: Capabilities
    criu: Criu | None
    weights: Weights
    tracker: PhaseTracker
    library: Library
    stdout: int | None
    stderr: int | None
    command: EngineCommand
    """The command line that the engine is started with."""
    canary: Canary | None
    """What the engine of this cold start answers, without the answer; None if nothing that we can compare."""
    snapshot: Snapshot | None
    """The snapshot that was taken or restored."""
    refused: Incompatible | None
    """Why the last restore was refused, if it was."""

    @property
    def identity(self) -> CurrentIdentity:
        """Return the identity of this launch, used to select and check a snapshot."""

    @property
    def known_identity(self) -> CurrentIdentity | None:
        """Return the identity if it has been computed by now."""

    def forget_identity(self) -> None:
        """Compute the identity again when it is needed."""

    @property
    def stop_requested(self) -> bool:
        """Return True once the launch is stopping."""

    @property
    def snapshot_name(self) -> str:
        """Return the name of the snapshot that this launch selects."""

    def driver(self) -> Driver | None:
        """Return the CUDA driver's checkpoint API, or None on a host without an NVIDIA device."""

    def multi_gpu(self) -> bool:
        """Return True if no driver can checkpoint this launch."""

    def on_exit(self) -> Callable[[int, int], None]:
        """Return the callback that a sandbox calls with (pid, exit code) when the engine ends."""

    def start_spans(self) -> tuple[Span, ...]:
        """Return the finished phases of the current start."""

    def turn_off(self, why: str, error: Exception | None = None) -> None:
        """Turn all capabilities off: start the engine from now on as it would start alone."""


class RestoreContext(StartContext, Protocol):
    """A start that restores a snapshot, with the state for pages that arrive later and for waiting requests."""

    fetching: Fetching
    page_follower: PageFollower
    underway: threading.Event
    """Set when other processes do the work of the start."""
    cancellation: Cancellation
    """Cancels the restore that is running."""
    page_server_error: str
    """Why pages of the restored engine will never arrive, or ""."""
    on_gpu: bool
    """True if the snapshot holds GPU state: it cannot be restored lazily."""
    restored: bool
    recording: bool
    """True if this restore records the snapshot's working set."""
    spans: dict[str, float]
    """Parts of the restore in seconds."""

    @property
    def expects(self) -> Callable[[], bool]:
        """A function that returns True if a waiting request will run beside the canary."""

    @property
    def cancel_requests(self) -> Callable[[], bool]:
        """A function that cancels the requests that run beside the canary and returns True if there were any."""

    def mounting(self) -> None:
        """Change the phase to mounting, where a start begins."""

    def check_identity(self, snapshot: Snapshot) -> IdentityRecord:
        """Return the snapshot's identity. Raises Incompatible when it may not be restored here."""

    def on_page_server_failed(self, reason: str) -> None:
        """Kill the engine because its missing pages will never arrive."""

    def set_running(self, running: Running) -> None:
        """Set the running engine. Raises EngineFailed if a stop was requested meanwhile."""

    def serve(self) -> None:
        """Change the phase to serving. Raises EngineFailed if the engine has ended."""
