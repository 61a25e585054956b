"""Push a rehearsed snapshot to a store, unless the store has it already, as it is now.

A push that was interrupted continues with the chunks that the store lacks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint import disk
from checkpoint.snapshot import manifest, rehearsal, signatures
from checkpoint.store import archive
from checkpoint.store.upload import translate_errors
from checkpoint.store.variants import reference

if TYPE_CHECKING:
    from checkpoint.snapshot.library import Library
    from lazyfs.content.chunk_store import ChunkStore

_COMPARED = (manifest.FILE_NAME, rehearsal.FILE_NAME)
"""The files that tell one state of a snapshot from another: the mark changes with the working set."""


def push(library: Library, name: str, store: str, sign_key: str = "") -> int:
    """Push a snapshot and return the bytes that were written to the store; 0 if it has it. Raises CheckpointError."""
    chunks = archive.open_chunks(store)
    with library.in_use(name) as folder:
        written = 0
        if not has(folder, chunks):
            sign = signatures.signer(Path(sign_key)) if sign_key else None
            written = archive.push(folder, chunks, sign=sign).stored
        with disk.optional(f"the next launch looks again whether {store} has {name}", "push-not-noted"):
            rehearsal.note_pushed(folder, store)
        return written


def has(folder: Path, chunks: ChunkStore) -> bool:
    """Return whether the store has this snapshot with this mark. Raises CheckpointError if it cannot be read."""
    from lazyfs.errors import NotFound

    with translate_errors(f"cannot look for {folder.name} in {chunks.store.url}"):
        try:
            stored = chunks.get_manifest(
                chunks.get_ref("snapshots", reference(folder.name, archive.host_class(folder)))
            )
        except NotFound:
            return False
        files = {file.path: file for file in stored.files}
        for name in _COMPARED:
            if name not in files or archive.read_file(files[name], chunks) != (folder / name).read_bytes():
                return False
    return True
