"""Move a process tree's GPU state into host memory and back, around CRIU's dump and restore.

    suspend(driver, pids)             lock all → checkpoint all; then CRIU dumps the tree
    resume_after_dump(driver, pids, needs)    after the dump: the dumped tree must resume, even if it has to wait
    resume(driver, pids, needs, …)    after CRIU's restore: check memory → restore all → unlock all

`driver` is a checkpoint.cuda.helper.Helper. PIDs are this process's numbers for the tree's processes. Each step is
taken for all processes at once. All are locked before the first is checkpointed, so that none computes on memory that
another has offloaded, and every restore of a tree has ended before the first is unlocked. On any
error, every process is brought back to RUNNING before the error is raised. If that fails, `cuda-stuck` names the
process, and its tree must be killed. GPU memory is checked before the first restore call, because a process whose
restore runs out of memory is lost.

Order of the surrounding steps, as measured on an H100 (docs/gpu.md): quiesce → trim → close NVML in the engine →
suspend → CRIU dump; CRIU restore → resume → wake.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import msgspec

from checkpoint.compatibility.gpu import Gpu
from checkpoint.cuda.driver import MOVE_TIMEOUT_S, STALLED, DeviceMemory, Driver, DriverError, State
from checkpoint.cuda.gpu_locks import LOCKS, gpu_locks
from checkpoint.cuda.placement import all_pairs
from checkpoint.cuda.processes import Areas, added, anonymous_areas
from checkpoint.cuda.several import probe
from checkpoint.errors import Busy, Failed, HostLacks, Incompatible

log = logging.getLogger("quickthaw")
T = TypeVar("T")
LOCK_TIMEOUT_S = 10.0
MARGIN = 64 << 20
"""Bytes of GPU memory that a restore may need beyond what was freed: contexts are allocated again."""
RESUME_TIMEOUT_S = 60.0
"""How long a resume after a dump waits for the GPU's lock and for free memory, seconds. Then it is tried anyway."""
MOVE_LEAST_S = 60.0
MOVE_SLOWEST = 100 << 20
"""Timeout of a process's checkpoint or restore, seconds; MOVE_SLOWEST bytes of the tree's GPU memory add one each."""
ONE_BY_ONE = "QUICKTHAW_CUDA_ONE_BY_ONE"
"""Environment variable: 1 moves the processes of a tree one after the other, for a driver that fails otherwise."""
MULTI_GPU_SINCE: tuple[int, ...] | None = None
"""The first driver version that checkpoints processes which share memory between GPUs (NCCL, CUDA IPC); None: no version is known to."""
PARALLEL_FLAGS = (
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


class Needs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a resume needs, for a snapshot's manifest.

    The number of processes with a CUDA context, bytes of GPU memory by the uuid of the GPU they were on, and the uuids
    of all GPUs of the host if there were several (see placement.all_pairs).
    """

    processes: int = 0
    memory: dict[str, int] = {}
    gpus: list[str] = []


def holders(driver: Driver, pids: Iterable[int]) -> list[int]:
    """List the processes that hold a CUDA context. Raises Failed when the driver does not answer."""
    try:
        return [pid for pid in pids if driver.state(pid) is not None]
    except DriverError as error:
        raise Failed(
            "cuda-query-failed", f"the driver did not report which processes use CUDA: {error.result}"
        ) from error


def _nodes(devices: Iterable[DeviceMemory]) -> dict[str, Path]:
    """Return the device file of each GPU by uuid, where NVML knows it."""
    return {device.uuid: Path(device.node) for device in devices if device.node}


def free_memory(driver: Driver) -> dict[str, int]:
    """Return the bytes of free memory by GPU uuid. Raises Failed when the driver does not answer."""
    return {device.uuid: device.free for device in _ask(driver.devices)}


def memory_in_use(driver: Driver, pids: Iterable[int]) -> int:
    """Return the bytes of GPU memory that processes hold, which a checkpoint adds to their host memory.

    Returns 0 if NVML does not report it (another PID namespace). Raises Failed when the driver does not answer.
    """
    found = holders(driver, pids)
    usage = _ask(lambda: [driver.usage(pid) for pid in found])
    return sum(size for by_gpu in usage for size in by_gpu.values())


def suspend(
    driver: Driver,
    pids: Sequence[int],
    lock_timeout_s: float = LOCK_TIMEOUT_S,
    released: Callable[[Sequence[int]], None] | None = None,
    visible: Sequence[str] | None = None,
    awake: Mapping[str, int] | None = None,
    gained: dict[int, Areas] | None = None,
) -> tuple[list[int], Needs]:
    """Take every CUDA process among `pids` off the GPU; return them, and what resuming them needs.

    `visible`: uuids of the GPUs that the tree may use (None: every GPU); other GPUs are ignored, because other
    programs change their free memory. `awake`: free bytes by uuid while the engine held all of its memory, if it has
    offloaded some since; a replica will reload it. `gained` receives, by process, the memory that the driver has put its
    state into. Does nothing if no process holds a context. `released` is called last, with all `pids`, to check that CRIU
    can dump (checkpoint.cuda.processes.check_released); an exception it raises undoes the suspension, like any error.

    Raises Incompatible (multi-gpu, gpu-mig), Failed (cuda-lock-timeout, cuda-lock-failed, cuda-checkpoint-failed,
    cuda-stuck …), HostLacks.
    """
    found = holders(driver, pids)
    if not found:
        if released:
            released(pids)
        return [], Needs()
    usage = _ask(lambda: {pid: driver.usage(pid) for pid in found})
    devices = _ask(driver.devices)
    before = {device.uuid: device.free for device in devices}
    used = {uuid for by_gpu in usage.values() for uuid, size in by_gpu.items() if size}
    refuse_multi_gpu(driver, used)
    own = used or (before.keys() if visible is None else before.keys() & set(visible))
    refuse_mig(devices, own)

    limit_s = _move_limit(size for by_gpu in usage.values() for size in by_gpu.values())

    def checkpoint(pid: int) -> None:
        areas = anonymous_areas(pid) if gained is not None else []
        _step("checkpoint", pid, driver.checkpoint, limit_s)
        if gained is not None:
            gained[pid] = added(areas, anonymous_areas(pid))

    try:
        for pid in found:
            _expect(driver, pid, State.RUNNING)
        _each(found, lambda pid: _step("lock", pid, driver.lock, int(lock_timeout_s * 1000)))
        _each(found, checkpoint)
        after = free_memory(driver)
        if not used:
            # NVML uses the host's process numbers, so in a container only the freed memory shows which GPUs were used.
            refuse_multi_gpu(driver, {uuid for uuid in own if after.get(uuid, 0) - before[uuid] > MARGIN})
        if released:
            released(pids)
    except BaseException as error:
        _undo(driver, found, error)
        raise
    memory: dict[str, int] = {}
    for uuid in own:
        # Take the larger figure: per-process figures are missing across PID namespaces, and other processes change free
        # memory.
        reported = sum(u.get(uuid, 0) for u in usage.values())
        free_awake = min(before[uuid], (awake or before).get(uuid, before[uuid]))
        needed = max(reported, after.get(uuid, 0) - free_awake)
        if needed > 0:
            memory[uuid] = needed
    return found, Needs(len(found), dict(sorted(memory.items())), list(before) if len(before) > 1 else [])


def resume_after_dump(
    driver: Driver,
    pids: Sequence[int],
    needs: Needs,
    lock_folders: Sequence[Path] = (LOCKS,),
    timeout_s: float = RESUME_TIMEOUT_S,
) -> None:
    """After a dump, bring every process of `pids` (as returned by `suspend`) back to RUNNING.

    The engine cannot run otherwise. So this function waits up to `timeout_s` for the GPU's lock and for free memory,
    and then tries anyway. Raises only Failed (cuda-stuck); the tree must then be killed.
    """
    limit = time.monotonic() + timeout_s
    with contextlib.ExitStack() as locks:
        # Busy, no folder for locks, or no answer from the driver: resume without the locks.
        with contextlib.suppress(Busy, Failed, HostLacks):
            locks.enter_context(gpu_locks(lock_folders, needs.memory, _nodes(_ask(driver.devices)), timeout_s))
        while time.monotonic() < limit:
            try:
                check_memory(driver, needs, margin=0)
                break
            except Incompatible:
                time.sleep(0.1)
            except (Failed, HostLacks):
                break  # the driver does not answer: bring_to_running reports the result for each process
        stuck = bring_to_running(driver, pids, limit_s=_move_limit(needs.memory.values()))
    if stuck:
        raise _stuck("after the dump", stuck)


def resume(
    driver: Driver,
    pids: Sequence[int],
    needs: Needs,
    pairs: Sequence[tuple[str, str]] = (),
    lock_folders: Sequence[Path] = (LOCKS,),
) -> list[int]:
    """Bring back every CUDA process among `pids` that is off the GPU; return them, running.

    `pairs`: (uuid then, uuid now) for every GPU if one differs, see `gpu_pairs`. `lock_folders`: folders of the
    locks that serialize restores; containers that share the state folder also share its locks.

    Raises Busy (gpu-busy), Incompatible (gpu-memory-short, gpu-gone), and Failed (cuda-processes-differ,
    cuda-restore-failed, cuda-unlock-failed, cuda-stuck). After Failed, or Incompatible, the tree must be killed:
    another program may have filled the GPU after its memory was checked.
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
    devices = _ask(driver.devices)
    here = [device.uuid for device in devices] if pairs else []
    with gpu_locks(lock_folders, {where.get(uuid, uuid) for uuid in needs.memory}, _nodes(devices)):
        check_memory(driver, needs, pairs)
        _restore_all(driver, found, all_pairs(pairs, needs.gpus, here), _move_limit(needs.memory.values()))
    return found


def _restore_all(driver: Driver, found: Sequence[int], pairs: Sequence[tuple[str, str]], limit_s: float) -> None:
    def restore(pid: int) -> None:
        _step("restore", pid, driver.restore, list(pairs), limit_s)

    try:
        for pid in found:
            _expect(driver, pid, State.CHECKPOINTED)
        try:
            _each(found, restore)
        except Failed as refused:
            # A driver that does not restore several at once leaves those that it refused as they were.
            if len(found) < 2 or STALLED in str(refused):
                raise
            left = [pid for pid in found if _state(driver, pid) is State.CHECKPOINTED]
            if not left:
                raise
            log.warning("%s; restoring one process after the other", refused)
            for pid in left:
                restore(pid)
            for pid in found:
                _expect(driver, pid, State.LOCKED)
        _each(found, lambda pid: _step("unlock", pid, driver.unlock))
    except Incompatible:
        raise  # out of memory: the driver brings the process back no more (cuda-checkpoint #44), nor does the tree run without it
    except BaseException as error:
        if STALLED in str(error):  # a second try would take as long
            raise Failed("cuda-stuck", f"{error}; end the engine") from error
        _undo(driver, found, error, pairs)
        raise


def _each(pids: Sequence[int], step: Callable[[int], None]) -> None:
    """Call `step` for each process, all at once; wait until every call has ended, then raise the first error.

    An interrupt waits for them, too: a process whose state is on its way cannot be brought back.
    """
    if len(pids) < 2 or os.environ.get(ONE_BY_ONE) == "1":
        for pid in pids:
            step(pid)
        return
    with ThreadPoolExecutor(len(pids)) as pool:
        calls = [pool.submit(step, pid) for pid in pids]
        wait(calls)
    for call in calls:
        call.result()


def check_memory(driver: Driver, needs: Needs, pairs: Sequence[tuple[str, str]] = (), margin: int = MARGIN) -> None:
    """Raise Incompatible unless every GPU has enough free memory; a restore that runs out of memory cannot be undone."""
    where = dict(pairs)
    free = free_memory(driver)
    wanted: dict[str, int] = {}
    for uuid, size in needs.memory.items():
        target = where.get(uuid, uuid)
        wanted[target] = wanted.get(target, 0) + size
    for uuid, size in wanted.items():
        if uuid not in free:
            raise Incompatible(
                "gpu-gone",
                f"the snapshot was taken on GPU {uuid}, which this host does not have, and no other GPU was named in its place",
            )
        if free[uuid] < size + margin:
            raise Incompatible(
                "gpu-memory-short",
                f"the restore needs {size >> 20} MiB on {uuid}, which has {free[uuid] >> 20} MiB free; stop other programs on it",
            )


def gpu_pairs(then: Sequence[Gpu], now: Sequence[Gpu]) -> list[tuple[str, str]]:
    """Return (uuid then, uuid now) for each GPU in the order that the engine sees; empty if all are the same.

    Raises Incompatible (gpu-count-differs); checkpoint.compatibility.check compares their models.
    """
    if len(then) != len(now):
        raise Incompatible("gpu-count-differs", f"visible GPUs: {len(then)} in the snapshot, {len(now)} here")
    pairs = [(a.uuid, b.uuid) for a, b in zip(then, now, strict=True)]
    return pairs if any(a != b for a, b in pairs) else []


def refuse_multi_gpu(driver: Driver, used: Collection[str]) -> None:
    """Raise Incompatible (multi-gpu) if several GPUs (uuids) are in use, unless the driver is known to support that."""
    if len(used) < 2:
        return
    version = _ask(driver.version)
    if MULTI_GPU_SINCE is None or tuple(int(n) for n in version.split(".") if n.isdigit()) < MULTI_GPU_SINCE:
        raise multi_gpu_refusal(f"the engine uses {len(used)} GPUs", probe(version, {}, driver))


def refuse_mig(devices: Iterable[DeviceMemory], own: Collection[str]) -> None:
    """Raise Incompatible (gpu-mig) if a GPU of the engine is divided (MIG).

    A slice's memory and name are not the GPU's own.
    """
    for device in devices:
        if device.mig and device.uuid in own:
            raise mig_refusal(f"GPU {device.uuid}")


def refuse_slice(visible: str | None) -> None:
    """Raise Incompatible (gpu-mig) if CUDA_VISIBLE_DEVICES names a slice, before an engine is started for a snapshot."""
    for word in (visible or "").split(","):
        if word.strip().startswith("MIG"):
            raise mig_refusal(word.strip())


def mig_refusal(subject: str) -> Incompatible:
    """Build the error for a divided GPU, with what works there."""
    return Incompatible(
        "gpu-mig", f"{subject} is divided (MIG), and no known driver checkpoints a slice; the engine starts cold"
    )


def refuse_parallel(arguments: Mapping[str, Sequence[Sequence[str]]], probed: Callable[[], str] = lambda: "") -> None:
    """Raise Incompatible (multi-gpu) by the command line alone, before an engine is started for an impossible snapshot.

    `arguments` are normalised by checkpoint.compatibility.launch_options. Options in the file given by `--config`
    count too, unless the command line overrides them. `probed` returns what this machine has (checkpoint.cuda.several).
    """
    given = {flag.lstrip("-"): values[-1][0] for flag, values in arguments.items() if values and values[-1]}
    source = {flag.lstrip("-"): flag for flag in arguments}
    for name, value in _config_file(given.get("config")).items():
        if name not in given:
            given[name], source[name] = value, f"{name} in {given['config']}"
    for name in PARALLEL_FLAGS:
        if name in given and given[name] not in ("0", "1"):
            raise multi_gpu_refusal(f"{source[name]} {given[name]} uses several GPUs", probed())


def _config_file(path: str | None) -> dict[str, str]:
    """Read an engine's YAML file of arguments.

    Return nothing if it is missing or invalid, which the engine reports.
    """
    if not path:
        return {}
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(name).replace("_", "-"): str(value) for name, value in found.items()}


def multi_gpu_refusal(subject: str, probed: str = "") -> Incompatible:
    """Build the error for several GPUs, with what was probed and a remedy that works today."""
    found = f" (probed: {probed})" if probed else ""
    return Incompatible(
        "multi-gpu",
        f"{subject}, and no test has passed that checkpoints memory shared between them{found}; "
        "the engine starts cold, each rank reads the lazy mount, and --snapshot-store shares compiled code between hosts",
    )


def _move_limit(sizes: Iterable[int]) -> float:
    """Return the timeout of one process's move, of a tree with so many bytes on its GPUs; the longest if none are known."""
    size = sum(sizes)
    return min(MOVE_LEAST_S + size / MOVE_SLOWEST, MOVE_TIMEOUT_S) if size else MOVE_TIMEOUT_S


def bring_to_running(
    driver: Driver, pids: Sequence[int], pairs: Sequence[tuple[str, str]] = (), limit_s: float = MOVE_TIMEOUT_S
) -> dict[int, str]:
    """Bring every process to RUNNING from any state; return those that failed, each with the reason.

    All at once, then those that failed one after the other. A process that has ended needs nothing.
    """
    stuck: dict[int, str] = {}

    def bring(pid: int) -> None:
        if why := _why_not_running(driver, pid, pairs, limit_s):
            stuck[pid] = why
        else:
            stuck.pop(pid, None)

    _each(pids, bring)
    # After a call that never returned, there is no second try: it would take as long.
    if len(pids) > 1 and not any(STALLED in why for why in stuck.values()):
        for pid in sorted(stuck):
            bring(pid)
    return stuck


def _why_not_running(driver: Driver, pid: int, pairs: Sequence[tuple[str, str]], limit_s: float) -> str:
    """Bring one process to RUNNING; return why it is not, or ""."""
    try:
        # At most CHECKPOINTED → LOCKED → RUNNING.
        for _ in range(3):
            state = driver.state(pid)
            if state is None or state is State.RUNNING:
                return ""
            if state is State.CHECKPOINTED:
                driver.restore(pid, list(pairs), limit_s)
            elif state is State.LOCKED:
                driver.unlock(pid)
            else:
                return f"is {state.name}"
        return "did not reach RUNNING"
    except DriverError as error:
        return error.result
    except HostLacks as error:
        return str(error)


def _undo(driver: Driver, pids: Sequence[int], cause: BaseException, pairs: Sequence[tuple[str, str]] = ()) -> None:
    stuck = bring_to_running(driver, pids, pairs)
    if stuck:
        raise _stuck(str(cause), stuck) from cause


def _stuck(when: str, stuck: Mapping[int, str]) -> Failed:
    named = "; ".join(f"process {pid}: {why}" for pid, why in stuck.items())
    return Failed("cuda-stuck", f"{when}: some processes did not return to the GPU ({named}); end the engine")


def _state(driver: Driver, pid: int) -> State | None:
    return _ask(lambda: driver.state(pid))


def _expect(driver: Driver, pid: int, state: State) -> None:
    found = _state(driver, pid)
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
                "cuda-lock-timeout", f"GPU work of process {pid} did not end in time; the process keeps running"
            ) from error
        if what == "restore" and error.result.startswith("CUDA_ERROR_OUT_OF_MEMORY"):
            raise Incompatible(
                "gpu-memory-short",
                f"another program took the GPU's memory while process {pid} was restored; stop other programs on it",
            ) from error
        if error.result.startswith("CUDA_ERROR_NOT_SUPPORTED"):
            raise HostLacks(
                "cuda-not-supported", f"cannot {what} process {pid}: {error.result}; install driver 570 or newer"
            ) from error
        raise Failed(f"cuda-{what}-failed", f"process {pid}: {error.result}") from error


def _ask(call: Callable[[], T]) -> T:
    try:
        return call()
    except DriverError as error:
        raise Failed(
            "cuda-query-failed", f"the CUDA driver failed: {error.result}; see whether nvidia-smi works"
        ) from error
