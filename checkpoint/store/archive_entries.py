"""Check that an archive from a store holds exactly the entries that the snapshot's manifest names.

A snapshot folder has a few files of its own (`manifest.json`, its signature, the working set) and up to five folders. The
manifest names every file in these folders by size and digest. Nothing of an archive is written before its entries
match that list. Otherwise a store could plant this host's own files beside a snapshot (`.verified…`, `.mapped…`), or
replace the manifest after its signature was checked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from checkpoint.errors import Integrity
from checkpoint.snapshot.digests import digest_symlink
from checkpoint.snapshot.manifest import FILE_NAME, SnapshotFile
from checkpoint.snapshot.rehearsal import FILE_NAME as REHEARSED
from checkpoint.snapshot.signatures import FILE_NAME as SIGNATURE
from checkpoint.store import layout as layouts
from checkpoint.store.layout import Layout
from checkpoint.store.upload import LINKS
from lazyfs.content.records import ready

if TYPE_CHECKING:
    from lazyfs.content.manifest import Manifest

WORKING_SET = "working-set"
UNNAMED = (WORKING_SET, REHEARSED)
"""Files that the manifest does not name, because they are written after it. Only a signature of the archive covers them."""
ROOT_FILES = (FILE_NAME, SIGNATURE, *UNNAMED)
FOLDERS = ("images", "shm", "tmp", "cache", "weights")
_WITH_SYMLINKS = ("shm", "tmp")
"""Folders that may hold symbolic links. CRIU's images are plain files, and paths below `cache` are followed when it is
unpacked, so a link in either could lead elsewhere."""


class Essentials(msgspec.Struct):
    """The manifest fields needed to fetch a snapshot, the same in every format."""

    name: str
    files: dict[str, SnapshotFile]


def essentials(document: bytes) -> Essentials:
    """Decode the part of a snapshot's manifest that names its files. Raises Integrity (manifest-garbled)."""
    try:
        return msgspec.json.decode(document, type=ready(Essentials))
    except msgspec.MsgspecError as error:
        raise Integrity("manifest-garbled", f"the archive's manifest is damaged: {error}") from error


def belongs(path: str) -> bool:
    """Return whether a path in a snapshot's folder is part of the snapshot.

    Other entries are this host's own.
    """
    top, _, below = path.partition("/")
    return top in FOLDERS or (not below and path in ROOT_FILES)


def hard_links(archive: Manifest) -> dict[str, str]:
    """Map each hard link's path to the path of its original. Raises Integrity (archive-garbled)."""
    try:
        groups = msgspec.json.decode(archive.meta.get(LINKS, "[]"), type=list[list[str]])
    except msgspec.MsgspecError as error:
        raise Integrity("archive-garbled", f"the archive's list of hard links is damaged: {error}") from error
    return {path: group[0] for group in groups for path in group[1:]}


def check(
    archive: Manifest, layout: Layout | None, links: Mapping[str, str], named: Mapping[str, SnapshotFile]
) -> None:
    """Reject an archive unless it holds exactly the manifest's files (`named`) and optionally ROOT_FILES.

    Digests verify the file contents later. Raises Integrity: archive-entry-refused, file-unexpected, file-missing,
    file-size-differs, file-digest-differs.
    """
    files = _files(archive, layout)
    folders = {directory.path for directory in archive.directories}
    symlinks = {link.path: link.target for link in archive.symlinks}
    for path in (*folders, *files, *symlinks):
        if not belongs(path) or (path in FOLDERS and path not in folders) or (path in ROOT_FILES and path not in files):
            raise Integrity("archive-entry-refused", f"the archive holds {path!r}, which does not belong to a snapshot")
    for path in symlinks:
        if path.partition("/")[0] not in _WITH_SYMLINKS:
            raise Integrity("archive-entry-refused", f"the archive holds {path!r} as a symbolic link")
    for path, original in links.items():
        if not _is_another_name(path, original, files, links, folders, symlinks, layout):
            raise Integrity(
                "archive-entry-refused", f"the archive makes {path!r} a hard link to {original!r}, which is not allowed"
            )
        files[path] = files[original]
    here = {path: size for path, size in files.items() if path not in ROOT_FILES}
    here |= {path: len(os.fsencode(target)) for path, target in symlinks.items()}
    for path in sorted(here.keys() | named.keys()):
        if path not in named:
            raise Integrity("file-unexpected", f"the archive holds {path}, which is not in the snapshot's manifest")
        if path not in here:
            raise Integrity("file-missing", f"the archive lacks {path}, which is in the snapshot's manifest")
        if here[path] != named[path].size:
            raise Integrity(
                "file-size-differs", f"the archive has {here[path]} bytes of {path} instead of {named[path].size}"
            )
    for path, target in symlinks.items():
        if digest_symlink(target) != named[path].blake3:
            raise Integrity("file-digest-differs", f"the archive's {path} does not match the snapshot's manifest")
    for path, original in links.items():
        if named[path].blake3 != named[original].blake3:
            raise Integrity("file-digest-differs", f"the archive's {path} does not match the snapshot's manifest")


def _files(archive: Manifest, layout: Layout | None) -> dict[str, int]:
    """Map every file that the archive creates to its size, by its path in the snapshot."""
    if layout is None:
        return {file.path: file.size for file in archive.files}
    own = (layouts.INDEX, layouts.BYTES)
    found = {layout.target(file.path): file.size for file in archive.files if file.path not in own}
    return found | {path: size for path, (size, _) in layout.small.items()}


def _is_another_name(
    path: str,
    original: str,
    files: Mapping[str, int],
    links: Mapping[str, str],
    folders: set[str],
    symlinks: Mapping[str, str],
    layout: Layout | None,
) -> bool:
    """Return whether a hard link points to a file of the snapshot and its path is not otherwise taken."""
    parent, _, name = path.rpartition("/")
    return (
        parent in folders
        and name not in ("", ".", "..")
        and "\0" not in name
        and belongs(original)
        and "/" in original
        and original in files
        and original not in links
        and path not in folders
        and path not in symlinks
        and not (layout and (path in layout.small or path in layout.holes))
    )
