"""Freeze an idle engine with its memory, and continue it.

enter: drop the KV cache → on a GPU, offload and let the driver move its state to host memory → freeze the process tree.
leave: continue the tree → GPU state back → reload what was offloaded → a sign of life, on a GPU the canary → serve.

On a CPU nothing of the engine is moved, so no canary runs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from checkpoint.errors import CheckpointError, Failed
from checkpoint.sandbox.freezer import Freezer
from checkpoint.sandbox.process_tree import processes
from checkpoint.sandbox.sandbox import Sandbox
from launchers.errors import EngineFailed, LauncherError
from launchers.readiness import BUSY, when_idle
from plugin.runtime.gpu import ending
from plugin.runtime.phases import Phase
from plugin.runtime.steps import restore_snapshot, take_snapshot
from plugin.runtime.steps.model_mount import model_place
from plugin.runtime.weight_ring.feed import WeightFeed

if TYPE_CHECKING:
    from checkpoint.cuda.checkpoint import Needs
    from checkpoint.cuda.driver import Driver
    from plugin.runtime.steps.context import RestoreContext
    from plugin.runtime.steps.engine_process import Running

log = logging.getLogger("quickthaw")
LIFE_LIMIT_S = 10.0
"""Seconds within which the server of an engine that continues must answer; it answers within milliseconds."""


@dataclass
class OnGpu:
    """What was moved off a GPU: by the engine itself (`offloaded`), and by the driver (`suspended`, process numbers)."""

    driver: Driver
    offloaded: bool = False
    excluded: bool = False
    suspended: list[int] = field(default_factory=list)
    needs: Needs | None = None


@dataclass
class Frozen:
    """An engine in standby."""

    freezer: Freezer
    on_gpu: OnGpu | None

    @property
    def gpu_bytes(self) -> int:
        """Return the bytes of GPU memory that were given back."""
        needs = self.on_gpu.needs if self.on_gpu is not None else None
        return sum(needs.memory.values()) if needs is not None else 0


def enter(replica: RestoreContext, running: Running) -> Frozen:
    """Freeze an engine that has no requests, and change the phase to standby.

    Raises CheckpointError or LauncherError; the engine serves on. After NotResumed it does not, and must be ended.
    """
    sandbox = running.place
    if not isinstance(sandbox, Sandbox):
        raise EngineFailed("standby-no-sandbox", "an engine outside a sandbox cannot be frozen; see quickthaw doctor")
    _drop_cache(replica, running)
    on_gpu = _leave_gpu(replica, running, sandbox)
    freezer = running.freezer = running.freezer or Freezer(sandbox.init_pid)
    try:
        freezer.freeze()
        if sandbox.exit_code(running.pid) is not None:
            raise EngineFailed("engine-died", "the engine ended while it was frozen")
        replica.tracker.to(Phase.STANDBY)
    except BaseException:
        freezer.thaw()
        if on_gpu is not None:
            _return_after_failure(replica, running, on_gpu)
        raise
    return Frozen(freezer, on_gpu)


def leave(replica: RestoreContext, running: Running, frozen: Frozen) -> None:
    """Continue an engine in standby and return once the replica serves. Raises CheckpointError, LauncherError or OSError."""
    replica.tracker.to(Phase.WAKING)
    with WeightFeed(replica.tracker) as feed:
        _begin_weights(replica, frozen, feed)
        frozen.freezer.thaw()
        _check_whole(frozen)
        if frozen.on_gpu is not None:
            _return_to_gpu(replica, running, frozen.on_gpu, feed)
        filled = feed.settle()
        running.client.call("GET", "/v1/models", timeout_s=LIFE_LIMIT_S)  # whatever the status: its server answers
        _check_whole(frozen)  # one that was killed a moment ago takes its time to end
        if frozen.on_gpu is not None and replica.snapshot is not None:
            restore_snapshot.check(replica, running, replica.snapshot, filled, feed)
    replica.serve()


def _begin_weights(replica: RestoreContext, frozen: Frozen, feed: WeightFeed) -> None:
    """Begin to read weights that the engine dropped, while its GPU state comes back."""
    snapshot = replica.snapshot
    if snapshot is not None and frozen.on_gpu is not None and frozen.on_gpu.offloaded and frozen.on_gpu.excluded:
        place = model_place(snapshot, replica.weights, replica.settings.named)
        restore_snapshot.begin_weights(replica, snapshot.name, place, feed)


def memory_held(running: Running) -> int:
    """Return the bytes of host memory that an engine's processes hold; pages of files do not count."""
    from plugin.proxy.admin.costs import memory_bytes  # needed only in standby

    sandbox = running.place
    return sum(map(memory_bytes, processes(sandbox.init_pid))) if isinstance(sandbox, Sandbox) else 0


def _check_whole(frozen: Frozen) -> None:
    if frozen.freezer.lost():
        raise Failed("engine-died", "a process of the engine was killed in standby")


def _drop_cache(replica: RestoreContext, running: Running) -> None:
    """Drop the KV cache where the engine offers it. Raises LauncherError (trim-busy) if a request still runs: no standby then."""
    try:
        when_idle(lambda: replica.engine.drop_cache(running.client), lambda: replica.stop_requested)
    except LauncherError as error:
        if error.code in BUSY:
            raise
        log.info("standby: the KV cache stays in memory: %s", take_snapshot.one_line(error))


def _leave_gpu(replica: RestoreContext, running: Running, sandbox: Sandbox) -> OnGpu | None:
    """Move the engine's GPU state to host memory; return None if it has none. On an error it is back on the GPU."""
    driver = replica.driver()
    if driver is None:
        return None
    from checkpoint.cuda import checkpoint as cuda

    if not cuda.holders(driver, processes(sandbox.init_pid)):
        return None
    if replica.multi_gpu():
        raise EngineFailed("standby-multi-gpu", "no driver moves the memory of this launch off its GPUs")
    _check_host_memory(replica, running, cuda.memory_in_use(driver, processes(sandbox.init_pid)))
    awake = cuda.free_memory(driver)
    moved = OnGpu(driver, excluded=replica.snapshot is not None and replica.snapshot.weights == "excluded")
    try:
        moved.offloaded = replica.engine.offload(running.client, replica.command, moved.excluded)
    except (LauncherError, OSError) as error:  # it may or may not have its memory: a second release or wake may end it
        raise take_snapshot.NotResumed(error) from error
    visible = [gpu.uuid for gpu in replica.identity.host.gpus]
    try:
        moved.suspended, moved.needs = cuda.suspend(driver, processes(sandbox.init_pid), visible=visible, awake=awake)
    except BaseException:
        _return_after_failure(replica, running, moved)
        raise
    running.leave_gpu = partial(ending.leave, replica, sandbox, running.client)
    return moved


def _check_host_memory(replica: RestoreContext, running: Running, in_use: int) -> None:
    """Raise EngineFailed (standby-memory-short) if the host has no room for the GPU state, of which `in_use` bytes are known.

    A snapshot's images are what such an engine holds in host memory, without the KV cache.
    """
    from checkpoint.host_memory import room

    snapshot = replica.snapshot
    needed = in_use if snapshot is None else max(0, snapshot.image_bytes - memory_held(running))
    try:
        found = room()
    except (OSError, LookupError, ValueError):
        return  # this host does not say
    if found.available < needed + found.margin:
        raise EngineFailed(
            "standby-memory-short",
            f"its GPU memory needs {needed >> 20} MiB of host memory, of which {found.available >> 20} MiB are available",
        )


def _return_to_gpu(replica: RestoreContext, running: Running, moved: OnGpu, feed: WeightFeed) -> None:
    from checkpoint.cuda import checkpoint as cuda
    from checkpoint.snapshot.restore import gpu_locks

    if moved.suspended:
        assert moved.needs is not None
        cuda.resume(moved.driver, moved.suspended, moved.needs, lock_folders=gpu_locks(replica.library))
    if moved.offloaded:
        if moved.excluded and isinstance(running.place, Sandbox):
            feed.offer(running.place.control_dir)
        replica.engine.reload(running.client, replica.settings.command.model, moved.excluded)


def _return_after_failure(replica: RestoreContext, running: Running, moved: OnGpu) -> None:
    """Bring an engine that did not get to standby back to serving. Raises NotResumed if that fails."""
    from checkpoint.cuda import checkpoint as cuda
    from checkpoint.snapshot.restore import gpu_locks

    try:
        if moved.suspended:
            assert moved.needs is not None
            cuda.resume_after_dump(moved.driver, moved.suspended, moved.needs, gpu_locks(replica.library))
        if moved.offloaded:
            replica.engine.reload(running.client, replica.settings.command.model, moved.excluded)
    except (CheckpointError, LauncherError, OSError) as error:
        raise take_snapshot.NotResumed(error) from error
