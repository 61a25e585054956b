"""Archives: snapshots as content-addressed chunks in any store of lazyfs, beside the weights.

    push(folder, chunks)          → an archive, under the snapshot's name, that a mount can show lazily as well
    pull("name", chunks, folder)  → the snapshot again, byte for byte

An archive is a lazyfs manifest of kind `snapshot`: the folder's files, cut so that what is equal is stored once (checkpoint.cuts),
compressed, each chunk named by the BLAKE3 of its plain bytes. What a pull writes has been compared with that name before, the
manifest of the snapshot is put before the caller (`accept`: signature, identity) before anything else is fetched, and the finished
snapshot is verified against its own digests before it gets its name. A push or a pull that was interrupted goes on where it stopped:
chunks that are there are not sent again, and what a partial folder holds is hashed, not believed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from checkpoint import layout as layouts
from checkpoint import manifest as manifests
from checkpoint import mapped, sealing, signing
from checkpoint.arrival import EVERYTHING, Arrival
from checkpoint.aside import aside
from checkpoint.errors import Busy, CheckpointError, Failed, Integrity, NotFound
from checkpoint.transfer import LINKS, WORKERS, Listing, Progress, Push, Pushed, get, translated
from lazyfs.records import ready

if TYPE_CHECKING:
    from lazyfs.chunkstore import ChunkStore
    from lazyfs.manifest import File, Manifest

KIND = "snapshot"
CACHE_KIND = "compile-cache"
LEVEL_LOCAL, LEVEL_REMOTE = 1, 3
"""zstd levels. Measured on vLLM's and SGLang's images: unpacking runs at 0.7 to 1.1 GB/s per core whatever the level; level 1 packs 490
MB/s to 39 %, level 3 240 MB/s to 37 %, level 9 60 MB/s to 35 %. Over a link, size is time at every restore; on a disk, it is not."""


@dataclass(frozen=True)
class Pulled:
    """What a pull did. Bytes: `size` of all files; `kept` found from an earlier attempt; `fetched` plain bytes read from the store."""

    digest: str
    files: int
    size: int
    kept: int
    fetched: int


def open_chunks(url: str, level: int | None = None) -> ChunkStore:
    """The chunk store at a URL with the compression level for it: `level`, or one chosen by whether the store is remote.

    Raises Failed for a URL that cannot be used.
    """
    from lazyfs.chunkstore import ChunkStore
    from lazyfs.stores import open_store

    with translated(f"cannot open {url}"):
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
    """Store a snapshot folder under `name` (default: the folder's). The name is set last: a reader sees a whole archive or none.

    A snapshot whose working set is known is stored by it (checkpoint.layout). `sign`: sign the archive as a whole too, so that whoever
    asks for a signature need not have all of it before a process may use a part.

    Raises Integrity when a file changes meanwhile or an image is damaged, Failed when the store or the disk does.
    """
    from checkpoint.cuts import CHUNK, plan

    with translated(f"cannot push {folder.name}"):
        listing = _list(folder)
        layout = None
        lengths: dict[str, list[int]] = {}
        if (folder / "images").is_dir():
            links = {path: names[0] for names in listing.names.values() for path in names[1:]}
            layout = layouts.plan(folder, listing.files, links) if kind == KIND else None
            cuts = plan(
                folder / "images", layout.holes_by_name() if layout else {}, layouts.REST_CHUNK if layout else CHUNK
            )
            lengths = {f"images/{file}": cut for file, cut in cuts.lengths.items()}
        job = Push(chunks, sum(size for _, size, _ in listing.files), progress)
        from lazyfs.maintenance import store_lock

        with store_lock(chunks, exclusive=False):
            try:
                if layout:
                    modes = _push_by_layout(job, folder, listing, layout, lengths)
                else:
                    modes = {path: mode for path, _, mode in listing.files}
                    for path, size, _ in listing.files:
                        job.file(folder, path, size, lengths.get(path))
                job.drain()
            finally:
                job.pool.shutdown(cancel_futures=True)
            done = job.finish(listing, kind, name or folder.name, modes)
            if sign:
                chunks.store.put(signature_key(done.digest), sign(signed_words(done.digest)))
            return done


def signature_key(digest: str) -> str:
    """Where the signature of an archive lies in its store."""
    return f"manifests/{digest}.sig"


def signed_words(digest: str) -> bytes:
    """What an archive's signature is made over (checkpoint.signing puts its own prefix before it)."""
    return f"archive {digest}".encode()


def _push_by_layout(
    job: Push, folder: Path, listing: Listing, layout: layouts.Layout, lengths: dict[str, list[int]]
) -> dict[str, int]:
    """The files of the archive, what is needed first before the others; their modes."""
    modes = {layouts.INDEX: 0o600, layouts.BYTES: 0o600}
    sizes = {path: size for path, size, _ in listing.files}
    job.made(layouts.INDEX, layout.encode())
    job.gathered(
        folder,
        layouts.BYTES,
        layout.lengths(),
        lambda offset, length: layout.pieces(layouts.BYTES, offset, length),
        {path: sizes[path] for path in layout.index.paths},
    )
    other_names = {path for names in listing.names.values() for path in names[1:]}
    for path, size, mode in listing.files:
        if path in layout.small or path in other_names:
            continue
        if path not in layout.holes:
            job.file(folder, path, size, None)
            modes[path] = mode
            continue
        rest = layouts.rest_of(path)
        pieces = partial(layout.pieces, rest)
        job.gathered(folder, rest, lengths[path], pieces, {path: size})
        modes[rest] = mode
    return modes


def _list(folder: Path) -> Listing:
    """Everything but sockets and pipes, which carry nothing, and what is this host's own."""
    found = Listing()

    def visit(below: str) -> None:
        for entry in sorted(os.scandir(folder / below), key=lambda e: e.name):
            path = f"{below}/{entry.name}" if below else entry.name
            if not below and entry.name.startswith((sealing.LEDGER, mapped.FOLDER)):
                continue
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(info.st_mode):
                found.symlinks.append((path, str(Path(entry.path).readlink())))
            elif stat.S_ISDIR(info.st_mode):
                found.directories.append((path, stat.S_IMODE(info.st_mode) & 0o777))
                visit(path)
            elif stat.S_ISREG(info.st_mode):
                found.files.append((path, info.st_size, stat.S_IMODE(info.st_mode) & 0o777))
                if info.st_nlink > 1:
                    found.names.setdefault((info.st_dev, info.st_ino), []).append(path)

    visit("")
    return found


# Compile caches: of use by themselves where no restore is possible


def push_cache(folder: Path, chunks: ChunkStore, name: str) -> Pushed:
    """Store a folder of compiled code (torch.compile's, Triton's, FlashInfer's) under `name`; raises as `push`."""
    return push(folder, chunks, name, kind=CACHE_KIND)


def pull_cache(name: str, chunks: ChunkStore, folder: Path) -> int:
    """Put the files of a stored cache into `folder` where they are not there yet; how many.

    Each file appears whole or not at all, so an engine may be using the folder. Raises NotFound, Integrity or Failed.
    """
    with translated(f"cannot pull {name}"):
        archive = chunks.get_manifest(chunks.resolve(name))
        if archive.kind != CACHE_KIND:
            raise NotFound(
                "not-a-cache", f"{name} in {chunks.store.url} is an archive of {archive.kind}, not of a compile cache"
            )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in archive.directories:
            (folder / directory.path).mkdir(mode=0o700, exist_ok=True)
        written = 0
        for file in archive.files:
            target = folder / file.path
            if target.exists():
                continue
            with aside(target) as new:
                new.touch(0o600)
                new.write_bytes(_content(file, chunks))
                new.chmod(file.mode & 0o777)
            written += 1
        for link in archive.symlinks:
            with contextlib.suppress(FileExistsError):
                (folder / link.path).symlink_to(link.target)
        return written


# Pull


def pull(
    name: str,
    chunks: ChunkStore,
    folder: Path,
    accept: Callable[[bytes, bytes | None], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Pulled:
    """Fetch the archive `name` (or a manifest's digest) and make it the snapshot folder `folder`, which must not exist.

    `accept` is given the snapshot's manifest and its signature file (None when there is none) before anything else is fetched; what
    it raises ends the pull. A pull that fails keeps what it has in a hidden folder beside, for the next attempt.

    Raises NotFound, Busy (another process pulls it), Integrity (a chunk or the whole is not what it should be), Failed (the store, or
    the disk is full).
    """
    if folder.exists():
        raise Failed(
            "snapshot-exists", f"{folder.name} is here already; remove it first: quickthaw snapshot rm {folder.name}"
        )
    with partial_folder(folder) as (partial, lock):
        opened = Opened.of(name, chunks)
        if accept:
            accept(opened.document, opened.signature)
        opened.prepare(partial)
        arrival = Arrival(
            chunks, opened.archive, opened.layout, partial, opened.links, workers=WORKERS, progress=progress
        )
        try:
            arrival.begin()
            arrival.wait(EVERYTHING)
            arrival.settle()
        finally:
            arrival.close()
        opened.link(partial)
        check(partial, folder.name)
        put_in_place(partial, folder, lock)
        size = sum(size for size, _ in arrival.files.values())
        return Pulled(opened.digest, len(arrival.files) + len(opened.links), size, arrival.kept, arrival.fetched)


@dataclass(frozen=True)
class Opened:
    """A snapshot's archive of which the manifests are here and nothing else. `document`, `signature`: the snapshot's own."""

    digest: str
    archive: Manifest
    layout: layouts.Layout | None
    document: bytes
    signature: bytes | None
    links: dict[str, str]

    @classmethod
    def of(cls, name: str, chunks: ChunkStore) -> Opened:
        """Read the manifests and the layout. Raises NotFound, Integrity, and what the store raises."""
        # A name that cannot be a digest or a tag is looked up once only: over a link, each look costs a restore a round trip.
        digest = chunks.resolve(name) if "-" not in name else chunks.get_ref("snapshots", name)
        archive = chunks.get_manifest(digest)
        by_path = {file.path: file for file in archive.files}
        if archive.kind != KIND or manifests.FILE_NAME not in by_path:
            raise NotFound(
                "not-a-snapshot", f"{name} in {chunks.store.url} is an archive of {archive.kind}, not of a snapshot"
            )
        wanted = [path for path in (manifests.FILE_NAME, signing.FILE_NAME, layouts.INDEX) if path in by_path]
        with ThreadPoolExecutor(len(wanted), thread_name_prefix="open") as pool:
            read = dict(zip(wanted, pool.map(lambda path: _content(by_path[path], chunks), wanted), strict=True))
        layout = layouts.decode(read[layouts.INDEX]) if layouts.INDEX in read else None
        files = set(by_path)
        if layout:
            layout.check(archive)
            files = (files - {layouts.INDEX, layouts.BYTES}) | set(layout.small)
        document, signature = read[manifests.FILE_NAME], read.get(signing.FILE_NAME)
        return cls(digest, archive, layout, document, signature, _links(archive, files))

    def prepare(self, partial: Path) -> None:
        """Folders, no foreign entries, and room on the disk."""
        archive, layout = self.archive, self.layout
        files = {layout.target(f.path) if layout else f.path for f in archive.files} | set(
            layout.small if layout else ()
        )
        _clear_foreign(partial, {d.path for d in archive.directories} | (files - {layouts.INDEX, layouts.BYTES}))
        for directory in archive.directories:
            (partial / directory.path).mkdir(mode=0o700, exist_ok=True)
        _check_room(partial, archive)

    def link(self, partial: Path) -> None:
        """Further names, symbolic links, and the folders' modes: after the files are there."""
        for path, original in self.links.items():
            (partial / path).unlink(missing_ok=True)
            (partial / path).hardlink_to(partial / original)
        for link in self.archive.symlinks:
            (partial / link.path).unlink(missing_ok=True)
            (partial / link.path).symlink_to(link.target)
        for directory in reversed(self.archive.directories):
            (partial / directory.path).chmod(directory.mode & 0o777)


@contextlib.contextmanager
def partial_folder(folder: Path) -> Iterator[tuple[Path, int]]:
    """The hidden folder that a pull fills, and the descriptor that keeps it locked; it stays when the pull fails."""
    partial = folder.with_name(f".pull-{folder.name}")
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise Busy("snapshot-being-pulled", f"another process is pulling {folder.name}; wait for it") from None
    try:
        with translated(f"cannot pull {folder.name}"):
            yield partial, lock
    except CheckpointError as error:
        # Trying again continues where the store or the link failed; nothing else is worth keeping.
        if not isinstance(error, Failed | Busy) or error.code == "disk-full":
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def discard(folder: Path) -> None:
    """Remove what an interrupted pull of `folder` left, if anything. Raises Busy while it is running."""
    if folder.with_name(f".pull-{folder.name}").exists():
        with partial_folder(folder) as (partial, _):
            shutil.rmtree(partial, ignore_errors=True)


def _clear_foreign(partial: Path, wanted: set[str]) -> None:
    for below, folders, files in os.walk(partial, topdown=False):
        for name in (*files, *folders):
            path = Path(below, name)
            if str(path.relative_to(partial)) not in wanted or path.is_symlink():
                # Of another version of this archive; links are made anew at the end.
                path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)


def _check_room(partial: Path, archive: Manifest) -> None:
    from lazyfs.chunkstore import zero_digest

    size = sum(c.length for file in archive.files for c in file.chunks if c.digest != zero_digest(c.length))
    here = sum(f.stat().st_blocks * 512 for f in partial.rglob("*") if f.is_file())
    free = shutil.disk_usage(partial).free
    if size - here > free:
        raise Failed(
            "disk-full",
            f"the snapshot needs {size / 1e9:.1f} GB and {partial.parent} has {free / 1e9:.1f} GB free; "
            "make room (quickthaw snapshot rm, quickthaw weights gc) or set QUICKTHAW_HOME",
        )


def _links(archive: Manifest, files: set[str]) -> dict[str, str]:
    """Path → the file it is another name of. `files`: those of the archive by their names in the snapshot."""
    try:
        groups = msgspec.json.decode(archive.meta.get(LINKS, "[]"), type=list[list[str]])
    except msgspec.MsgspecError as error:
        raise Integrity("archive-garbled", f"the archive's list of hard links is damaged: {error}") from error
    listed = {path for group in groups for path in group[1:]}
    folders = {""} | {d.path for d in archive.directories}
    bad = any(path.rpartition("/")[0] not in folders or path.split("/")[-1] in ("", ".", "..") for path in listed)
    if bad or any(group[0] not in files for group in groups if group):
        raise Integrity("archive-garbled", "the archive's list of hard links names a file that is not in it")
    return {path: group[0] for group in groups for path in group[1:]}


def _content(file: File, chunks: ChunkStore) -> bytes:
    return b"".join(get(chunks, chunk) for chunk in file.chunks)


def check(partial: Path, name: str) -> None:
    """The finished folder against its own manifest, in full; this also spares the first restore from hashing again."""
    document = (partial / manifests.FILE_NAME).read_bytes()
    try:
        found = msgspec.json.decode(document, type=ready(_Essentials))
    except msgspec.MsgspecError as error:
        raise Integrity("manifest-garbled", f"the archive's manifest is damaged: {error}") from error
    if found.name != name:
        raise Integrity("manifest-misplaced", f"the archive holds the snapshot {found.name}, not {name}")
    sealing.verify(partial, found.files, always=True)


class _Essentials(msgspec.Struct):
    """What is needed of a snapshot's manifest here, of whichever version."""

    name: str
    files: dict[str, manifests.SnapshotFile]


def put_in_place(partial: Path, folder: Path, lock: int) -> None:
    """Give a finished folder its name. Raises Failed (snapshot-exists)."""
    # From now on as whoever restores from it holds it: what waits for the name must not find it locked.
    fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        partial.rename(folder)
    except OSError as error:
        raise Failed(
            "snapshot-exists", f"{folder.name} appeared meanwhile ({error.strerror}); it is left alone"
        ) from error
    fd = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
