"""Write whole directories to a chunk store and read them back: the format of snapshots (a mount reads the same lazily).

put_tree(folder, chunks, name="m1")   → manifest digest, and a ref `snapshots/m1` that protects it from collection
get_tree(digest, chunks, folder)      → the same files again, every chunk verified
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lazyfs.content.chunk_store import ChunkStore, zero_digest
from lazyfs.content.importer import Progress, import_tree
from lazyfs.content.manifest import File, reject_escaping_links
from lazyfs.errors import Permanent, from_os_error
from lazyfs.paths import open_fd, private_dir, sync_folder
from lazyfs.stores.retry import RetryPolicy, retrying

_WORKERS = 4
# Drop set-user-id and set-group-id bits: no file from a store may run with its owner's rights.
_MODE = 0o1777


def put_tree(
    folder: Path,
    chunks: ChunkStore,
    *,
    kind: str = "snapshot",
    name: str | None = None,
    meta: dict[str, str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> str:
    """Store `folder`; return the manifest's digest (hex).

    `name` creates a ref of kind `snapshots` (`tags` for weights). The ChunkStore decides compression (`ChunkStore(store,
    zstd=1)` reduces process images to a quarter of their size). Raises what `import_tree` raises.
    """
    digest, _ = import_tree(folder, chunks, kind=kind, meta=meta, progress=progress)
    if name is not None:
        chunks.set_ref("tags" if kind == "weights" else "snapshots", name, digest)
    return digest


def get_tree(digest: str, chunks: ChunkStore, folder: Path, *, policy: RetryPolicy | None = None) -> None:
    """Write the manifest's files to `folder`, which must not exist; completely or not at all.

    Drops set-user-id and set-group-id bits. Raises Permanent (exists), NotFound, Integrity (also for a link that leads out
    of the tree), DiskFull, or what the store raises after retries.
    """
    if folder.exists():
        raise Permanent(f"{folder} exists; give a new path", code="exists")
    manifest = chunks.get_manifest(digest)
    reject_escaping_links(manifest, digest)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    limits = policy or RetryPolicy()
    try:
        private_dir(partial)
        for directory in manifest.directories:
            (partial / directory.path).mkdir(mode=0o700)
        with ThreadPoolExecutor(_WORKERS) as pool:
            for file in manifest.files:
                _write(file, partial / file.path, chunks, pool, limits)
        for link in manifest.symlinks:
            (partial / link.path).symlink_to(link.target)
        for directory in reversed(manifest.directories):
            sync_folder(partial / directory.path)
            (partial / directory.path).chmod(directory.mode & _MODE)
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise from_os_error(error, f"cannot write {folder}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(file: File, path: Path, chunks: ChunkStore, pool: ThreadPoolExecutor, policy: RetryPolicy) -> None:
    with open_fd(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
        os.ftruncate(fd, file.size)

        def one(index: int) -> None:
            chunk, offset = file.chunks[index], file.offsets[index]
            if chunk.digest == zero_digest(chunk.length):
                return
            data = retrying(lambda: chunks.get(chunk.digest, chunk.length, chunk.encoding), policy)
            view = memoryview(data)
            while view:
                written = os.pwrite(fd, view, offset)
                view, offset = view[written:], offset + written

        for _ in pool.map(one, range(len(file.chunks))):
            pass
        os.fchmod(fd, file.mode & _MODE)
        os.fdatasync(fd)
