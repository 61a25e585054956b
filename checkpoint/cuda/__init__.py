"""GPU state of a process tree into host memory and back, around CRIU's dump and restore.

    suspend(driver, pids)            lock all → checkpoint all; then CRIU dumps the tree
    resume(driver, pids, needs, …)   after CRIU's restore: check memory → restore all → unlock all

`driver` is a checkpoint.cuda.helper.Helper; PIDs are this process's numbers for the tree's processes. All processes are locked before
the first is checkpointed, so that none computes on what another has put away. On any error every process is brought back to RUNNING
before the error is raised; one that cannot be is named by `cuda-stuck`, and its tree has to be ended. GPU memory is looked at before
the first restore call, because a process whose restore runs out of memory is lost.

Order around them, as measured on an H100 (docs/gpu.md): quiesce → make small → NVML closed in the engine → suspend → CRIU dump;
CRIU restore → resume → wake.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from checkpoint.cuda.driver import Driver, DriverError, State
from checkpoint.errors import Busy, Failed, HostLacks, Incompatible
from checkpoint.facts import Gpu

T = TypeVar("T")
LOCK_TIMEOUT_S = 10.0
MARGIN = 64 << 20
"""Bytes of GPU memory that a restore may need beyond what was freed: contexts are allocated anew."""
TURN_TIMEOUT_S = 300.0
LOCKS = Path("/run/quickthaw")
MULTI_GPU_SINCE: tuple[int, ...] | None = None
"""The first driver version that checkpoints processes which share memory between GPUs (NCCL, CUDA IPC); none is known to."""
_PARALLEL_FLAGS = (
    "tensor-parallel-size",
    "pipeline-parallel-size",
    "data-parallel-size",
    "tp-size",
    "pp-size",
    "dp-size",
    "tp",
    "pp",
    "dp",
)


class Needs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For a snapshot's manifest: how many processes hold a CUDA context, and bytes of GPU memory by the uuid of the GPU they were on."""

    processes: int = 0
    memory: dict[str, int] = {}


def holders(driver: Driver, pids: Iterable[int]) -> list[int]:
    """Those of the processes that hold a CUDA context. Raises Failed when the driver cannot say."""
    try:
        return [pid for pid in pids if driver.state(pid) is not None]
    except DriverError as error:
        raise Failed(
            "cuda-query-failed", f"the driver does not tell which processes use CUDA: {error.result}"
        ) from error


def suspend(
    driver: Driver,
    pids: Sequence[int],
    lock_timeout_s: float = LOCK_TIMEOUT_S,
    released: Callable[[Sequence[int]], None] | None = None,
) -> tuple[list[int], Needs]:
    """Take every CUDA process among `pids` off the GPU; returns them, and what bringing them back needs.

    Nothing happens where none holds a context. `released` is called last, with all `pids`, to check that CRIU can go on (see
    `check_released`); what it raises is undone like any error.

    Raises Incompatible (multi-gpu), Failed (cuda-lock-timeout, cuda-lock-failed, cuda-checkpoint-failed, cuda-stuck …), HostLacks.
    """
    found = holders(driver, pids)
    if not found:
        if released:
            released(pids)
        return [], Needs()
    usage = _ask(lambda: {pid: driver.usage(pid) for pid in found})
    refuse_multi_gpu(driver, usage)
    before = _free(driver)
    try:
        for pid in found:
            _expect(driver, pid, State.RUNNING)
            _step("lock", pid, driver.lock, int(lock_timeout_s * 1000))
        for pid in found:
            _step("checkpoint", pid, driver.checkpoint)
        after = _free(driver)
        if released:
            released(pids)
    except BaseException as error:
        _undo(driver, found, error)
        raise
    memory: dict[str, int] = {}
    for uuid, free in after.items():
        # Whichever sees more: per-process figures are missing across PID namespaces, and free memory moves under other processes.
        told = sum(u.get(uuid, 0) for u in usage.values())
        needed = max(told, free - before.get(uuid, free))
        if needed > 0:
            memory[uuid] = needed
    return found, Needs(len(found), memory)


def resume(
    driver: Driver, pids: Sequence[int], needs: Needs, pairs: Sequence[tuple[str, str]] = (), lock_folder: Path = LOCKS
) -> list[int]:
    """Bring back every CUDA process among `pids` that is off the GPU; returns them, running.

    `pairs`: (uuid then, uuid now) for every GPU when one differs, see `gpu_pairs`. `lock_folder`: where this host's restores take turns.
    Raises Busy (gpu-busy), Incompatible (gpu-memory-short, gpu-gone) before anything is touched; Failed (cuda-processes-differ,
    cuda-restore-failed, cuda-unlock-failed, cuda-stuck). After a Failed of a replica's restore its tree has to be ended.
    """
    found = holders(driver, pids)
    if len(found) != needs.processes:
        raise Failed(
            "cuda-processes-differ",
            f"{needs.processes} processes held a CUDA context at the snapshot, {len(found)} do now",
        )
    if not found:
        return []
    where = dict(pairs)
    with _alone_on(lock_folder, {where.get(uuid, uuid) for uuid in needs.memory}):
        check_memory(driver, needs, pairs)
        _restore_all(driver, found, pairs)
    return found


def _restore_all(driver: Driver, found: Sequence[int], pairs: Sequence[tuple[str, str]]) -> None:
    try:
        for pid in found:
            _expect(driver, pid, State.CHECKPOINTED)
        for pid in found:
            _step("restore", pid, driver.restore, list(pairs))
        for pid in found:
            _step("unlock", pid, driver.unlock)
    except BaseException as error:
        _undo(driver, found, error, pairs)
        raise


@contextlib.contextmanager
def _alone_on(folder: Path, gpus: Iterable[str]) -> Iterator[None]:
    """One restore at a time on each GPU of this host: two that both find the memory free would lose one of them."""
    folder.mkdir(mode=0o755, exist_ok=True)
    fds: list[int] = []
    limit = time.monotonic() + TURN_TIMEOUT_S
    try:
        # In one order everywhere, so that nobody waits in a circle.
        for uuid in sorted(gpus):
            fds.append(os.open(folder / f"gpu-{uuid}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            while True:
                try:
                    fcntl.flock(fds[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > limit:
                        raise Busy(
                            "gpu-busy", f"another restore has been using GPU {uuid} for {TURN_TIMEOUT_S:.0f} s"
                        ) from None
                    time.sleep(0.005)
        yield
    finally:
        for fd in fds:
            os.close(fd)


def check_memory(driver: Driver, needs: Needs, pairs: Sequence[tuple[str, str]] = ()) -> None:
    """Raise Incompatible unless every GPU has the memory free that a restore takes: there, running out cannot be undone."""
    where = dict(pairs)
    free = _free(driver)
    wanted: dict[str, int] = {}
    for uuid, size in needs.memory.items():
        target = where.get(uuid, uuid)
        wanted[target] = wanted.get(target, 0) + size
    for uuid, size in wanted.items():
        if uuid not in free:
            raise Incompatible(
                "gpu-gone",
                f"the snapshot was taken on GPU {uuid}, which is not here, and no other is named in its place",
            )
        if free[uuid] < size + MARGIN:
            raise Incompatible(
                "gpu-memory-short",
                f"the restore takes {size >> 20} MiB on {uuid}, {free[uuid] >> 20} MiB are free; stop what else runs there",
            )


def gpu_pairs(then: Sequence[Gpu], now: Sequence[Gpu]) -> list[tuple[str, str]]:
    """Which GPU takes the place of which, in the order the engine sees them; empty when all are the same ones.

    Raises Incompatible when their numbers differ (see identity for their models).
    """
    if len(then) != len(now):
        raise Incompatible("gpu-count-differs", f"visible GPUs: {len(then)} in the snapshot, {len(now)} here")
    pairs = [(a.uuid, b.uuid) for a, b in zip(then, now, strict=True)]
    return pairs if any(a != b for a, b in pairs) else []


def refuse_multi_gpu(driver: Driver, usage: Mapping[int, Mapping[str, int]]) -> None:
    """Raise Incompatible when several GPUs are in use, unless the driver is known to checkpoint that."""
    used = {uuid for by_gpu in usage.values() for uuid in by_gpu}
    if len(used) < 2:
        return
    version = _ask(driver.version)
    if MULTI_GPU_SINCE is None or tuple(int(n) for n in version.split(".") if n.isdigit()) < MULTI_GPU_SINCE:
        raise multi_gpu_refusal(f"the engine uses {len(used)} GPUs, and driver {version}")


def refuse_parallel(arguments: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Raise Incompatible by the command line alone, before an engine is started for a snapshot that cannot be taken.

    `arguments`: as checkpoint.relevance normalises them.
    """
    for flag, occurrences in arguments.items():
        if (
            flag.lstrip("-") in _PARALLEL_FLAGS
            and occurrences
            and occurrences[-1]
            and occurrences[-1][0] not in ("0", "1")
        ):
            raise multi_gpu_refusal(f"{flag} {occurrences[-1][0]} uses several GPUs, and the CUDA driver")


def multi_gpu_refusal(subject: str) -> Incompatible:
    """The refusal and the way out that works today."""
    return Incompatible(
        "multi-gpu",
        f"{subject} cannot checkpoint memory shared between GPUs; "
        "it starts cold, each rank reading the lazy mount; --snapshot-store keeps its compiled code for other hosts",
    )


def nvidia_files(pid: int, prefix: str = "/dev/nvidia") -> list[str]:
    """Device files a process has open; CRIU refuses to dump any."""
    found = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            try:
                target = str(Path(entry.path).readlink())
            except OSError:
                continue  # closed meanwhile
            if target.startswith(prefix):
                found.add(target)
    except OSError:
        return []  # ended meanwhile
    return sorted(found)


def check_released(pids: Sequence[int], prefix: str = "/dev/nvidia") -> None:
    """Raise Failed, naming process and file, while one of the processes still has a GPU's device file open (NVML, mostly)."""
    for pid in pids:
        if files := nvidia_files(pid, prefix):
            name = Path(f"/proc/{pid}/comm").read_text().strip() if Path(f"/proc/{pid}/comm").exists() else "gone"
            raise Failed(
                "gpu-handle-open",
                f"process {pid} ({name}) still holds {', '.join(files)}; NVML has to be shut down in it first",
            )


def bring_back(driver: Driver, pids: Sequence[int], pairs: Sequence[tuple[str, str]] = ()) -> dict[int, str]:
    """Drive every process to RUNNING from wherever it stands; returns those that cannot be, each with the reason.

    A process that is gone needs nothing. Each step is tried once: a driver that refuses it would refuse it again.
    """
    stuck = {}
    for pid in pids:
        try:
            # At most CHECKPOINTED → LOCKED → RUNNING.
            for _ in range(3):
                state = driver.state(pid)
                if state is None or state is State.RUNNING:
                    break
                if state is State.CHECKPOINTED:
                    driver.restore(pid, list(pairs))
                elif state is State.LOCKED:
                    driver.unlock(pid)
                else:
                    stuck[pid] = f"is {state.name}"
                    break
            else:
                stuck[pid] = "did not reach RUNNING"
        except DriverError as error:
            stuck[pid] = error.result
        except HostLacks as error:
            stuck[pid] = str(error)
    return stuck


def _undo(driver: Driver, pids: Sequence[int], cause: BaseException, pairs: Sequence[tuple[str, str]] = ()) -> None:
    stuck = bring_back(driver, pids, pairs)
    if stuck:
        named = "; ".join(f"process {pid}: {why}" for pid, why in stuck.items())
        raise Failed(
            "cuda-stuck", f"{cause}; and then not brought back: {named}; the engine has to be ended"
        ) from cause


def _expect(driver: Driver, pid: int, state: State) -> None:
    found = _ask(lambda: driver.state(pid))
    if found is not state:
        raise Failed(
            "cuda-state-unexpected", f"process {pid} is {found.name if found else 'without CUDA'}, not {state.name}"
        )


def _step(what: str, pid: int, call: Callable[..., None], *arguments: object) -> None:
    try:
        call(pid, *arguments)
    except DriverError as error:
        if what == "lock" and error.result.startswith("CUDA_ERROR_NOT_READY"):
            raise Failed(
                "cuda-lock-timeout", f"process {pid} has GPU work under way that does not end; it goes on running"
            ) from error
        if error.result.startswith("CUDA_ERROR_NOT_SUPPORTED"):
            raise HostLacks(
                "cuda-not-supported", f"no {what} of process {pid}: {error.result}; it takes driver 570 or newer"
            ) from error
        raise Failed(f"cuda-{what}-failed", f"process {pid}: {error.result}") from error


def _ask(call: Callable[[], T]) -> T:
    try:
        return call()
    except DriverError as error:
        raise Failed("cuda-query-failed", f"the driver does not answer: {error.result}") from error


def _free(driver: Driver) -> dict[str, int]:
    return {device.uuid: device.free for device in _ask(driver.devices)}
