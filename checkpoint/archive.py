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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from checkpoint import manifest as manifests
from checkpoint import sealing, signing
from checkpoint.errors import Busy, CheckpointError, Failed, HostLacks, Integrity, NotFound
from checkpoint.transfer import LINKS, Listing, Progress, Pull, Push, Pushed, get

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

    with _translated(f"cannot open {url}"):
        store = open_store(url)
        return ChunkStore(store, zstd=level or (LEVEL_REMOTE if store.remote else LEVEL_LOCAL))


# Push


def push(
    folder: Path,
    chunks: ChunkStore,
    name: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    kind: str = KIND,
) -> Pushed:
    """Store a snapshot folder under `name` (default: the folder's). The name is set last: a reader sees a whole archive or none.

    Raises Integrity when a file changes meanwhile or an image is damaged, Failed when the store or the disk does.
    """
    from checkpoint.cuts import plan

    with _translated(f"cannot push {folder.name}"):
        listing = _list(folder)
        lengths = (
            {f"images/{file}": cut for file, cut in plan(folder / "images").lengths.items()}
            if (folder / "images").is_dir()
            else {}
        )
        job = Push(chunks, sum(size for _, size, _ in listing.files), progress)
        from lazyfs.maintenance import store_lock

        with store_lock(chunks, exclusive=False):
            try:
                for path, size, _ in listing.files:
                    job.file(folder, path, size, lengths.get(path))
                job.drain()
            finally:
                job.pool.shutdown(cancel_futures=True)
            return job.finish(listing, kind, name or folder.name)


def _list(folder: Path) -> Listing:
    """Everything but sockets and pipes, which carry nothing, and what is this host's own."""
    found = Listing()

    def visit(below: str) -> None:
        for entry in sorted(os.scandir(folder / below), key=lambda e: e.name):
            path = f"{below}/{entry.name}" if below else entry.name
            if not below and entry.name.startswith(sealing.LEDGER):
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
    with _translated(f"cannot pull {name}"):
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
            new = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                new.touch(0o600)
                new.write_bytes(_content(file, chunks))
                new.chmod(file.mode & 0o777)
                new.replace(target)
            finally:
                new.unlink(missing_ok=True)
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
    with _partial(folder) as partial:
        digest = chunks.resolve(name)
        archive = chunks.get_manifest(digest)
        by_path = {file.path: file for file in archive.files}
        if archive.kind != KIND or manifests.FILE_NAME not in by_path:
            raise NotFound(
                "not-a-snapshot", f"{name} in {chunks.store.url} is an archive of {archive.kind}, not of a snapshot"
            )
        document = _content(by_path[manifests.FILE_NAME], chunks)
        signature = _content(by_path[signing.FILE_NAME], chunks) if signing.FILE_NAME in by_path else None
        if accept:
            accept(document, signature)
        links = _links(archive)
        _prepare(partial, archive)
        fetch = Pull(chunks, partial, archive.size, progress)
        try:
            for file in archive.files:
                if file.path not in links:
                    fetch.file(file)
            fetch.drain()
        finally:
            fetch.close()
        for path, original in links.items():
            (partial / path).unlink(missing_ok=True)
            (partial / path).hardlink_to(partial / original)
        for link in archive.symlinks:
            (partial / link.path).symlink_to(link.target)
        _check(partial, folder.name)
        for directory in reversed(archive.directories):
            (partial / directory.path).chmod(directory.mode & 0o777)
        _rename(partial, folder)
        return Pulled(digest, len(archive.files), archive.size, fetch.kept, fetch.fetched)


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """The hidden folder that a pull fills, locked; it stays when the pull fails."""
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
        with _translated(f"cannot pull {folder.name}"):
            yield partial
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
        with _partial(folder) as partial:
            shutil.rmtree(partial, ignore_errors=True)


def _prepare(partial: Path, archive: Manifest) -> None:
    """Folders, no foreign entries, and room on the disk."""
    wanted = {d.path for d in archive.directories} | {f.path for f in archive.files}
    for below, folders, files in os.walk(partial, topdown=False):
        for name in (*files, *folders):
            path = Path(below, name)
            if str(path.relative_to(partial)) not in wanted or path.is_symlink():
                # Of another version of this archive; links are made anew at the end.
                path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
    for directory in archive.directories:
        (partial / directory.path).mkdir(mode=0o700, exist_ok=True)
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


def _links(archive: Manifest) -> dict[str, str]:
    """Path → the file it is another name of."""
    paths = {file.path for file in archive.files}
    try:
        groups = msgspec.json.decode(archive.meta.get(LINKS, "[]"), type=list[list[str]])
    except msgspec.MsgspecError as error:
        raise Integrity("archive-garbled", f"the archive's list of hard links is damaged: {error}") from error
    if any(path not in paths for group in groups for path in group):
        raise Integrity("archive-garbled", "the archive's list of hard links names a file that is not in it")
    return {path: group[0] for group in groups for path in group[1:]}


def _content(file: File, chunks: ChunkStore) -> bytes:
    return b"".join(get(chunks, chunk) for chunk in file.chunks)


def _check(partial: Path, name: str) -> None:
    """The finished folder against its own manifest, in full; this also spares the first restore from hashing again."""
    document = (partial / manifests.FILE_NAME).read_bytes()
    try:
        found = msgspec.json.decode(document, type=_Essentials)
    except msgspec.MsgspecError as error:
        raise Integrity("manifest-garbled", f"the archive's manifest is damaged: {error}") from error
    if found.name != name:
        raise Integrity("manifest-misplaced", f"the archive holds the snapshot {found.name}, not {name}")
    sealing.verify(partial, found.files, always=True)


class _Essentials(msgspec.Struct):
    """What is needed of a snapshot's manifest here, of whichever version."""

    name: str
    files: dict[str, manifests.SnapshotFile]


def _rename(partial: Path, folder: Path) -> None:
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


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """lazyfs' errors and the operating system's, as this package's."""
    from lazyfs import errors as lazy

    kinds: tuple[tuple[type[lazy.LazyfsError], type[CheckpointError]], ...] = (
        (lazy.Integrity, Integrity),
        (lazy.NotFound, NotFound),
        (lazy.Busy, Busy),
        (lazy.HostLacks, HostLacks),
    )
    try:
        yield
    except lazy.LazyfsError as error:
        kind = next((ours for theirs, ours in kinds if isinstance(error, theirs)), Failed)
        raise kind(f"archive-{error.code}" if kind is not Failed else error.code, f"{what}: {error}") from error
    except OSError as error:
        raise Failed(
            "disk-full" if error.errno == 28 else "archive-io", f"{what}: {error.strerror or error}"
        ) from error
