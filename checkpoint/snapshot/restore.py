"""Bring replicas back from a snapshot, each in a sandbox of its own.

A snapshot is kept whole, so it restores any number of times, and several at the same moment: each restore gets copies of the small parts.
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

from checkpoint import disk
from checkpoint.criu.binary import Criu
from checkpoint.criu.pagemap import PAGE
from checkpoint.cuda import checkpoint as cuda
from checkpoint.cuda.driver import Driver
from checkpoint.errors import CheckpointError, Failed, HostLacks
from checkpoint.files import aside
from checkpoint.lazy_pages.client import Arriving, PageServer, told
from checkpoint.sandbox.process_tree import processes
from checkpoint.sandbox.sandbox import TMP_DIR, Bind, Sandbox, SandboxConfig, make_run_dir
from checkpoint.snapshot import file_backed, speculative
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.manifest import Snapshot

DUMP_SLOWEST = 50e6
RESTORE_TIMEOUT_S = 600.0
"""For CRIU's part of a restore; every DUMP_SLOWEST bytes of images add a second."""
UNPACK_TIMEOUT_S = 30.0
"""For copying /dev/shm and TMPDIR back; every DUMP_SLOWEST bytes of them add a second."""
START_TIMES = "start-times"
LOGS = "logs"
"""The folder of the state folder that keeps CRIU's logs of failed dumps and restores."""


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


@dataclass(frozen=True)
class LazyRestore:
    """How the page server is used: the recorded working set (None: none yet), whether to record one, and who is told of its death."""

    working_set: Path | None
    record: bool
    on_death: Callable[[str], None]
    on_warning: Callable[[str], None]
    arriving: Arriving | None = None
    """The images are being filled from a store (checkpoint.store.remote_restore)."""
    pack: bool = True
    """Copy from the working set's pack where there is one; else from the images, whose bytes `--verify=always` has just hashed."""
    map_pages: bool = True
    """Map weights and libraries' data where a view for that was made (checkpoint.snapshot.file_backed); else they are copied like
    everything."""


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
    """Whether it was begun before its command knew what it wanted (checkpoint.snapshot.speculative)."""
    plan: speculative.Plan | None = None
    """What the next restore of this command line can begin with (checkpoint.snapshot.speculative), where that is worth it."""

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
    `driver` and `gpu_pairs` (uuid then, uuid now) as in checkpoint.cuda.checkpoint; a snapshot with GPU state is never restored lazily,
    since the
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
                speculative.discard()  # it may have mapped what was there before
            foreseen = speculative.take(plan, pipes)
            begun = foreseen or speculative.begin(plan, pipes)
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
                    speculative.begin(plan, pipes), config, snapshot, criu, on_exit, lazy, cancellation, logs
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
) -> speculative.Plan:
    """What the helpers of this restore are told."""
    images = folder / "images"
    if lazy and lazy.map_pages and not lazy.record and not lazy.arriving:
        # A recording sees every page fault; what is still arriving must not be read before it is there.
        images = file_backed.find(folder) or images
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
    begun: speculative.Begun,
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
            pages = PageServer(
                *started, work / speculative.LAZY_PAGES_SOCKET, lazy.on_death, lazy.on_warning, lazy.arriving
            )
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
