"""Records beside the cache that nothing needs any more: copies of manifests, manifests of sources, digests of their chunks."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from lazyfs.cache.cache import Cache
from lazyfs.content.manifest import decode, is_digest
from lazyfs.content.stat_index import source_folder
from lazyfs.errors import Integrity
from lazyfs.mount import kernel

# A mount reads its manifest when it starts, and once more if its fetcher is restarted.
UNUSED_S = 30 * 86400.0


def unneeded(cache: Cache) -> Iterator[Path]:
    """Yield the records that nobody used for a month, of manifests that no mount shows and no file of which is cached.

    Each is to be removed at once: a mount that starts may use it next. A later mount writes it again: from the store, or from the source.
    """
    before, shown = time.time() - UNUSED_S, _shown(cache)
    kept_files = set()
    for folder, local in ((cache.root / "manifests", False), (source_folder(cache.root), True)):
        for record in sorted(folder.glob("*")):
            if not is_digest(record.name):
                continue
            try:
                files = {file.digest for file in decode(record.read_bytes(), record.name, local=local).files}
            except (Integrity, FileNotFoundError):
                files = set()  # damaged: it is refused, and written again
            if record.name[:16] in shown or any(map(cache.holds, files)) or not _older(record, before):
                kept_files |= files
                continue
            yield record
            if (signed := record.with_name(f"{record.name}.sig")).exists():
                yield signed
    for one in sorted((cache.root / "digests").glob("*")):
        if one.name not in kept_files and _older(one, before):
            yield one


def _older(record: Path, before: float) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return record.stat().st_mtime < before
    return False


def _shown(cache: Cache) -> set[str]:
    """Return the first 16 digits of every manifest that a mount of this namespace, or of a recorded daemon, shows."""
    return set(_mounted()) | set(_recorded(cache))


def _mounted() -> Iterator[str]:
    for entry in kernel.mount_table():
        if entry.fstype == kernel.FSTYPE:
            yield entry.source.rpartition(":")[2]


def _recorded(cache: Cache) -> Iterator[str]:
    for record in (cache.root.parent / "mounts").glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            yield str(json.loads(record.read_bytes())["manifest"])[:16]
