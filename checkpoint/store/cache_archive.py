"""Archives of compiled code (torch.compile, Triton, FlashInfer), useful on their own where no restore is possible.

    push_cache(folder, chunks, name)   → an archive of a compile cache
    pull_cache(name, chunks, folder)   → its files in a folder, except those that exist already

The archive's `meta` holds modification times, to the nanosecond. ninja, which builds FlashInfer's kernels and
PyTorch's extensions, compares them with each other and with its log, and rebuilds everything if they differ.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from checkpoint.errors import Integrity, NotFound
from checkpoint.files import private_folder, replacing
from checkpoint.store import archive as archives
from checkpoint.store.upload import MTIMES, Pushed, translate_errors

if TYPE_CHECKING:
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.content.manifest import Manifest

KIND = "compile-cache"
_NINJA = "build.ninja"


def push_cache(folder: Path, chunks: ChunkStore, name: str, sign: Callable[[bytes], bytes] | None = None) -> Pushed:
    """Store a folder of compiled code under `name`. Raises the same errors as `archive.push`."""
    return archives.push(folder, chunks, name, kind=KIND, sign=sign)


def pull_cache(name: str, chunks: ChunkStore, folder: Path, trust_keys: Sequence[Path] = ()) -> int:
    """Write the files of a stored cache into `folder`, except those that exist already.

    Return how many were written. Each file is written atomically, so an engine may be using the folder. A ninja build
    folder is written completely, and only if none exists here: with another build's log, ninja would trust files that it
    did not make. With `trust_keys`, one of them must have signed the archive.

    Raises NotFound, Integrity or Failed.
    """
    with translate_errors(f"cannot pull {name}"):
        digest = chunks.resolve(name)
        archive = chunks.get_manifest(digest)
        if archive.kind != KIND:
            raise NotFound(
                "not-a-cache", f"{name} in {chunks.store.url} is an archive of {archive.kind}, not of a compile cache"
            )
        if trust_keys and not archives.signed_as_a_whole(digest, chunks, trust_keys):
            raise Integrity(
                "compile-cache-unsigned",
                f"{name} in {chunks.store.url} is not signed, and --trust-key requires a signature",
            )
        if archive.meta.get("snapshot") != name:
            # The name contains engine, compilers and CPU, so an archive with another name is for another host.
            raise Integrity(
                "compile-cache-misplaced", f"{name} in {chunks.store.url} is an archive made for another name or host"
            )
        mtimes = _mtimes(archive)
        _check_symlinks(archive)
        private_folder(folder)
        kept = _build_folders(archive, folder)
        for directory in archive.directories:
            target = folder / directory.path
            if target.is_symlink():
                raise Integrity(
                    "archive-entry-refused", f"{target} is a symbolic link here and a folder in the archive"
                )
            target.mkdir(mode=0o700, exist_ok=True)
        written = 0
        for file in archive.files:
            target = folder / file.path
            if os.path.lexists(target) or any(file.path.startswith(f"{built}/") for built in kept):
                continue
            with replacing(target) as new:
                new.touch(0o600)
                new.write_bytes(archives.read_file(file, chunks))
                new.chmod(file.mode & 0o777)
                if file.path in mtimes:
                    os.utime(new, ns=(mtimes[file.path], mtimes[file.path]))
            written += 1
        for link in archive.symlinks:
            with contextlib.suppress(FileExistsError):
                (folder / link.path).symlink_to(link.target)
        return written


def _mtimes(archive: Manifest) -> dict[str, int]:
    """Return modification times in ns since the epoch, by path. Older archives have none."""
    try:
        return msgspec.json.decode(archive.meta.get(MTIMES, "{}"), type=dict[str, int])
    except msgspec.MsgspecError as error:
        raise Integrity("archive-garbled", f"the archive's list of times is damaged: {error}") from error


def _check_symlinks(archive: Manifest) -> None:
    """Reject links that lead out of the cache: later pulls would write through them."""
    for link in archive.symlinks:
        place = posixpath.normpath(posixpath.join(posixpath.dirname(link.path), link.target))
        if link.target.startswith("/") or place == ".." or place.startswith("../"):
            raise Integrity("archive-entry-refused", f"the archive's {link.path!r} points outside of the archive")


def _build_folders(archive: Manifest, folder: Path) -> set[str]:
    """Return ninja build folders of the archive that already have contents here."""
    built = {posixpath.dirname(file.path) for file in archive.files if posixpath.basename(file.path) == _NINJA}
    return {path for path in built if path and (folder / path).is_dir() and any((folder / path).iterdir())}
