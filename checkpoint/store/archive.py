"""Archives: snapshots as content-addressed chunks in any lazyfs store, beside the weights.

    push(folder, chunks)          → an archive, under the snapshot's name, that a mount can also show lazily
    pull("name", chunks, folder)  → the same snapshot again, byte for byte

An archive is a lazyfs manifest of kind `snapshot`. It holds the folder's files, split so that equal data is stored
once (checkpoint.store.chunking), and compressed. Each chunk is named by the BLAKE3 of its plain bytes, and a pull
checks the name before it writes the chunk.

The snapshot's manifest is checked before anything else is fetched: its signature, whether the archive holds exactly
the files that it names (checkpoint.store.archive_entries), and the caller's conditions (`accept`). The finished snapshot
is compared with that same manifest before it gets its name.

An interrupted push or pull can be continued: existing chunks are not sent again, and the contents of a partial
folder are hashed before they are used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint import disk
from checkpoint.errors import Busy, CheckpointError, Failed, Integrity, NotFound
from checkpoint.files import lock_folder, private_folder
from checkpoint.snapshot import digests, free_space, signatures
from checkpoint.snapshot import manifest as manifests
from checkpoint.store import archive_entries
from checkpoint.store import layout as layouts
from checkpoint.store.download import BACKGROUND, Download
from checkpoint.store.upload import WORKERS, Listing, Progress, Push, Pushed, get_chunk, translate_errors

if TYPE_CHECKING:
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.content.manifest import File, Manifest

KIND = "snapshot"
LEVEL_LOCAL, LEVEL_REMOTE = 1, 3
"""zstd compression levels. Measured on images of vLLM and SGLang: decompression runs at 0.7 to 1.1 GB/s per core at any
level; level 1 compresses 490 MB/s to 39 %, level 3 240 MB/s to 37 %, level 9 60 MB/s to 35 %. Over a link, size
costs time at every restore; on a disk it does not."""


_READ_FIRST = {manifests.FILE_NAME: 64 << 20, signatures.FILE_NAME: 64 << 10, layouts.INDEX: 64 << 20}
"""Files of an archive that are read into memory first, with the maximum size in bytes of each."""


_ATTEMPTS = 20
"""How often locking is retried when a sweep removes the pull's folder first."""


@dataclass(frozen=True)
class Pulled:
    """Result of a pull.

    Bytes: `size` of all files; `kept` from an earlier attempt; `fetched` plain bytes read from the store.
    """

    digest: str
    files: int
    size: int
    kept: int
    fetched: int


def open_chunks(url: str, level: int | None = None) -> ChunkStore:
    """Open the chunk store at a URL.

    The compression level is `level`, or depends on whether the store is remote.

    Raises Failed for an unusable URL.
    """
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.stores import open_store
    from lazyfs.stores.urls import shown_url

    with translate_errors(f"cannot open {shown_url(url)}"):
        store = open_store(url)
        return ChunkStore(store, zstd=level or (LEVEL_REMOTE if store.remote else LEVEL_LOCAL))


# Push


def push(
    folder: Path,
    chunks: ChunkStore,
    name: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    kind: str = KIND,
    sign: Callable[[bytes], bytes] | None = None,
) -> Pushed:
    """Store a snapshot folder under `name` (default: the folder's).

    The name is set last, so a reader sees a complete archive or none. A snapshot with a known working set is stored in the
    order of need (checkpoint.store.layout). `sign` also signs the archive as a whole; then hosts that require
    signatures can use parts of it before all of it is fetched.

    Raises Integrity when a file changes meanwhile or an image is damaged, Failed when the store or the disk fails.
    """
    from checkpoint.store.chunking import CHUNK, plan

    with translate_errors(f"cannot push {folder.name}"):
        listing = _list_folder(folder, archive_entries.belongs if kind == KIND else lambda _: True)
        layout = None
        lengths: dict[str, list[int]] = {}
        if (folder / "images").is_dir():
            links = {path: names[0] for names in listing.names.values() for path in names[1:]}
            layout = layouts.plan(folder, listing.files, links) if kind == KIND else None
            boundaries = plan(
                folder / "images", layout.holes_by_name() if layout else {}, layouts.REST_CHUNK if layout else CHUNK
            )
            lengths = {f"images/{file}": cut for file, cut in boundaries.lengths.items()}
        job = Push(chunks, sum(size for _, size, _ in listing.files), progress)
        from lazyfs.admin.listing import store_lock

        with store_lock(chunks, exclusive=False):
            try:
                if layout:
                    modes = _push_by_layout(job, folder, listing, layout, lengths)
                else:
                    modes = {path: mode for path, _, mode in listing.files}
                    for path, size, _ in listing.files:
                        job.add_file(folder, path, size, lengths.get(path))
                job.drain()
            finally:
                job.pool.shutdown(cancel_futures=True)
            host = host_class(folder) if kind == KIND else ""
            done = job.finish(listing, kind, name or folder.name, host, modes, times=kind != KIND)
            if sign:
                chunks.store.put(signature_key(done.digest), sign(signed_message(done.digest)))
            return done


def host_class(folder: Path) -> str:
    """Return the class of the host that a snapshot was taken on, "" if its manifest does not say (checkpoint.store.variants)."""
    from checkpoint.compatibility.host_class import class_of

    try:
        return class_of(manifests.parse((folder / manifests.FILE_NAME).read_bytes(), folder, folder.name).identity)
    except (OSError, CheckpointError):
        return ""


def signature_key(digest: str) -> str:
    """Return the key of an archive's signature in its store."""
    return f"manifests/{digest}.sig"


def signed_message(digest: str) -> bytes:
    """Return the bytes that an archive's signature signs (checkpoint.snapshot.signatures prepends its own prefix)."""
    return f"archive {digest}".encode()


def signed_as_a_whole(digest: str, chunks: ChunkStore, trust_keys: Sequence[Path]) -> bool:
    """Return whether an archive has its own signature by one of the keys; False if it has no signature.

    Raises Integrity if the signature is by another key or for another archive.
    """
    from lazyfs.errors import NotFound as Missing

    try:
        signature = bytes(chunks.store.get(signature_key(digest)))
    except Missing:
        return False
    signatures.check(signed_message(digest), signature, trust_keys)
    return True


def _push_by_layout(
    job: Push, folder: Path, listing: Listing, layout: layouts.Layout, lengths: dict[str, list[int]]
) -> dict[str, int]:
    """Store the archive's files, those needed first before the others. Return their modes."""
    modes = {layouts.INDEX: 0o600, layouts.BYTES: 0o600}
    sizes = {path: size for path, size, _ in listing.files}
    job.add_bytes(layouts.INDEX, layout.encode())
    job.add_gathered(
        folder,
        layouts.BYTES,
        layout.lengths(),
        lambda offset, length: layout.extents(layouts.BYTES, offset, length),
        {path: sizes[path] for path in layout.index.paths},
    )
    other_names = {path for names in listing.names.values() for path in names[1:]}
    for path, size, mode in listing.files:
        if path in layout.small or path in other_names:
            continue
        if path not in layout.holes:
            job.add_file(folder, path, size, None)
            modes[path] = mode
            continue
        rest = layouts.rest_path(path)
        extents = partial(layout.extents, rest)
        job.add_gathered(folder, rest, lengths[path], extents, {path: size})
        modes[rest] = mode
    return modes


def _list_folder(folder: Path, wanted: Callable[[str], bool]) -> Listing:
    """List every entry that `wanted` accepts, except sockets and pipes, which hold no data."""
    found = Listing()

    def visit(below: str) -> None:
        for entry in sorted(os.scandir(folder / below), key=lambda e: e.name):
            path = f"{below}/{entry.name}" if below else entry.name
            if not wanted(path):
                continue
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(info.st_mode):
                found.symlinks.append((path, str(Path(entry.path).readlink())))
            elif stat.S_ISDIR(info.st_mode):
                found.directories.append((path, stat.S_IMODE(info.st_mode) & 0o777))
                visit(path)
            elif stat.S_ISREG(info.st_mode):
                found.files.append((path, info.st_size, stat.S_IMODE(info.st_mode) & 0o777))
                found.mtimes[path] = info.st_mtime_ns
                if info.st_nlink > 1:
                    found.names.setdefault((info.st_dev, info.st_ino), []).append(path)

    visit("")
    return found


# Pull


def pull(
    name: str,
    chunks: ChunkStore,
    folder: Path,
    accept: Callable[[bytes, bytes | None], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    trust_keys: Sequence[Path] = (),
    find: Callable[[], OpenedArchive] | None = None,
) -> Pulled:
    """Fetch the archive `name` (or a manifest's digest) into the new snapshot folder `folder`.

    `accept` receives the snapshot's manifest and its signature file (None if there is none) before anything else is
    fetched; an exception it raises ends the pull. `find`: how to find the archive, in place of its
    name (checkpoint.store.variants). `trust_keys` requires a signature (see OpenedArchive.of). A failed pull keeps its data in a
    hidden folder for the next attempt.

    Raises NotFound, Busy (another process pulls it), Integrity (a chunk or the snapshot is damaged), Failed (the folder
    exists, the store fails, or the disk is full).
    """
    if folder.exists():
        raise Failed(
            "snapshot-exists", f"{folder.name} already exists; remove it first: quickthaw snapshot rm {folder.name}"
        )
    with partial_folder(folder) as (partial, lock):
        opened = find() if find else OpenedArchive.of(name, chunks, trust_keys)
        opened.check_name(folder.name)
        if accept:
            accept(opened.document, opened.signature)
        opened.prepare(partial)
        download = Download(
            chunks, opened.archive, opened.layout, partial, opened.links, workers=WORKERS, progress=progress
        )
        try:
            download.begin()
            download.wait(BACKGROUND)
            download.sync()
        finally:
            download.close()
        opened.link(partial)
        opened.check(partial)
        publish(partial, folder, lock)
        size = sum(size for size, _ in download.files.values())
        return Pulled(opened.digest, len(download.files) + len(opened.links), size, download.kept, download.fetched)


@dataclass(frozen=True)
class OpenedArchive:
    """A snapshot's archive of which only the manifests were fetched and checked against each other.

    `document`, `signature`: the snapshot's own manifest and its signature file. `files`: the manifest's entry for
    each file. `links`: further names of files. `trusted`: whether a trusted signature covers the archive as a whole,
    including what is not in `files`. `excluded`: files that no signature covers, although one was required.
    """

    digest: str
    archive: Manifest
    layout: layouts.Layout | None
    document: bytes
    signature: bytes | None
    links: dict[str, str]
    name: str
    files: dict[str, manifests.SnapshotFile]
    trusted: bool
    excluded: tuple[str, ...]

    @classmethod
    def of(cls, name: str, chunks: ChunkStore, trust_keys: Sequence[Path] = ()) -> OpenedArchive:
        """Read the manifests and the layout, and validate the archive.

        It must hold exactly what the snapshot's manifest names.

        With `trust_keys`, one of them must have signed that manifest. The archive's own signature (`push
        --sign-key`) also covers the working set; without it the working set is skipped, and the first restore
        records a new one. Raises NotFound, Integrity, and the store's errors.
        """
        # Look a name up only once if it cannot be a digest or a tag: each look-up costs a restore a round trip.
        digest = chunks.resolve(name) if "-" not in name else chunks.get_ref("snapshots", name)
        archive = chunks.get_manifest(digest)
        by_path = {file.path: file for file in archive.files}
        if archive.kind != KIND or manifests.FILE_NAME not in by_path:
            raise NotFound(
                "not-a-snapshot", f"{name} in {chunks.store.url} is an archive of {archive.kind}, not of a snapshot"
            )
        wanted = [path for path in _READ_FIRST if path in by_path]
        for path in wanted:
            if by_path[path].size > _READ_FIRST[path]:
                raise Integrity(
                    "archive-entry-refused", f"the archive's {path} has {by_path[path].size} bytes, which is too large"
                )
        with ThreadPoolExecutor(len(wanted), thread_name_prefix="open") as pool:
            read = dict(zip(wanted, pool.map(lambda path: read_file(by_path[path], chunks), wanted), strict=True))
        document, signature = read[manifests.FILE_NAME], read.get(signatures.FILE_NAME)
        trusted = False
        if trust_keys:
            signatures.check(document, signature, trust_keys)
            trusted = signed_as_a_whole(digest, chunks, trust_keys)
        layout = layouts.decode(read[layouts.INDEX]) if layouts.INDEX in read else None
        if layout:
            layout.check(archive)
        links, named = archive_entries.hard_links(archive), archive_entries.essentials(document)
        archive_entries.check(archive, layout, links, named.files)
        excluded = archive_entries.UNNAMED if trust_keys and not trusted else ()
        return cls(digest, archive, layout, document, signature, links, named.name, named.files, trusted, excluded)

    def check_name(self, name: str) -> None:
        """Raise Integrity (manifest-misplaced) unless this is the snapshot `name`."""
        if self.name != name:
            raise Integrity("manifest-misplaced", f"the archive holds the snapshot {self.name}, not {name}")

    def prepare(self, partial: Path) -> None:
        """Create the folders, remove foreign entries, and check for free disk space."""
        archive, layout = self.archive, self.layout
        files = {layout.target(f.path) if layout else f.path for f in archive.files} | set(
            layout.small if layout else ()
        )
        _clear_foreign(partial, {d.path for d in archive.directories} | (files - {layouts.INDEX, layouts.BYTES}))
        for directory in archive.directories:
            (partial / directory.path).mkdir(mode=0o700, exist_ok=True)
        _check_room(partial, archive)

    def link(self, partial: Path) -> None:
        """Create further names, symbolic links and the folders' modes, once the files exist."""
        for path, original in self.links.items():
            (partial / path).unlink(missing_ok=True)
            (partial / path).hardlink_to(partial / original)
        for link in self.archive.symlinks:
            (partial / link.path).unlink(missing_ok=True)
            (partial / link.path).symlink_to(link.target)
        for path in self.excluded:
            (partial / path).unlink(missing_ok=True)
        for directory in reversed(self.archive.directories):
            (partial / directory.path).chmod(directory.mode & 0o777)

    def check(self, partial: Path) -> None:
        """Verify the finished folder in full against the manifest checked before; the first restore need not hash again.

        Raises Integrity.
        """
        for path, checked in ((manifests.FILE_NAME, self.document), (signatures.FILE_NAME, self.signature)):
            file = partial / path
            if (file.read_bytes() if os.path.lexists(file) else None) != checked:
                raise Integrity(
                    "manifest-differs", f"{path} of {self.name} differs from the one that was checked; pull it again"
                )
        digests.verify(partial, self.files, always=True)


@contextlib.contextmanager
def partial_folder(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the hidden folder that a pull fills, and the descriptor that keeps it locked.

    It is kept after Failed (but not disk-full) and Busy.
    """
    partial = folder.with_name(f".pull-{folder.name}")
    lock = _lock_partial(partial, folder.name)
    try:
        with translate_errors(f"cannot pull {folder.name}"):
            yield partial, lock
    except CheckpointError as error:
        # Another attempt can continue after a failure of the store or the link; after other errors, remove the folder.
        if not isinstance(error, Failed | Busy) or error.code == "disk-full":
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock_partial(partial: Path, name: str) -> int:
    """Create the folder that a pull fills, if necessary, and lock it. Raises Busy, Failed."""
    for _ in range(_ATTEMPTS):
        try:
            private_folder(partial.parent)
            partial.mkdir(mode=0o700, exist_ok=True)
            fd = lock_folder(partial, fcntl.LOCK_EX)
        except BlockingIOError:
            break
        except FileNotFoundError:
            continue
        except OSError as error:
            raise disk.failure(f"cannot pull {name}", error, "archive-io") from error
        if fd >= 0:
            return fd
    raise Busy("snapshot-being-pulled", f"another process is pulling {name}; wait for it")


def discard(folder: Path) -> None:
    """Remove the leftovers of an interrupted pull of `folder`. Raises Busy while it is running."""
    if folder.with_name(f".pull-{folder.name}").exists():
        with partial_folder(folder) as (partial, _):
            shutil.rmtree(partial, ignore_errors=True)


def _clear_foreign(partial: Path, wanted: set[str]) -> None:
    for below, folders, files in os.walk(partial, topdown=False):
        for name in (*files, *folders):
            path = Path(below, name)
            if str(path.relative_to(partial)) not in wanted or path.is_symlink():
                # Entries of another version of this archive. Links are created again at the end.
                path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)


def _check_room(partial: Path, archive: Manifest) -> None:
    from lazyfs.content.chunk_store import zero_digest

    size = sum(c.length for file in archive.files for c in file.chunks if c.digest != zero_digest(c.length))
    here = sum(f.stat().st_blocks * 512 for f in partial.rglob("*") if f.is_file())
    free_space.require_free(partial.parent, size - here)


def read_file(file: File, chunks: ChunkStore) -> bytes:
    """Return the bytes of a file of an archive. Raises the store's errors."""
    return b"".join(get_chunk(chunks, chunk) for chunk in file.chunks)


def publish(partial: Path, folder: Path, lock: int) -> None:
    """Rename a finished folder to its name. Raises Failed (snapshot-exists)."""
    from lazyfs.paths import sync_folder

    # Downgrade to the shared lock of a restore, so that processes waiting for the name find it usable.
    fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise Failed(
            "snapshot-exists",
            f"another process has created {folder.name} meanwhile ({error.strerror}); it is kept, this one is dropped",
        ) from error
    sync_folder(folder.parent)
