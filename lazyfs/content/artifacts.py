"""Push weights to an OCI registry, and pull them into a directory: `quickthaw weights push | pull`."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.importer import walk
from lazyfs.content.manifest import File
from lazyfs.content.whole_file import hash_of
from lazyfs.errors import Busy, Integrity, Permanent, from_os_error, os_errors
from lazyfs.paths import flock_within, open_fd
from lazyfs.stores.oci import Layer, OciStore, layer_of
from lazyfs.stores.retry import RetryPolicy, retrying

_BLOCK = 4 << 20
_WORKERS = 4


@dataclass(frozen=True)
class Moved:
    """Result of a push or a pull. `digest` of the artifact; `bytes` of its files; `new`: blobs that were sent, or files written."""

    digest: str
    files: int
    bytes: int
    new: int


def push_folder(folder: Path, target: OciStore) -> Moved:
    """Push every file of a directory; symbolic links are followed.

    Raises what `walk` raises, Permanent (source-changed) if a file changes meanwhile, or what the registry raises.
    """
    listing = walk(folder)
    links = [(link.path, folder / link.path) for link in listing.symlinks]
    found = [(path, source, st.st_size) for path, source, st in listing.files]
    found += [(path, source, source.stat().st_size) for path, source in links if source.is_file()]
    files = []
    for path, source, size in sorted(found):
        read = partial(_blocks, source, size)
        files.append((layer_of(path, size, read()), read))
    return _push(files, target)


def push_manifest(name: str, chunks: ChunkStore, target: OciStore) -> Moved:
    """Push the files of a manifest in a store. Raises NotFound, what the store raises, or what the registry raises."""
    manifest = chunks.get_manifest(chunks.resolve(name))
    by_path = {file.path: file for file in manifest.files}
    for link in manifest.symlinks:
        there = by_path.get(posixpath.normpath(f"{posixpath.dirname(link.path)}/{link.target}".lstrip("/")))
        if there is not None:
            by_path[link.path] = File(link.path, there.mode, there.size, there.chunks)
    files = []
    for path, file in sorted(by_path.items()):
        read = partial(_chunks_of, file, chunks)
        files.append((layer_of(path, file.size, read()), read))
    return _push(files, target)


def _push(files: Sequence[tuple[Layer, Callable[[], Iterator[bytes]]]], target: OciStore) -> Moved:
    digest, new = target.push(files)
    return Moved(digest, len(files), sum(layer.size for layer, _ in files), new)


def _blocks(source: Path, size: int) -> Iterator[bytes]:
    left = size
    with os_errors(f"cannot read {source}"), open_fd(source, os.O_RDONLY) as fd:
        while left:
            data = os.read(fd, min(left, _BLOCK))
            if not data:
                raise Permanent(f"{source} became shorter; push it again", code="source-changed")
            left -= len(data)
            yield data


def _chunks_of(file: File, chunks: ChunkStore) -> Iterator[bytes]:
    for chunk in file.chunks:
        yield retrying(partial(chunks.get, chunk.digest, chunk.length, chunk.encoding), RetryPolicy())


def pull(source: OciStore, folder: Path) -> Moved:
    """Write an artifact's files below a directory, each under a temporary name until its digest is right.

    Files that are there already with the right bytes are kept. Raises Busy (pull-busy) if another pull writes there, Integrity,
    DiskFull, or what the registry raises.
    """
    layers = list(retrying(source.layers, RetryPolicy()).values())
    with os_errors(f"cannot write below {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), ThreadPoolExecutor(_WORKERS) as pool:
        new = sum(pool.map(lambda layer: _pull(source, layer, folder), layers))
    return Moved(source.pinned.rpartition("@")[2], len(layers), sum(layer.size for layer in layers), new)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a directory: two pulls would write the same temporary files."""
    with contextlib.ExitStack() as held:
        with os_errors(f"cannot open {folder}"):
            fd = held.enter_context(open_fd(folder, os.O_RDONLY | os.O_DIRECTORY))
        try:
            free = flock_within(fd, 0.0)
        except OSError:
            free = True  # a file system without locks of directories, such as NFS
        if not free:
            raise Busy(f"another pull writes to {folder}; wait for it, or give another directory", code="pull-busy")
        yield


def _pull(source: OciStore, layer: Layer, folder: Path) -> bool:
    target = folder / layer.path
    partial_file = target.with_name(f".{target.name}.part")
    try:
        if target.is_file() and hash_of(target) == layer.digest:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(partial_file, "wb") as out:
            for start in range(0, layer.size, 2 * _BLOCK):
                length = min(2 * _BLOCK, layer.size - start)
                out.write(retrying(partial(source.get, layer.path, start, length, layer.digest), RetryPolicy()))
            out.flush()
            os.fsync(out.fileno())
        found = hash_of(partial_file)
        if found != layer.digest:
            raise Integrity(
                f"{layer.path} of {source.url} hashes to {found[:19]} instead of {layer.digest[:19]}; pull it again"
            )
        partial_file.replace(target)
        return True
    except OSError as error:
        raise from_os_error(error, f"cannot write {target}") from error
    finally:
        partial_file.unlink(missing_ok=True)
