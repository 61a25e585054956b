"""Taking a snapshot of a sandboxed engine, and bringing replicas back from it.

A snapshot folder holds `manifest.json`, `images/` (CRIU's), and what the images link to, copied while the tree was frozen: `shm/`
(/dev/shm), `tmp/` (TMPDIR), `cache/` (compiled code that is mapped). All of it is kept, so one snapshot restores any number of times,
and several at the same moment: each restore gets a sandbox of its own with copies of the small parts.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from checkpoint import cuda, manifest, mapped
from checkpoint.aside import aside
from checkpoint.criu import Criu
from checkpoint.cuda.driver import Driver
from checkpoint.errors import Failed, HostLacks
from checkpoint.library import Library
from checkpoint.manifest import Snapshot, SnapshotFile
from checkpoint.pages.server import Arriving, PageServer
from checkpoint.sandbox import CACHE_DIR, TMP_DIR, Bind, Sandbox, SandboxConfig

DUMP_TIMEOUT_S = 30.0
"""For a dump of nothing; every DUMP_SLOWEST bytes add a second. A process killed under CRIU's hands can leave it waiting for ever."""
DUMP_SLOWEST = 50e6
RESTORE_TIMEOUT_S = 600.0
_MARGIN = 64 << 20  # bytes beside the pages: images of descriptors, shared memory, temporary files

# Runs inside the sandbox, after the images are written and before the tree runs on: what the images link to must be of the same
# moment. CRIU leaves its own hard links to deleted files behind (link_remap.N); one that stays makes the next dump fail.
_WHILE_FROZEN = """\
#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0
set -e
cp -a --sparse=always /dev/shm "{folder}/shm"
cp -a --sparse=always {tmp} "{folder}/tmp"
rm -f /dev/shm/link_remap.*
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
) -> Snapshot:
    """Dump the tree below `draft.root_pid` into the library as `draft.name`; the engine goes on running, whatever happens.

    `draft` is the manifest but for what only the dump knows. `seal` computes the digests of a folder's files. `driver`: the CUDA
    driver, where
    this host has a GPU; processes with a context are taken off it for the dump and brought back.

    Raises Busy when another process takes the same snapshot, Incompatible (multi-gpu), Failed when CRIU, the disk or the engine
    fail; then nothing is left.
    """
    pids = processes(sandbox.init_pid)
    wanted = private_bytes(pids)
    library.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    free = shutil.disk_usage(library.folder).free
    if free < wanted * 1.05 + _MARGIN:
        raise Failed(
            "disk-full",
            f"the snapshot needs about {wanted / 1e9:.1f} GB and {library.folder} has {free / 1e9:.1f} GB free; "
            "make room (quickthaw snapshot rm, quickthaw weights gc) or set QUICKTHAW_HOME",
        )
    with library.writing(draft.name) as folder:
        images = folder / "images"
        images.mkdir(mode=0o700)
        script = folder / "while-frozen.sh"
        script.write_text(_WHILE_FROZEN.format(folder=folder, tmp=TMP_DIR))
        script.chmod(0o700)
        mapped = _mapped_cache_files(pids)
        monotonic_ns = sandbox.monotonic_ns()
        needs = cuda.Needs()
        if driver:
            _, needs = cuda.suspend(driver, pids, released=cuda.check_released)
        try:
            criu.dump(sandbox, draft.root_pid, images, script, DUMP_TIMEOUT_S + wanted / DUMP_SLOWEST)
        finally:
            if driver and needs.processes:
                cuda.resume(driver, pids, needs)
        script.unlink()
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
    map_pages: bool = True
    """Map weights and libraries' data where a view for that was made (checkpoint.mapped); else they are copied like everything."""


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

    def close(self) -> None:
        """Kill the replica and remove its work folder. May be called twice."""
        self.sandbox.close()
        if self.pages:
            self.pages.close()
        shutil.rmtree(self.work, ignore_errors=True)
        if self.held >= 0:
            os.close(self.held)
            self.held = -1


def unpack_cache(folder: Path, compile_cache: Path) -> None:
    """Put mapped compiled code back where the tree has it mapped, with its mode; what is there and the same is left alone."""
    source = folder / "cache"
    if not source.is_dir():
        return
    for file in source.rglob("*"):
        if not file.is_file():
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
) -> Restored:
    """Bring a replica back into a new sandbox.

    `lazy`: pages come from a page server, the recorded working set first; without it CRIU puts every page in place before it returns.
    `driver` and `gpu_pairs` (uuid then, uuid now) as in checkpoint.cuda; a snapshot with GPU state is never restored lazily, since the
    driver reads all of it at once. `pipes` maps the snapshot's names (`stdout`, `stderr`) to descriptors for the engine's output.
    The canary is the caller's to check. `underway` is called when CRIU is at work and this process has nothing to do but wait.

    Raises a CheckpointError; then nothing is left: no process, mount, namespace or file.
    """
    if snapshot.gpu.processes:
        lazy = None
        if driver is None:
            raise HostLacks(
                "gpu-missing",
                f"{snapshot.name} holds GPU state and this host has no NVIDIA device; see quickthaw doctor",
            )
    run_folder = run_folder or library.home / "run"
    run_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="restore-", dir=run_folder))
    held = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(held, fcntl.LOCK_EX)  # a folder that nobody holds is a killed restore's (Library.sweep)
    began = time.monotonic()
    sandbox: Sandbox | None = None
    pages: PageServer | None = None
    try:
        with library.in_use(snapshot.name) as folder:
            images = folder / "images"
            if lazy:
                # A recording sees every page fault; what is still arriving must not be read before it is there.
                may_map = lazy.map_pages and not lazy.record and not lazy.arriving
                images = (mapped.find(folder) if may_map else None) or images
                pages = PageServer.start(
                    images,
                    work,
                    lazy.working_set,
                    lazy.record,
                    on_death=lazy.on_death,
                    on_warning=lazy.on_warning,
                    arriving=lazy.arriving,
                )
            unpack_cache(folder, compile_cache)
            config = SandboxConfig(
                binds=binds, monotonic_ns=snapshot.monotonic_ns, kernel_facts=criu.kernel_facts(library.home)
            )
            sandbox = Sandbox(config, on_exit=on_exit)
            up = time.monotonic()
            sandbox.unpack([(folder / "shm", "/dev/shm"), (folder / "tmp", TMP_DIR)])
            unpacked = time.monotonic()
            underway()
            named = {snapshot.pipes[stream]: fd for stream, fd in pipes.items() if stream in snapshot.pipes}
            criu.restore(
                sandbox,
                snapshot.root_pid,
                images,
                RESTORE_TIMEOUT_S,
                work,
                named,
                lazy_pages=lazy is not None,
            )
            sandbox.raise_pids(snapshot.top_pid)
            if driver and snapshot.gpu.processes:
                cuda.resume(driver, processes(sandbox.init_pid), snapshot.gpu, gpu_pairs)
        spans = {"sandbox": up - began, "unpack": unpacked - up, "criu": time.monotonic() - unpacked}
        return Restored(sandbox, snapshot.root_pid, work, held, spans, pages)
    except BaseException as error:
        if sandbox:
            sandbox.close()
        if pages:
            pages.close()
        shutil.rmtree(work, ignore_errors=True)
        os.close(held)
        if isinstance(error, OSError):
            raise Failed(
                "restore-failed",
                f"{snapshot.name}: {error.strerror or error}{': ' + str(error.filename) if error.filename else ''}",
            ) from error
        raise
