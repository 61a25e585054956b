"""Import a directory into a chunk store and write its manifest.

Every byte is read once, chunks that the store has are skipped, and nothing incomplete becomes visible. Symbolic links that
stay inside the directory are kept; links that lead out of it (a hub's snapshot folder pointing at its blobs) are followed.
An interrupted import resumes: its chunks are already in the store.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from lazyfs.admin.listing import store_lock
from lazyfs.content.chunk_store import ChunkStore, PutResult
from lazyfs.content.chunking import chunk_lengths
from lazyfs.content.manifest import VERSION, Directory, File, Manifest, Symlink, reject_escaping_links
from lazyfs.errors import NotFound, Permanent, Usage, from_os_error, os_errors
from lazyfs.paths import open_fd
from lazyfs.stores.retry import RetryPolicy, retrying

# At most two chunks per worker are in flight, which bounds memory. Remote stores have high latency and accept more
# parallel requests.
WORKERS, REMOTE_WORKERS = 4, 12


@dataclass(frozen=True)
class Progress:
    """Import progress in bytes.

    `done` of `total` were read, `skipped` of them were in the store already, `stored` were written.
    """

    total: int
    done: int
    skipped: int
    stored: int
    path: str


@dataclass
class Listing:
    """The entries found by `walk`, before any content is read."""

    directories: list[Directory] = field(default_factory=list)
    files: list[tuple[str, Path, os.stat_result]] = field(default_factory=list)
    symlinks: list[Symlink] = field(default_factory=list)


def walk(root: Path) -> Listing:
    """List all entries below `root`, sorted.

    Raises NotFound, Usage (not a directory), or Permanent (unreadable, bad-name, dangling-link, link-loop, bad-file-type).
    """
    with os_errors(f"cannot open {root}"):
        if not root.is_dir():
            if not root.exists():
                raise NotFound(f"{root} does not exist; give the directory that holds the model's files")
            raise Usage(f"{root} is not a directory; give the directory that holds the model's files")
        real = root.resolve(strict=True)
    listing = Listing()
    _walk(root, real, "", listing, frozenset({real}))
    return listing


def _walk(folder: Path, real_root: Path, prefix: str, out: Listing, above: frozenset[Path]) -> None:
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda e: e.name)
        for entry in found:
            path = prefix + entry.name
            try:
                entry.name.encode()
            except UnicodeEncodeError:
                raise Permanent(f"{path!r}: the name is not UTF-8; rename it", code="bad-name") from None
            if entry.is_symlink():
                target = str(Path(entry.path).readlink())
                # Keep a link only if its text stays inside too: "../<this folder>" would not resolve below a mount.
                words = os.path.normpath(f"{prefix}{target}")
                inside = not target.startswith("/") and words.split("/")[0] != ".."
                try:
                    outside = not Path(os.path.realpath(entry.path, strict=True)).is_relative_to(real_root)
                except OSError as error:
                    # The link dangles or is circular. If it stays inside, the mount shows it as it is.
                    outside = not inside
                    if outside:
                        raise Permanent(
                            f"{path}: cannot follow the symbolic link to {target} ({error.strerror}); "
                            "remove the link, or create its target",
                            code="dangling-link",
                        ) from None
                if inside and not outside:
                    out.symlinks.append(Symlink(path, target))
                    continue
            st = entry.stat()
            if stat.S_ISDIR(st.st_mode):
                real = Path(entry.path).resolve()
                if real in above:
                    raise Permanent(
                        f"{path}: the symbolic link leads to a folder above it; remove it", code="link-loop"
                    )
                out.directories.append(Directory(path, stat.S_IMODE(st.st_mode)))
                _walk(Path(entry.path), real_root, path + "/", out, above | {real})
            elif stat.S_ISREG(st.st_mode):
                out.files.append((path, Path(entry.path), st))
            else:
                raise Permanent(f"{path}: not a file, directory or link; remove it", code="bad-file-type")
    except OSError as error:
        raise from_os_error(error, f"cannot read {error.filename or folder}") from error


def import_tree(
    root: Path,
    chunks: ChunkStore,
    *,
    kind: str = "weights",
    meta: dict[str, str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    listing: Listing | None = None,
) -> tuple[str, Manifest]:
    """Import `root`; return the manifest's digest and the manifest.

    Raises what `walk` raises, DiskFull, Permanent (source-changed) if a file changes while it is read (a mixture must not
    get a digest), or what the store raises.
    """
    listing = listing or walk(root)
    job = _Import(chunks, sum(st.st_size for _, _, st in listing.files), progress)
    with store_lock(chunks, exclusive=False):
        with ThreadPoolExecutor(job.workers, thread_name_prefix="import") as pool:
            files = [job.file(pool, path, source, st) for path, source, st in listing.files]
            job.drain()
        return job.finish(kind, listing, files, meta or {})


class _Import:
    """State of one import: the chunks in flight and the progress counters."""

    def __init__(self, chunks: ChunkStore, total: int, progress: Callable[[Progress], None] | None) -> None:
        self.chunks = chunks
        self.workers = REMOTE_WORKERS if chunks.store.remote else WORKERS
        self.total = total
        self.progress = progress
        self.pending: set[Future[PutResult]] = set()
        self.done = self.skipped = self.stored = 0

    def file(
        self, pool: ThreadPoolExecutor, path: str, source: Path, st: os.stat_result
    ) -> tuple[str, int, int, list[Future[PutResult]]]:
        """Read one file and submit its chunks to the pool, at most two per worker at a time."""
        futures: list[Future[PutResult]] = []
        with os_errors(f"cannot read {source}"), open_fd(source, os.O_RDONLY) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            offset = 0
            for length in chunk_lengths(source.name, st.st_size, lambda at, n: _read(fd, at, n, source)):
                while len(self.pending) >= 2 * self.workers:
                    self._collect(path)
                future = pool.submit(self._store, _read(fd, offset, length, source))
                futures.append(future)
                self.pending.add(future)
                offset += length
            after = os.fstat(fd)
        if (after.st_size, after.st_mtime_ns, after.st_ctime_ns) != (st.st_size, st.st_mtime_ns, st.st_ctime_ns):
            raise _changed(source)
        return path, stat.S_IMODE(st.st_mode), st.st_size, futures

    def drain(self) -> None:
        """Wait for all chunks in flight."""
        while self.pending:
            self._collect("")

    def finish(
        self,
        kind: str,
        listing: Listing,
        files: list[tuple[str, int, int, list[Future[PutResult]]]],
        meta: dict[str, str],
    ) -> tuple[str, Manifest]:
        """Write the manifest, after all chunks are stored."""
        manifest = Manifest(
            VERSION,
            kind,
            tuple(listing.directories),
            tuple(File(p, mode, size, tuple(f.result().chunk for f in futures)) for p, mode, size, futures in files),
            tuple(listing.symlinks),
            meta,
        )
        reject_escaping_links(manifest, "of this import")
        return retrying(lambda: self.chunks.put_manifest(manifest), RetryPolicy()), manifest

    def _store(self, data: bytes) -> PutResult:
        return retrying(lambda: self.chunks.put_chunk(data), RetryPolicy())

    def _collect(self, path: str) -> None:
        # Every put is bounded by the store's own time limit, so this wait ends.
        ready, self.pending = wait(self.pending, return_when=FIRST_COMPLETED)
        for future in ready:
            result = future.result()
            self.done += result.chunk.length
            self.stored += result.stored
            self.skipped += 0 if result.stored else result.chunk.length
        if self.progress is not None:
            self.progress(Progress(self.total, self.done, self.skipped, self.stored, path))


def _read(fd: int, offset: int, length: int, source: Path) -> bytes:
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise _changed(source)
        data += more
    return data


def _changed(source: Path) -> Permanent:
    return Permanent(f"{source} changed during the import; try again when nothing writes to it", code="source-changed")
