"""Take a snapshot of a sandboxed engine.

A snapshot folder holds `manifest.json`, CRIU's `images/`, and copies of the files that the images refer to: `shm/`
(/dev/shm), `tmp/` (TMPDIR) and `cache/` (compiled code that is mapped). The copies are made while the process tree
is frozen.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from checkpoint import disk
from checkpoint.criu import host_state
from checkpoint.criu.binary import Criu
from checkpoint.cuda import checkpoint as cuda
from checkpoint.cuda import processes as gpu_processes
from checkpoint.cuda.driver import Driver
from checkpoint.cuda.processes import Areas, check_released
from checkpoint.files import private_folder
from checkpoint.sandbox.process_tree import inner_number, inner_numbers, private_bytes, processes
from checkpoint.sandbox.sandbox import CACHE_DIR, TMP_DIR, Sandbox
from checkpoint.snapshot import dump_check, free_space, manifest
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.manifest import Snapshot, SnapshotFile
from checkpoint.snapshot.restore import DUMP_SLOWEST, LOGS, check_page_size, gpu_locks

DUMP_TIMEOUT_S = 30.0
"""Timeout for an empty dump; each DUMP_SLOWEST bytes add a second. A process killed during the dump can make CRIU hang."""

# CRIU runs this script inside the sandbox after it has written the images and before it resumes the process tree. The
# copied files must match the images. CRIU leaves hard links to deleted files behind (link_remap.N), and a leftover link
# makes the next dump fail.
_WHILE_FROZEN = """\
#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0
set -e
cp -a --sparse=always /dev/shm "{folder}/shm"
cp -a --sparse=always {tmp} "{folder}/tmp"
rm -f /dev/shm/link_remap.* {tmp}/link_remap.*
"""


def _mapped_cache_files(pids: Sequence[int]) -> set[str]:
    """List the compile-cache files mapped by these processes, relative to the cache.

    A restore needs each of them at the same path and with the same size.
    """
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
    """Sum the sizes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def take(
    library: Library,
    criu: Criu,
    sandbox: Sandbox,
    draft: Snapshot,
    compile_cache: Path,
    digest_folder: Callable[[Path], Mapping[str, SnapshotFile]],
    sign: Callable[[bytes], bytes] | None = None,
    driver: Driver | None = None,
    visible: Sequence[str] | None = None,
    awake: Mapping[str, int] | None = None,
    extra: Mapping[str, Path] | None = None,
) -> Snapshot:
    """Dump the process tree below `draft.root_pid` into the library as `draft.name`.

    The engine resumes afterwards, even on failure. `draft` is the manifest without the fields that only the dump can
    fill in. `digest_folder` computes the digests of a folder's files. `driver` is the CUDA driver on hosts with a GPU: processes
    with a CUDA context are suspended for the dump and resumed after it. `visible` and `awake` are passed to
    checkpoint.cuda.checkpoint.suspend. `extra`: files that the snapshot keeps a copy of, by their path in its folder.

    Raises Busy when another process is taking the same snapshot, Incompatible (multi-gpu), or Failed when CRIU, the
    disk or the engine fails. On failure nothing is left in the library. After Failed (cuda-stuck) the engine no
    longer runs and the caller must kill it.
    """
    check_page_size()
    dump_check.refuse_open_queues(Path(f"/proc/{sandbox.init_pid}/root"))
    pids = processes(sandbox.init_pid)
    on_gpu = cuda.memory_in_use(driver, pids) if driver else 0
    free_space.check_memory(on_gpu)
    with disk.required(f"{draft.name} cannot be written", "snapshot-not-written"):
        private_folder(library.folder)
    shared = free_space.tmpfs_bytes(Path(f"/proc/{sandbox.init_pid}/root"), ("/dev/shm", TMP_DIR))
    free_space.check_disk(library.folder, private_bytes(pids) + on_gpu + shared)
    with library.writing(draft.name) as folder:
        images = folder / "images"
        images.mkdir(mode=0o700)
        script = folder / "while-frozen.sh"
        script.write_text(
            _WHILE_FROZEN.format(folder=folder, tmp=TMP_DIR) + dump_check.script(folder / dump_check.FOLDER)
        )
        script.chmod(0o700)
        mapped = _mapped_cache_files(pids)
        suspended: list[int] = []
        gained: dict[int, Areas] = {}
        needs = cuda.Needs()
        if driver:
            suspended, needs = cuda.suspend(
                driver, pids, released=check_released, visible=visible, awake=awake, gained=gained
            )
        try:
            gpu_processes.record(gained, {pid: inner_number(pid) for pid in gained}, images, draft.name)
            # Check again: the driver has now moved GPU memory into host memory of the processes.
            wanted = private_bytes(pids) + shared
            free_space.check_disk(library.folder, wanted)
            limit_s = DUMP_TIMEOUT_S + wanted / DUMP_SLOWEST
            sandbox.close_outgoing()
            monotonic_ns = criu.dump(sandbox, draft.root_pid, images, script, limit_s, logs=library.home / LOGS)
        finally:
            if driver and suspended:
                cuda.resume_after_dump(driver, suspended, needs, gpu_locks(library))
        script.unlink()
        found = dump_check.examine(folder / dump_check.FOLDER, images, ("/dev/shm", TMP_DIR))
        shutil.rmtree(folder / dump_check.FOLDER)
        host_state.forget(images)
        criu.dump_cpu(images)
        for name in mapped:
            target = folder / "cache" / name
            private_folder(target.parent)
            shutil.copy(compile_cache / name, target)
        for name, source in (extra or {}).items():
            private_folder((folder / name).parent)
            shutil.copyfile(source, folder / name)
        # Copied files keep the modes that a restore compares, so close the folders around them to other users.
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
            top_pid=max(inner_numbers(pids), default=draft.root_pid),
            image_bytes=image_bytes(images),
            files=dict(digest_folder(folder)),
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
    return manifest.parse(data, folder, draft.name)  # with its digest, as whoever loads it has it
