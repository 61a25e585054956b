"""Load a mount's manifest from the copy beside the cache, or else from the store, and copy it there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.manifest import Manifest, decode, encode, reject_escaping_links
from lazyfs.content.stat_index import is_unchanged, origins, source_folder
from lazyfs.errors import Integrity, LazyfsError, Usage
from lazyfs.mount.config import MountConfig
from lazyfs.paths import private_dir, write_atomic
from lazyfs.stores import open_store
from lazyfs.stores.retry import RetryPolicy, retry_damaged, retrying
from lazyfs.stores.urls import local_path, shown_url


def load_manifest(config: MountConfig) -> Manifest:
    """Load and verify the manifest.

    Raises NotFound, Integrity (after two fetches; or signature-missing, signature-wrong), or what the store raises after
    retries. Only this host may name sources that are read in place: their manifests are in a folder that holds nothing from
    a store.
    """
    with contextlib.suppress(FileNotFoundError):
        own = source_folder(Path(config.cache_dir)) / config.manifest
        manifest = decode(own.read_bytes(), config.manifest, local=True)
        _used(own)
        if config.trust_keys:
            raise Integrity(
                f"{shown_url(manifest.source)} is read in place, which nobody signs; import it with --sign-key, or leave out --trust-key",
                code="signature-missing",
            )
        return manifest
    manifest = _from_cache_or_store(config)
    if config.trust_keys:
        _check_signature(config, manifest)
    reject_escaping_links(manifest, config.manifest)
    return manifest


def _check_signature(config: MountConfig, manifest: Manifest) -> None:
    """Raise Integrity unless a trusted key signed the manifest. What the store says is kept beside the manifest's copy."""
    from lazyfs.signing import check

    copy = Path(config.cache_dir) / "manifests" / f"{config.manifest}.sig"
    data, trusted = encode(manifest)[1], [Path(key) for key in config.trust_keys]
    with contextlib.suppress(FileNotFoundError, Integrity):
        check(data, copy.read_bytes(), trusted)
        return
    chunks = ChunkStore(open_store(config.store_url))
    found = retrying(lambda: chunks.signatures(config.manifest), RetryPolicy(limit=config.fetch_limit_s))
    check(data, found, trusted, what=f"manifest {config.manifest[:12]}", again="import it again with --sign-key")
    with contextlib.suppress(LazyfsError):  # a full or read-only disk only costs the next mount a round trip
        write_atomic(copy, found or b"", sync=False)


def _from_cache_or_store(config: MountConfig) -> Manifest:
    copy = Path(config.cache_dir) / "manifests" / config.manifest
    try:
        found = decode(copy.read_bytes(), config.manifest)
        _used(copy)
        return found
    except FileNotFoundError:
        pass
    except Integrity:
        copy.unlink(missing_ok=True)
    chunks = ChunkStore(open_store(config.store_url))
    policy = RetryPolicy(limit=config.fetch_limit_s)
    manifest = retry_damaged(lambda: retrying(lambda: chunks.get_manifest(config.manifest), policy))
    try:
        private_dir(copy.parent)
        write_atomic(copy, encode(manifest)[1], sync=False)
    except LazyfsError:
        # A full or read-only disk only costs the next mount a round trip.
        copy.unlink(missing_ok=True)
    return manifest


def _used(record: Path) -> None:
    """Note that a manifest's copy was used: `lazyfs.admin.records` removes what was not for a month."""
    with contextlib.suppress(OSError):
        os.utime(record)


def source_origins(manifest: Manifest) -> dict[str, tuple[str, list[int]]]:
    """Return the unchanged files of a local source, to be read in place; empty for a remote source."""
    folder = local_path(manifest.source) if manifest.source else None
    if folder is None:
        return {}
    files = {f.path: (str(folder / f.path), [int(x) for x in f.version.split("-")]) for f in manifest.files}
    return {path: origin for path, origin in files.items() if is_unchanged(*origin)}


def origins_of(config: MountConfig, manifest: Manifest) -> dict[str, tuple[str, list[int]]]:
    """Return the files that may be read at the place of their import (or, for a local source, where they are).

    Leaves out files below the mount itself: opening them, the daemon would wait for its own answer. Raises Usage
    (mount-over-source) if their bytes exist nowhere else.
    """
    if manifest.kind == "source":
        folder = local_path(manifest.source) if manifest.source else None
        if folder is not None:
            _not_covered(config, {str(folder / f.path) for f in manifest.files})
        return source_origins(manifest) if config.use_origin else {}
    if not config.use_origin:
        return {}
    found = origins(config.manifest, config.store_url)
    covered = _covered_by(config.mountpoint, {path for path, _ in found.values()})
    return {path: origin for path, origin in found.items() if origin[0] not in covered}


def check_not_covered(config: MountConfig) -> None:
    """Raise Usage (mount-over-source) if the mount would cover its store, its cache or its state, or a part of them.

    Mounting beside them is allowed: the launcher mounts below `mounts/` in the home folder, and a store may be in the
    folder above the mount point.
    """
    store, home = local_path(config.store_url), Path(config.home)
    parts = [Path(config.cache_dir), *(home / name for name in ("run", "index", "traces", "logs"))]
    if store is not None:
        parts += [store / name for name in ("chunks", "manifests", "refs", "traces")]
    _not_covered(config, {config.home, str(home / "mounts"), config.log_file, *map(str, parts)})
    for part in parts:
        if Path(config.mountpoint).is_relative_to(os.path.realpath(part)):
            raise _would_cover(config, f"a part of {part}")


def _not_covered(config: MountConfig, paths: set[str]) -> None:
    covered = _covered_by(config.mountpoint, paths)
    if covered:
        raise _would_cover(config, min(covered))


def _would_cover(config: MountConfig, what: str) -> Usage:
    return Usage(
        f"a mount at {config.mountpoint} would cover {what}, which it reads; choose another mount point",
        code="mount-over-source",
    )


def _covered_by(mountpoint: str, paths: set[str]) -> set[str]:
    """Return those of `paths` that are at or below the mount point, links followed.

    Resolves each folder once, not each file: a mount of thousands of files starts with this.
    """
    mount, found = Path(mountpoint), set()
    by_folder: dict[str, list[str]] = {}
    for path in paths:
        by_folder.setdefault(path.rpartition("/")[0] or "/", []).append(path)
    for folder, inside in by_folder.items():
        real = Path(os.path.realpath(folder))
        if real.is_relative_to(mount):
            found.update(inside)
            continue
        if real == mount.parent:
            found.update(path for path in inside if path.rpartition("/")[2] == mount.name)
        links = _links_in(folder)
        found.update(path for path in inside if path in links and Path(os.path.realpath(path)).is_relative_to(mount))
    return found


def _links_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.path for entry in entries if entry.is_symlink()}
    except OSError:
        # No file in it can be opened either.
        return set()
