"""Keep versions of a folder in the chunk store; each version stores only what changed.

python examples/lazyfs_blobs.py FOLDER STORE
"""

from __future__ import annotations

import sys
from pathlib import Path

from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.trees import get_tree, put_tree
from lazyfs.stores import open_store


def run(folder: Path, store: str) -> str:
    """Store the folder twice (the second time writes nothing), read it back, and return the digest of its manifest."""
    chunks = ChunkStore(open_store(store), zstd=1)
    blob = chunks.put(b"a chunk of one's own")
    assert chunks.get(blob) == b"a chunk of one's own"

    written: list[int] = []
    digest = put_tree(folder, chunks, name="example", progress=lambda p: written.append(p.stored))
    again = put_tree(folder, chunks, name="example", progress=lambda p: written.append(p.stored))
    assert again == digest
    print(f"{digest[:16]}: at most {max(written, default=0)} bytes written, then {written[-1] if written else 0}")

    copy = folder.with_name(folder.name + ".copy")
    get_tree(digest, chunks, copy)
    print(f"the same files again in {copy}")
    return digest


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
