"""Getting a mount's manifest: from the copy beside the cache if there is one, else from the store (and then copied)."""

from __future__ import annotations

from pathlib import Path

from lazyfs.chunkstore import ChunkStore
from lazyfs.config import MountConfig
from lazyfs.directory import is_unchanged, origins
from lazyfs.errors import Integrity, LazyfsError
from lazyfs.manifest import Manifest, decode, encode
from lazyfs.paths import private_dir, write_atomic
from lazyfs.retry import RetryPolicy, certain, retrying
from lazyfs.stores import open_store
from lazyfs.urls import local_path


def load_manifest(config: MountConfig) -> Manifest:
    """The manifest, verified. NotFound, Integrity (of two fetches), or what the store raises after retries."""
    copy = Path(config.cache_dir) / "manifests" / config.manifest
    try:
        return decode(copy.read_bytes(), config.manifest)
    except FileNotFoundError:
        pass
    except Integrity:
        copy.unlink(missing_ok=True)
    chunks = ChunkStore(open_store(config.store_url))
    policy = RetryPolicy(limit=config.fetch_limit_s)
    manifest = certain(lambda: retrying(lambda: chunks.get_manifest(config.manifest), policy))
    try:
        private_dir(copy.parent)
        write_atomic(copy, encode(manifest)[1], sync=False)
    except LazyfsError:
        # A full or read-only disk costs the next mount a round trip, nothing more.
        copy.unlink(missing_ok=True)
    return manifest


def source_origins(manifest: Manifest) -> dict[str, tuple[str, list[int]]]:
    """Where the unchanged files of a local source lie, for reading them in place; empty for a remote one."""
    folder = local_path(manifest.source) if manifest.source else None
    if folder is None:
        return {}
    files = {f.path: (str(folder / f.path), [int(x) for x in f.version.split("-")]) for f in manifest.files}
    return {path: origin for path, origin in files.items() if is_unchanged(*origin)}


def origins_of(config: MountConfig, manifest: Manifest) -> dict[str, tuple[str, list[int]]]:
    """Files that may be read where they were imported from (or, for a local source, where they are)."""
    if not config.use_origin:
        return {}
    if manifest.kind == "source":
        return source_origins(manifest)
    return origins(config.manifest, config.store_url)
