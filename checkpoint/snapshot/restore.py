"""Restore replicas from a snapshot, each in its own sandbox.

A restore never changes the snapshot, so several restores can run at once. Each restore gets its own copy of the
small parts (/dev/shm, TMPDIR).
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint import disk
from checkpoint.criu.binary import Criu
from checkpoint.criu.pagemap import PAGE, process_ids
from checkpoint.cuda import checkpoint as cuda
from checkpoint.cuda.driver import Driver
from checkpoint.cuda.gpu_locks import LOCKS
from checkpoint.cuda.processes import recorded as gpu_state
from checkpoint.errors import CheckpointError, Failed, HostLacks
from checkpoint.files import private_folder, replacing
from checkpoint.lazy_pages.client import DownloadingImages, PageServer, server_config
from checkpoint.sandbox.process_tree import processes
from checkpoint.sandbox.sandbox import TMP_DIR, Bind, Sandbox, SandboxConfig, make_run_dir
from checkpoint.snapshot import file_backed, speculative
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.manifest import Snapshot

if TYPE_CHECKING:
    from checkpoint.sandbox.egress import Egress

DUMP_SLOWEST = 50e6
RESTORE_TIMEOUT_S = 600.0
"""Timeout for CRIU's part of a restore; each DUMP_SLOWEST bytes of images add a second."""
UNPACK_TIMEOUT_S = 30.0
"""Timeout for copying /dev/shm and TMPDIR back; each DUMP_SLOWEST bytes of them add a second."""
START_TIMES = "start-times"
LOGS = "logs"
"""Subfolder of the state folder for CRIU's logs of failed dumps and restores."""


def gpu_locks(library: Library) -> tuple[Path, ...]:
    """Return the lock folders that serialize GPU restores.

    One is for this host, one for containers that share the state folder.
    """
    return (LOCKS, library.home / "run")


def check_page_size(size: int = mmap.PAGESIZE) -> None:
    """Raise HostLacks (page-size) unless the kernel's page size is that of images and page servers."""
    if size != PAGE:
        raise HostLacks(
            "page-size",
            f"this kernel's pages have {size} bytes, and snapshots count in pages of {PAGE}; use a kernel with 4 KiB pages",
        )


@dataclass(frozen=True)
class LazyRestore:
    """Settings of a lazy restore.

    `working_set` is the recorded working set, None if there is none yet. `record` asks for a recording of one.
    `on_death` is called with a message when the page server fails, `on_warning` with each warning.
    """

    working_set: Path | None
    record: bool
    on_death: Callable[[str], None]
    on_warning: Callable[[str], None]
    downloading: DownloadingImages | None = None
    """Set while a store still fills the images (checkpoint.store.remote_restore)."""
    pack: bool = True
    """Copy from the working set's pack if there is one. If False, copy from the images, whose bytes `--verify=always` has just hashed."""
    map_pages: bool = True
    """Map weights and library data through the file-backed images if they exist (checkpoint.snapshot.file_backed). If
    False, copy all pages."""
    fill: bool = False
    """Put every page in place, by several threads, before any process runs (checkpoint.lazy_pages.filler). No page server is
    left then."""
    fill_only: tuple[int, ...] = ()
    """With `fill`: only the pages of these processes, by their numbers in the images. The others come back lazily."""


class Cancellation:
    """Let any thread cancel a restore that another thread waits for. Single use; `restore` enters it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = False
        self._sandbox: Sandbox | None = None
        self.error: Failed | None = None
        """The first reason given for the cancellation."""

    def cancel(self, error: Failed) -> bool:
        """Make `restore` raise `error` after it has cleaned up, or before it begins.

        Returns False when no restore is running: it has not begun, or it is over.
        """
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
        """Raise the error of a cancellation, or remember the sandbox that a later cancellation must end."""
        with self._lock:
            if self.error is not None:
                raise self.error
            self._sandbox = sandbox

    def settle(self) -> None:
        """Raise the error of a cancellation for the last time.

        Afterwards every process runs, and the owner must end them.
        """
        with self._lock:
            if self.error is not None:
                raise self.error
            self._under_way = False


@dataclass
class Restored:
    """A restored process tree. `close` ends it and removes everything made for it."""

    sandbox: Sandbox
    root_pid: int
    work: Path
    lock_fd: int
    """File descriptor that keeps the work folder locked."""
    spans: dict[str, float] = field(default_factory=dict)
    """Seconds by part: sandbox, unpack, criu."""
    times: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Begin and end (time.monotonic) of what runs beside other work: criu, fill, cuda."""
    pages: PageServer | None = None
    """Page server that fills in the remaining pages. Close it after the sandbox, or when it has filled in every page."""
    begun_speculatively: bool = False
    """Whether the restore began speculatively (checkpoint.snapshot.speculative)."""
    plan: speculative.Plan | None = None
    """Plan for a speculative restore at the next start of this command line (checkpoint.snapshot.speculative). None if
    it saves no time."""

    def close(self) -> None:
        """Kill the replica and remove its work folder. Idempotent."""
        self.sandbox.close()
        if self.pages:
            self.pages.close()
        shutil.rmtree(self.work, ignore_errors=True)
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1


def limits(snapshot: Snapshot) -> tuple[float, float]:
    """Return the timeouts for unpacking and for CRIU's part, in seconds.

    They detect hangs, and grow with the snapshot's size.
    """
    unpacked = sum(file.size for name, file in snapshot.files.items() if name.startswith(("shm/", "tmp/")))
    return UNPACK_TIMEOUT_S + unpacked / DUMP_SLOWEST, RESTORE_TIMEOUT_S + snapshot.image_bytes / DUMP_SLOWEST


def unpack_cache(folder: Path, compile_cache: Path) -> bool:
    """Copy mapped compiled code back to the paths where the process tree maps it, with its file modes.

    Files that are already identical stay untouched. Returns whether any file was written.
    """
    source, changed = folder / "cache", False
    if not source.is_dir():
        return False
    for file in source.rglob("*"):
        if file.is_symlink() or not file.is_file():
            continue
        target = compile_cache / file.relative_to(source)
        mode = file.stat().st_mode & 0o777
        with contextlib.suppress(FileNotFoundError):
            # Snapshots taken before modes were kept have 0600 for every file.
            if mode in (target.stat().st_mode & 0o777, 0o600) and filecmp.cmp(file, target, shallow=False):
                continue
        private_folder(target.parent)
        with replacing(target) as new:
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
    egress: Egress | None = None,
    before_kill: Callable[[Sandbox], object] = lambda sandbox: None,
) -> Restored:
    """Restore a replica into a new sandbox.

    With `lazy`, a page server supplies the pages, those of the recorded working set first. Without it, CRIU copies
    every page before it returns. `driver` and `gpu_pairs` (uuid at the dump, uuid now) are those of
    checkpoint.cuda.checkpoint. Processes with GPU state are filled (LazyRestore.fill) and never restored lazily, because
    the driver pins all of their memory at once; the others, too, unless `lazy.fill_only` names those with GPU state.
    `pipes` maps the snapshot's stream names (`stdout`, `stderr`) to descriptors for the engine's output.
    The caller must check the canary. `underway` is called once CRIU runs and this process only waits. `cancellation`
    ends the restore. `before_kill` is called before a tree is ended of which some processes may be on the GPU again.
    `egress` is the way out of the sandbox. Unless all is filled first, the owner must cancel when
    `lazy.on_death` is called, because CRIU would wait for a page forever.

    Raises a CheckpointError. On failure no process, mount, namespace or file is left.
    """
    cancellation = cancellation or Cancellation()
    if snapshot.gpu.processes:
        lazy = lazy and replace(lazy, fill=True, map_pages=False, downloading=None)
        if driver is None:
            raise HostLacks(
                "gpu-missing",
                f"{snapshot.name} holds GPU state and this host has no NVIDIA device; see quickthaw doctor",
            )
    if lazy and lazy.fill and not lazy.fill_only:
        lazy = replace(lazy, working_set=None, record=False, downloading=None, on_death=_cancelling(lazy, cancellation))
    check_page_size()
    run_folder = run_folder or library.home / "run"
    try:
        private_folder(run_folder)
        make_run_dir()
        with cancellation, library.in_use(snapshot.name) as folder:
            config = SandboxConfig(
                binds=binds,
                monotonic_ns=snapshot.monotonic_ns,
                kernel_facts=criu.kernel_facts(library.home),
                egress=egress,
            )
            plan = _plan(criu, snapshot, folder, run_folder, config, pipes, lazy)
            if unpack_cache(folder, compile_cache):
                speculative.discard()  # The speculative restore may have mapped the old files.
            taken = speculative.take(plan, pipes)
            begun = taken or speculative.begin(plan, pipes)
            logs = library.home / LOGS
            underway()
            try:
                restored = _complete(begun, config, snapshot, criu, on_exit, lazy, cancellation, logs)
                restored.begun_speculatively = taken is not None
            except CheckpointError as error:
                if not taken or not lazy or cancellation.error:
                    raise
                # The plan matched an earlier restore; a restore from the start finds out what is wrong now.
                lazy.on_warning(f"the speculative restore failed ({error}); restoring once more from the start")
                restored = _complete(
                    speculative.begin(plan, pipes), config, snapshot, criu, on_exit, lazy, cancellation, logs
                )
            try:
                if driver and snapshot.gpu.processes:
                    began = time.monotonic()
                    cuda.resume(
                        driver,
                        processes(restored.sandbox.init_pid),
                        snapshot.gpu,
                        gpu_pairs,
                        lock_folders=gpu_locks(library),
                    )
                    restored.times["cuda"] = (began, time.monotonic())
            except BaseException:
                before_kill(restored.sandbox)
                restored.close()
                raise
            return restored
    except OSError as error:
        raise disk.failure(f"{snapshot.name} is not restored", error, "restore-failed") from error


def next_plan(
    library: Library,
    criu: Criu,
    snapshot: Snapshot,
    binds: Sequence[Bind],
    streams: Sequence[str],
    lazy: LazyRestore,
    egress: Egress | None = None,
) -> speculative.Plan:
    """Return the plan of the restore that `restore` would do with these arguments, for a speculative one. Raises OSError."""
    config = SandboxConfig(
        binds=binds,
        monotonic_ns=snapshot.monotonic_ns,
        kernel_facts=criu.kernel_facts(library.home),
        egress=egress,
    )
    folder, run_folder = library.path(snapshot.name), library.home / "run"
    return _plan(criu, snapshot, folder, run_folder, config, dict.fromkeys(streams, -1), lazy)


def _plan(
    criu: Criu,
    snapshot: Snapshot,
    folder: Path,
    run_folder: Path,
    config: SandboxConfig,
    pipes: Mapping[str, int],
    lazy: LazyRestore | None,
) -> speculative.Plan:
    """Build the configurations that the helpers of this restore receive."""
    images = folder / "images"
    if lazy and lazy.map_pages and not lazy.record and not lazy.downloading:
        # A recording needs every page fault. Images that are still arriving must not be mapped.
        images = file_backed.find(folder) or images
    named = {stream: snapshot.pipes[stream] for stream in pipes if stream in snapshot.pipes}
    return {
        "run": str(run_folder),
        "snapshot": str(folder),
        "init": config.message(),
        "unpack": [[str(folder / "shm"), "/dev/shm"], [str(folder / "tmp"), TMP_DIR]],
        "criu": criu.restore_request(snapshot.root_pid, images, named, lazy_pages=lazy is not None),
        "pages": server_config(
            images,
            lazy.working_set,
            lazy.record,
            downloading=lazy.downloading,
            pack=lazy.pack,
            fill=lazy.fill,
            fill_only=lazy.fill_only,
        )
        if lazy
        else None,
    }


def _cancelling(lazy: LazyRestore, cancellation: Cancellation) -> Callable[[str], None]:
    """Return an `on_death` that ends the restore, too: CRIU itself may wait for a page."""

    def on_death(reason: str) -> None:
        cancellation.cancel(Failed("pages-lost", reason))
        lazy.on_death(reason)

    return on_death


def gpu_processes(library: Library, snapshot: Snapshot) -> tuple[int, ...]:
    """Return the processes with GPU state by their numbers in the images; none if the snapshot does not say, or if all have.

    Raises Integrity (image-garbled).
    """
    images = library.path(snapshot.name) / "images"
    found = tuple(sorted(map(int, gpu_state(images))))
    return found if len(found) == snapshot.gpu.processes < len(process_ids(str(images))) else ()


def _fill(pages: PageServer, limit_s: float, spans: dict[str, float]) -> None:
    """Wait until every page to fill is in place, and the page server serves none of their faults any more. Raises Failed (pages-lost)."""
    began = time.monotonic()
    if not pages.wait_filled(limit_s):
        raise Failed("pages-lost", f"not every page was in place within {limit_s:.0f} s")
    spans["fill"] = time.monotonic() - began


def _complete(
    begun: speculative.BegunRestore,
    config: SandboxConfig,
    snapshot: Snapshot,
    criu: Criu,
    on_exit: Callable[[int, int], None] | None,
    lazy: LazyRestore | None,
    cancellation: Cancellation,
    logs: Path,
) -> Restored:
    """Finish a begun restore until every process runs. On failure, clean up everything."""
    began = time.monotonic()
    work = begun.work
    sandbox: Sandbox | None = None
    pages: PageServer | None = None
    try:
        if lazy and begun.pages:
            started, begun.pages = begun.pages, None
            pages = PageServer(
                *started, work / speculative.LAZY_PAGES_SOCKET, lazy.on_death, lazy.on_warning, lazy.downloading
            )
        sandbox = Sandbox(config, on_exit=on_exit, begun=begun)
        cancellation.check(sandbox)
        up = time.monotonic()
        unpack_s, restore_s = limits(snapshot)
        sandbox.wait_unpacked(unpack_s)
        unpacked = time.monotonic()
        criu.check_restored(sandbox, sandbox.wait_criu(restore_s, snapshot.root_pid), work, logs)
        ran = time.monotonic()
        spans = {"sandbox": up - began, "unpack": unpacked - up, "criu": ran - unpacked}
        times = {"criu": (unpacked, ran)}
        if lazy and lazy.fill and pages:
            _fill(pages, restore_s, spans)
            if not lazy.fill_only:
                threading.Thread(target=pages.close, name="page-server-close").start()
                pages = None
            times["fill"] = (ran, ran + spans["fill"])
        sandbox.raise_pids(snapshot.top_pid)
        # plugin/engine/process_start_times.py reads this file, so write it before the first process looks.
        (sandbox.control_dir / START_TIMES).write_text(json.dumps(snapshot.start_ticks))
        sandbox.resume(snapshot.stopped)
        begun.release()
        plan = begun.plan if lazy and not lazy.record and not lazy.downloading else None
        cancellation.settle()
        return Restored(sandbox, snapshot.root_pid, work, begun.lock_fd, spans, times, pages, plan=plan)
    except BaseException as error:
        if sandbox:
            sandbox.close()
        if pages:
            pages.close()
        begun.close()
        if cancellation.error and isinstance(error, CheckpointError) and error is not cancellation.error:
            raise cancellation.error from error
        raise
