"""Taking a snapshot of a sandboxed engine, and bringing replicas back from it.

A snapshot folder holds `manifest.json`, `images/` (CRIU's), and what the images link to, copied while the tree was frozen: `shm/`
(/dev/shm), `tmp/` (TMPDIR), `cache/` (compiled code that is mapped). All of it is kept, so one snapshot restores any number of times,
and several at the same moment: each restore gets a sandbox of its own with copies of the small parts.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from checkpoint import cuda, disk, early, frozen, manifest, mapped, room
from checkpoint.aside import aside
from checkpoint.criu import Criu
from checkpoint.cuda.driver import Driver
from checkpoint.errors import CheckpointError, Failed, HostLacks
from checkpoint.library import Library
from checkpoint.manifest import Snapshot, SnapshotFile
from checkpoint.pages.images import PAGE
from checkpoint.pages.server import Arriving, PageServer, told
from checkpoint.sandbox import CACHE_DIR, TMP_DIR, Bind, Sandbox, SandboxConfig, make_run_dir

DUMP_TIMEOUT_S = 30.0
"""For a dump of nothing; every DUMP_SLOWEST bytes add a second. A process killed under CRIU's hands can leave it waiting for ever."""
DUMP_SLOWEST = 50e6
RESTORE_TIMEOUT_S = 600.0
"""For CRIU's part of a restore; every DUMP_SLOWEST bytes of images add a second."""
UNPACK_TIMEOUT_S = 30.0
"""For copying /dev/shm and TMPDIR back; every DUMP_SLOWEST bytes of them add a second."""
START_TIMES = "start-times"
LOGS = "logs"
"""The folder of the state folder that keeps CRIU's logs of failed dumps and restores."""

# Runs inside the sandbox, after the images are written and before the tree runs on: what the images link to must be of the same
# moment. CRIU leaves its own hard links to deleted files behind (link_remap.N); one that stays makes the next dump fail.
_WHILE_FROZEN = """\
#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0
set -e
cp -a --sparse=always /dev/shm "{folder}/shm"
cp -a --sparse=always {tmp} "{folder}/tmp"
rm -f /dev/shm/link_remap.* {tmp}/link_remap.*
"""


def processes(init_pid: int) -> list[int]:
    """Every process below process 1 of a sandbox, by its number on the host."""
    found: list[int] = []
    waiting = [init_pid]
    while waiting:
        pid = waiting.pop()
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting.extend(int(child) for child in (task / "children").read_text().split())
        except OSError:
            continue  # ended under our eyes
        if pid != init_pid:
            found.append(pid)
    return found


def _inner_numbers(pids: Sequence[int]) -> list[int]:
    """The numbers of processes and their threads inside their PID namespace."""
    numbers = []
    for pid in pids:
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                for line in (task / "status").read_text().splitlines():
                    if line.startswith("NSpid:"):
                        numbers.append(int(line.split()[-1]))
        except OSError:
            continue
    return numbers


def private_bytes(pids: Sequence[int]) -> int:
    """Bytes of private memory of some processes: about what CRIU will write (smaps_rollup: Private_Dirty, and swapped)."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith(("Private_Dirty:", "Swap:")):
                total += int(line.split()[1]) * 1024
    return total


def _mapped_cache_files(pids: Sequence[int]) -> set[str]:
    """Files of the compile cache that the tree has mapped, relative to it: a restore needs each at its path and size."""
    found = set()
    for pid in pids:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue
        for line in maps.splitlines():
            _, _, path = line.partition(f" {CACHE_DIR}/")
            if path and not path.endswith(" (deleted)"):
                found.add(path)
    return found


def gpu_locks(library: Library) -> tuple[Path, ...]:
    """Where restores on a GPU take turns: on this host, and among containers that share the state folder."""
    return (cuda.LOCKS, library.home / "run")


def check_page_size(size: int = mmap.PAGESIZE) -> None:
    """Raise HostLacks (page-size) on a kernel whose pages are not those that images and page servers count in."""
    if size != PAGE:
        raise HostLacks(
            "page-size",
            f"this kernel's pages have {size} bytes, and snapshots count in pages of {PAGE}; use a kernel with 4 KiB pages",
        )


def image_bytes(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def take(
    library: Library,
    criu: Criu,
    sandbox: Sandbox,
    draft: Snapshot,
    compile_cache: Path,
    seal: Callable[[Path], Mapping[str, SnapshotFile]],
    sign: Callable[[bytes], bytes] | None = None,
    driver: Driver | None = None,
    visible: Sequence[str] | None = None,
    awake: Mapping[str, int] | None = None,
) -> Snapshot:
    """Dump the tree below `draft.root_pid` into the library as `draft.name`; the engine goes on running, whatever happens.

    `draft` is the manifest but for what only the dump knows. `seal` computes the digests of a folder's files. `driver`: the CUDA
    driver, where this host has a GPU; processes with a context are taken off it for the dump and brought back. `visible`, `awake`: as in
    checkpoint.cuda.suspend.

    Raises Busy when another process takes the same snapshot, Incompatible (multi-gpu), Failed when CRIU, the disk or the engine
    fail; then nothing is left. After Failed `cuda-stuck` the engine does not run any more and has to be ended.
    """
    check_page_size()
    pids = processes(sandbox.init_pid)
    on_gpu = cuda.memory_in_use(driver, pids) if driver else 0
    room.check_memory(on_gpu)
    with disk.required(f"{draft.name} is not written", "snapshot-not-written"):
        library.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    shared = room.tmpfs_bytes(Path(f"/proc/{sandbox.init_pid}/root"), ("/dev/shm", TMP_DIR))
    room.check_disk(library.folder, private_bytes(pids) + on_gpu + shared)
    with library.writing(draft.name) as folder:
        images = folder / "images"
        images.mkdir(mode=0o700)
        script = folder / "while-frozen.sh"
        script.write_text(
            _WHILE_FROZEN.format(folder=folder, tmp=TMP_DIR) + frozen.COPY.format(folder=folder / frozen.FOLDER)
        )
        script.chmod(0o700)
        mapped = _mapped_cache_files(pids)
        suspended: list[int] = []
        needs = cuda.Needs()
        if driver:
            suspended, needs = cuda.suspend(driver, pids, released=cuda.check_released, visible=visible, awake=awake)
        try:
            # Now: the driver has moved the GPU's memory into the processes'.
            wanted = private_bytes(pids) + shared
            room.check_disk(library.folder, wanted)
            limit_s = DUMP_TIMEOUT_S + wanted / DUMP_SLOWEST
            monotonic_ns = criu.dump(sandbox, draft.root_pid, images, script, limit_s, logs=library.home / LOGS)
        finally:
            if driver and suspended:
                cuda.give_back(driver, suspended, needs, gpu_locks(library))
        script.unlink()
        found = frozen.examine(folder / frozen.FOLDER, images, ("/dev/shm", TMP_DIR))
        shutil.rmtree(folder / frozen.FOLDER)
        criu.dump_cpu(images)
        for name in mapped:
            target = folder / "cache" / name
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copy(compile_cache / name, target)
        # What is in these keeps the modes that a restore compares; the folders keep others out.
        kept = [folder / name for name in ("shm", "tmp", "cache") if (folder / name).is_dir()]
        for copied in kept:
            copied.chmod(0o700)
        for noise in ("dump.log", "stats-dump", "irmap-cache"):
            (images / noise).unlink(missing_ok=True)
        for directory, _, files in os.walk(folder):
            if not any(Path(directory).is_relative_to(copied) for copied in kept):
                for file in files:
                    Path(directory, file).chmod(0o600)
        done = msgspec.structs.replace(
            draft,
            monotonic_ns=monotonic_ns,
            top_pid=max(_inner_numbers(pids), default=draft.root_pid),
            image_bytes=image_bytes(images),
            files=dict(seal(folder)),
            gpu=needs,
            start_ticks=found.start_ticks,
            stopped=found.stopped,
        )
        data = manifest.dump(done)
        if sign:
            (folder / "manifest.sig").write_bytes(sign(data))
            (folder / "manifest.sig").chmod(0o600)
        (folder / manifest.FILE_NAME).write_bytes(data)
        (folder / manifest.FILE_NAME).chmod(0o600)
    return done


@dataclass(frozen=True)
class LazyRestore:
    """How the page server is used: the recorded working set (None: none yet), whether to record one, and who is told of its death."""

    working_set: Path | None
    record: bool
    on_death: Callable[[str], None]
    on_warning: Callable[[str], None]
    arriving: Arriving | None = None
    """The images are being filled from a store (checkpoint.remote)."""
    pack: bool = True
    """Copy from the working set's pack where there is one; else from the images, whose bytes `--verify=always` has just hashed."""
    map_pages: bool = True
    """Map weights and libraries' data where a view for that was made (checkpoint.mapped); else they are copied like everything."""


class Cancellation:
    """Lets any thread end a restore that another one waits for. Good for one restore, which enters it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = False
        self._sandbox: Sandbox | None = None
        self.error: Failed | None = None
        """Why it was ended, the first reason."""

    def cancel(self, error: Failed) -> bool:
        """Have `restore` raise `error` once nothing is left of it, or before it begins. False where none is under way: not yet, or over."""
        with self._lock:
            self.error = self.error or error
            if self._under_way and self._sandbox is not None:
                self._sandbox.end()
            return self._under_way

    def __enter__(self) -> None:
        self.check()
        with self._lock:
            self._under_way = True

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._under_way = False

    def check(self, sandbox: Sandbox | None = None) -> None:
        """Raise where it was cancelled; else note what would have to be ended."""
        with self._lock:
            if self.error is not None:
                raise self.error
            self._sandbox = sandbox

    def settle(self) -> None:
        """The last moment to raise: every process runs, and is the owner's to end."""
        with self._lock:
            if self.error is not None:
                raise self.error
            self._under_way = False


@dataclass
class Restored:
    """A tree that came back. `close` ends it and everything that was made for it."""

    sandbox: Sandbox
    root_pid: int
    work: Path
    held: int
    """A descriptor that keeps the work folder locked."""
    spans: dict[str, float] = field(default_factory=dict)
    """Seconds by part: sandbox, unpack, criu."""
    pages: PageServer | None = None
    """Brings the rest of the pages; to be closed after the sandbox, or when it is complete."""
    foreseen: bool = False
    """Whether it was begun before its command knew what it wanted (checkpoint.early)."""
    plan: early.Plan | None = None
    """What the next restore of this command line can begin with (checkpoint.early), where that is worth it."""

    def close(self) -> None:
        """Kill the replica and remove its work folder. May be called twice."""
        self.sandbox.close()
        if self.pages:
            self.pages.close()
        shutil.rmtree(self.work, ignore_errors=True)
        if self.held >= 0:
            os.close(self.held)
            self.held = -1


def limits(snapshot: Snapshot) -> tuple[float, float]:
    """How long unpacking and CRIU's part of a restore may take, in seconds: a limit for hangs, which grows with the work."""
    unpacked = sum(file.size for name, file in snapshot.files.items() if name.startswith(("shm/", "tmp/")))
    return UNPACK_TIMEOUT_S + unpacked / DUMP_SLOWEST, RESTORE_TIMEOUT_S + snapshot.image_bytes / DUMP_SLOWEST


def unpack_cache(folder: Path, compile_cache: Path) -> bool:
    """Put mapped compiled code back where the tree has it mapped, with its mode; what is there and the same is left alone. Whether
    anything was not."""
    source, changed = folder / "cache", False
    if not source.is_dir():
        return False
    for file in source.rglob("*"):
        if file.is_symlink() or not file.is_file():
            continue
        target = compile_cache / file.relative_to(source)
        mode = file.stat().st_mode & 0o777
        with contextlib.suppress(FileNotFoundError):
            # 0600 is what snapshots had for every mode before modes were kept.
            if mode in (target.stat().st_mode & 0o777, 0o600) and filecmp.cmp(file, target, shallow=False):
                continue
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with aside(target) as new:
            shutil.copyfile(file, new)
            new.chmod(mode)
        changed = True
    return changed


def restore(
    library: Library,
    criu: Criu,
    snapshot: Snapshot,
    binds: Sequence[Bind],
    compile_cache: Path,
    pipes: Mapping[str, int],
    on_exit: Callable[[int, int], None] | None = None,
    run_folder: Path | None = None,
    lazy: LazyRestore | None = None,
    driver: Driver | None = None,
    gpu_pairs: Sequence[tuple[str, str]] = (),
    underway: Callable[[], None] = lambda: None,
    cancellation: Cancellation | None = None,
) -> Restored:
    """Bring a replica back into a new sandbox.

    `lazy`: pages come from a page server, the recorded working set first; without it CRIU puts every page in place before it returns.
    `driver` and `gpu_pairs` (uuid then, uuid now) as in checkpoint.cuda; a snapshot with GPU state is never restored lazily, since the
    driver reads all of it at once. `pipes` maps the snapshot's names (`stdout`, `stderr`) to descriptors for the engine's output.
    The canary is the caller's to check. `underway` is called when CRIU is at work and this process has nothing to do but wait.
    `cancellation` ends it; the owner cancels when `lazy.on_death` is called, since CRIU would wait for a page for ever.

    Raises a CheckpointError; then nothing is left: no process, mount, namespace or file.
    """
    cancellation = cancellation or Cancellation()
    if snapshot.gpu.processes:
        lazy = None
        if driver is None:
            raise HostLacks(
                "gpu-missing",
                f"{snapshot.name} holds GPU state and this host has no NVIDIA device; see quickthaw doctor",
            )
    check_page_size()
    run_folder = run_folder or library.home / "run"
    try:
        run_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_run_dir()
        with cancellation, library.in_use(snapshot.name) as folder:
            config = SandboxConfig(
                binds=binds, monotonic_ns=snapshot.monotonic_ns, kernel_facts=criu.kernel_facts(library.home)
            )
            plan = _plan(criu, snapshot, folder, run_folder, config, pipes, lazy)
            if unpack_cache(folder, compile_cache):
                early.discard()  # it may have mapped what was there before
            foreseen = early.take(plan, pipes)
            begun = foreseen or early.begin(plan, pipes)
            logs = library.home / LOGS
            underway()
            try:
                restored = _bring_back(begun, config, snapshot, criu, on_exit, lazy, cancellation, logs)
                restored.foreseen = foreseen is not None
            except CheckpointError as error:
                if not foreseen or not lazy or cancellation.error:
                    raise
                # Begun on what was so the last time; what is wrong now is found by doing it from the start.
                lazy.on_warning(f"what was begun beforehand failed ({error}); once more, from the start")
                restored = _bring_back(
                    early.begin(plan, pipes), config, snapshot, criu, on_exit, lazy, cancellation, logs
                )
            try:
                if driver and snapshot.gpu.processes:
                    cuda.resume(
                        driver,
                        processes(restored.sandbox.init_pid),
                        snapshot.gpu,
                        gpu_pairs,
                        lock_folders=gpu_locks(library),
                    )
            except BaseException:
                restored.close()
                raise
            return restored
    except OSError as error:
        raise disk.failure(f"{snapshot.name} is not restored", error, "restore-failed") from error


def _plan(
    criu: Criu,
    snapshot: Snapshot,
    folder: Path,
    run_folder: Path,
    config: SandboxConfig,
    pipes: Mapping[str, int],
    lazy: LazyRestore | None,
) -> early.Plan:
    """What the helpers of this restore are told."""
    images = folder / "images"
    if lazy and lazy.map_pages and not lazy.record and not lazy.arriving:
        # A recording sees every page fault; what is still arriving must not be read before it is there.
        images = mapped.find(folder) or images
    named = {stream: snapshot.pipes[stream] for stream in pipes if stream in snapshot.pipes}
    return {
        "run": str(run_folder),
        "snapshot": str(folder),
        "init": config.told(),
        "unpack": [[str(folder / "shm"), "/dev/shm"], [str(folder / "tmp"), TMP_DIR]],
        "criu": criu.told(snapshot.root_pid, images, named, lazy_pages=lazy is not None),
        "pages": told(images, run_folder, lazy.working_set, lazy.record, arriving=lazy.arriving, pack=lazy.pack)
        if lazy
        else None,
    }


def _bring_back(
    begun: early.Begun,
    config: SandboxConfig,
    snapshot: Snapshot,
    criu: Criu,
    on_exit: Callable[[int, int], None] | None,
    lazy: LazyRestore | None,
    cancellation: Cancellation,
    logs: Path,
) -> Restored:
    """Go on with what was begun until every process runs; where that fails, nothing of it is left."""
    began = time.monotonic()
    work = begun.work
    sandbox: Sandbox | None = None
    pages: PageServer | None = None
    try:
        if lazy and begun.pages:
            started, begun.pages = begun.pages, None
            pages = PageServer(*started, work / early.LAZY_PAGES_SOCKET, lazy.on_death, lazy.on_warning, lazy.arriving)
        sandbox = Sandbox(config, on_exit=on_exit, begun=begun)
        cancellation.check(sandbox)
        up = time.monotonic()
        unpack_s, restore_s = limits(snapshot)
        sandbox.unpacked(unpack_s)
        unpacked = time.monotonic()
        criu.restored(sandbox, sandbox.executed(restore_s), work, logs)
        sandbox.raise_pids(snapshot.top_pid)
        # For plugin/engine/start_times.py, before the first process looks.
        (sandbox.control_dir / START_TIMES).write_text(json.dumps(snapshot.start_ticks))
        sandbox.go_on(snapshot.stopped)
        begun.release()
        spans = {"sandbox": up - began, "unpack": unpacked - up, "criu": time.monotonic() - unpacked}
        plan = begun.plan if lazy and not lazy.record and not lazy.arriving else None
        cancellation.settle()
        return Restored(sandbox, snapshot.root_pid, work, begun.held, spans, pages, plan=plan)
    except BaseException as error:
        if sandbox:
            sandbox.close()
        if pages:
            pages.close()
        begun.close()
        if cancellation.error and isinstance(error, CheckpointError) and error is not cancellation.error:
            raise cancellation.error from error
        raise
