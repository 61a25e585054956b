"""Map a model directory to its manifest digest (`import_directory`), in milliseconds if nothing changed.

The stat cache, one file per (directory, store) under `index/`, holds for each entry the fields that the kernel changes on
any write: size, mtime, ctime and inode. Equal stats mean equal content, with git's caveat: a ctime too close to the time of
reading could hide a later write, so an import waits out the clock's granularity first. The cache also gives a mount on this
host the path of the original (`origins`), so that an unchanged original is read in place instead of being copied into the
cache.

Imports only the standard library at import time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.errors import Integrity, LazyfsError, NotFound, Temporary
from lazyfs.paths import default_store_url, fingerprint, home, private_dir, state_dir, write_atomic
from lazyfs.stores.hub_rules import is_commit
from lazyfs.stores.urls import local_path, normal_url, shown_url, without_user

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.content.importer import Progress
    from lazyfs.content.manifest import Manifest

log = logging.getLogger("lazyfs.content.stat_index")
# Kernel timestamps advance with the tick, at most 10 ms apart (CONFIG_HZ=100).
_GRANULE_S = 0.02
_FORMAT = 1


def import_directory(
    path: Path,
    store_url: str | None = None,
    *,
    tag: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    zstd: int | str | None = "auto",
    thorough: bool = False,
) -> str:
    """Return the manifest digest (hex) of `path`, importing what the store lacks.

    `thorough`: check each chunk in the store even if the directory is unchanged, and import lost chunks again. Otherwise
    only a local store's manifest is checked, which takes no time. Raises NotFound or Usage for a path that is not a
    directory, Permanent for unreadable entries, DiskFull, or what the store raises.
    """
    path = Path(path).expanduser().absolute()
    url = normal_url(store_url or default_store_url())
    record_file = _record_file(path, url)
    record = _load(record_file)
    stats = _stats(path)
    if (
        record is not None
        and stats is not None
        and record["stats"] == stats
        and _still_stored(url, record["manifest"], thorough)
    ):
        digest = str(record["manifest"])
        if tag is not None:
            set_tag(url, tag, digest)
        return digest
    return _import(path, url, record_file, tag, progress, zstd)


def known_digest(path: Path, store_url: str | None = None) -> str | None:
    """Return what `import_directory` would return without reading any file; None if the directory is new or has changed."""
    path = Path(path).expanduser().absolute()
    url = normal_url(store_url or default_store_url())
    record = _load(_record_file(path, url))
    return str(record["manifest"]) if record is not None and record["stats"] == _stats(path) else None


def stored_digest(path: Path, store_url: str | None = None) -> str | None:
    """Return `known_digest`, or None if a local store has lost the manifest. Of another store nothing is asked."""
    digest = known_digest(path, store_url)
    stored = digest is not None and _still_stored(normal_url(store_url or default_store_url()), digest, False)
    return digest if stored else None


def read_through(
    source: Path | str,
    *,
    cache_dir: Path | None = None,
    limit_s: float | None = None,
    known_limit_s: float | None = None,
) -> str:
    """Return the digest of a manifest that shows a directory, or an object prefix (URL), without importing it.

    Nothing is copied: an unchanged local directory is read in place (and passed through); a remote one is cached as it is
    read. Of a URL that does not answer, the manifest of the last time is returned, if there is one. The manifest is written
    beside the cache, in its own folder (`source_folder`): this host wrote every manifest there, none came from a store.

    `limit_s`: how long a URL may take to answer in all; `known_limit_s`: the same where the manifest of the last time is here.
    Raises Temporary (source-silent) after that, or what `lazyfs.content.read_through.describe` raises.
    """
    url = normal_url(str(source))
    folder = local_path(url)
    record_file = _record_file(folder or Path("/"), f"source:{url}")
    manifests = private_dir(source_folder(cache_dir or home() / "cache"))
    stats = _stats(folder) if folder is not None else None
    record = _load(record_file)
    if record is not None:
        with contextlib.suppress(OSError):  # its mount comes next: `cache prune` leaves it
            os.utime(manifests / record["manifest"])
        if not (manifests / record["manifest"]).exists():
            record = None
    if record is not None and (record["stats"] == stats if folder is not None else _is_fixed(url)):
        return str(record["manifest"])
    from lazyfs.content.manifest import decode, encode

    known, known_digest = None, ""
    if folder is None and record is not None:
        known_digest = str(record["manifest"])
        with contextlib.suppress(Integrity):  # a damaged one is made again
            known = decode((manifests / known_digest).read_bytes(), known_digest, local=True)
    try:
        digest, data = encode(_described_within(limit_s if known is None else known_limit_s, url, known))
    except LazyfsError as error:
        # As of an engine alone, whose cache of the hub serves when the hub does not answer.
        if known is None or not (isinstance(error, Temporary) or error.code == "offline"):
            raise
        log.warning("%s is shown as it was when it last answered: %s: %s", shown_url(url), error.code, error)
        return known_digest
    decode(data, digest, local=True)  # An object may have a name that no file can have.
    write_atomic(manifests / digest, data)
    if folder is None:
        _save(record_file, _record(Path("/"), f"source:{url}", digest, []))
    elif stats is not None and stats == _stats(folder):
        _save(record_file, _record(folder, f"source:{url}", digest, stats))
    return digest


def _described_within(limit_s: float | None, url: str, known: Manifest | None) -> Manifest:
    """Return what `describe` returns. Raises Temporary (source-silent) after `limit_s` seconds; None: no limit."""
    from lazyfs.content.read_through import describe

    if limit_s is None:
        return describe(url, known)
    import queue
    import threading

    answer: queue.SimpleQueue[Manifest | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(describe(url, known))
        except Exception as error:  # noqa: BLE001 - the caller raises it
            answer.put(error)

    # Its requests end by limits of their own, each of which may be a minute.
    threading.Thread(target=ask, name="describe", daemon=True).start()
    try:
        found = answer.get(timeout=limit_s)
    except queue.Empty:
        raise Temporary(
            f"{shown_url(url)} gave no list of its files within {limit_s:g} s", code="source-silent"
        ) from None
    if isinstance(found, Exception):
        raise found
    return found


def _is_fixed(url: str) -> bool:
    """Return whether what a URL names never changes: a commit of the hub, an artifact by its digest."""
    scheme, version = url.partition("://")[0], url.rpartition("@")[2]
    return (scheme == "hf" and is_commit(version)) or (scheme == "oci" and version.startswith("sha256:"))


def source_folder(cache: Path) -> Path:
    """Return the folder of the manifests of read-through sources."""
    return cache / "sources"


def _record(path: Path, store: str, digest: str, stats: list[list[Any]]) -> dict[str, Any]:
    return {"format": _FORMAT, "path": str(path), "store": without_user(store), "manifest": digest, "stats": stats}


def _import(
    path: Path,
    url: str,
    record_file: Path,
    tag: str | None,
    progress: Callable[[Progress], None] | None,
    zstd: int | str | None,
) -> str:
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.content.importer import import_tree, walk
    from lazyfs.stores import open_store

    listing = walk(path)
    newest = max((st.st_ctime for _, _, st in listing.files), default=0.0)
    if newest <= time.time():
        time.sleep(max(0.0, min(_GRANULE_S, newest + _GRANULE_S - time.time())))
    before = _stats(path)
    digest, _ = import_tree(path, ChunkStore(open_store(url), zstd=zstd), progress=progress, listing=listing)
    if tag is not None:
        set_tag(url, tag, digest)
    # After a clock was set back, ctimes prove nothing: record no stats, so that every call reads again.
    if before is not None and before == _stats(path) and newest <= time.time():
        _save(record_file, _record(path, url, digest, before))
    return digest


def set_tag(url: str, tag: str, digest: str) -> None:
    """Let a tag (`name:tag`, `latest` unless given) of the store at `url` name a manifest. Raises what the store raises."""
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.stores import open_store
    from lazyfs.stores.retry import RetryPolicy, retrying

    chunks, name = ChunkStore(open_store(url)), tag if ":" in tag else f"{tag}:latest"
    try:
        # Another host may have moved the tag since, so read it each time.
        if retrying(lambda: chunks.get_ref("tags", name), RetryPolicy()) == digest:
            return
    except (NotFound, Integrity):
        pass
    retrying(lambda: chunks.set_ref("tags", name, digest), RetryPolicy())


def _still_stored(url: str, digest: str, thorough: bool) -> bool:
    if thorough:
        from lazyfs.admin.listing import complete
        from lazyfs.content.chunk_store import ChunkStore
        from lazyfs.stores import open_store

        return complete(ChunkStore(open_store(url)), digest)
    folder = local_path(url)
    # Do not query a remote store: that would add a round trip to every start, and a mount reports missing manifests clearly.
    return folder is None or (folder / "manifests" / digest).exists()


def _stats(root: Path) -> list[list[Any]] | None:
    """Return a sorted list of [relative path, size, mtime_ns, ctime_ns, inode, mode, link target]; None on any error."""
    out: list[list[Any]] = []

    def visit(folder: str, prefix: str, depth: int) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    st = entry.stat()
                except OSError:
                    if not entry.is_symlink():
                        raise
                    st = entry.stat(follow_symlinks=False)  # The link dangles; the import keeps it as it is.
                directory = stat.S_ISDIR(st.st_mode)
                target = str(Path(entry.path).readlink()) if entry.is_symlink() else ""
                size, mtime, ctime = (0, 0, 0) if directory else (st.st_size, st.st_mtime_ns, st.st_ctime_ns)
                out.append([prefix + entry.name, size, mtime, ctime, st.st_ino, st.st_mode, target])
                if directory and depth < 64:
                    visit(entry.path, f"{prefix}{entry.name}/", depth + 1)

    try:
        visit(str(root), "", 0)
    except OSError:
        # The import walks again and raises the error.
        return None
    return sorted(out)


def _record_file(path: Path, url: str) -> Path:
    import hashlib

    name = hashlib.blake2b(f"{path}\0{without_user(url)}".encode(), digest_size=16).hexdigest()
    return state_dir("index") / f"{name}.json"


def _load(record_file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(record_file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    known = isinstance(record, dict) and record.get("format") == _FORMAT
    return record if known and {"manifest", "stats", "path"} <= record.keys() else None


def _save(record_file: Path, record: dict[str, Any]) -> None:
    try:
        # No fsync: a lost record costs one more import, and a torn one does not parse.
        write_atomic(record_file, json.dumps(record).encode(), sync=False)
    except LazyfsError:
        # The import itself succeeded; without the record the next one only takes longer.
        record_file.unlink(missing_ok=True)


def origins(digest: str, url: str) -> dict[str, tuple[str, list[int]]]:
    """Return the unchanged originals of a manifest imported on this host.

    Format: path in the manifest → (original file, [size, mtime_ns, ctime_ns, inode]).
    """
    found: dict[str, tuple[str, list[int]]] = {}
    for record_file in state_dir("index").glob("*.json"):
        record = _load(record_file)
        if record is not None and record["manifest"] == digest and record.get("store") == without_user(url):
            files = {s[0]: (f"{record['path']}/{s[0]}", s[1:5]) for s in record["stats"] if stat.S_ISREG(s[5])}
            found |= {path: origin for path, origin in files.items() if is_unchanged(*origin)}
    return found


def is_unchanged(path: str, stats: list[int]) -> bool:
    """Return whether the file still has the size, mtime, ctime and inode recorded at import."""
    try:
        return fingerprint(Path(path).stat()) == stats
    except OSError:
        return False
