"""The manifest: one directory as an immutable document, named by the BLAKE3 digest of its own bytes.

It holds paths, modes, sizes, symbolic links and, for each file, its chunks in order. Times and owners are left out, so
equal content has an equal digest on every host. `decode` rejects whatever a hostile document could abuse: paths and links
that lead out of the tree, duplicate names, sizes that do not add up, oversized chunks, and sources to read in place, which
only this host may name.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from typing import Literal

import blake3
import msgspec

from lazyfs.content.chunking import MAX_CHUNK
from lazyfs.content.records import ready
from lazyfs.errors import Integrity

VERSION: Literal[1] = 1
RAW, ZSTD = 0, 1
# Same limit as the kernel's.
_MAX_LINKS = 40


class Chunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One chunk of a file.

    `digest`: BLAKE3 of the plain bytes in hex, or "" if not known yet (read-through). `length`: plain bytes. `encoding`:
    how the importer stored it; a reader falls back to the other encoding.
    """

    digest: str
    length: int
    encoding: int = RAW


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """A regular file. `version`, set for read-through sources only, is the source's validator: it changes with the content."""

    path: str
    mode: int
    size: int
    chunks: tuple[Chunk, ...] = ()
    version: str = ""

    @functools.cached_property
    def digest(self) -> str:
        """Content digest: BLAKE3 over the chunk list (and the version, when chunk digests are unknown)."""
        h = blake3.blake3(b"quickthaw file 1\0")
        h.update(self.version.encode())
        for chunk in self.chunks:
            h.update(f"\0{chunk.digest}:{chunk.length}".encode())
        return h.hexdigest()

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Offset of each chunk in the file, with the file size as the last element."""
        at, out = 0, [0]
        for chunk in self.chunks:
            at += chunk.length
            out.append(at)
        return tuple(out)

    def chunk_range(self, offset: int, end: int) -> range:
        """Return the indexes of the chunks that hold the bytes from `offset` to `end`, which is greater."""
        return range(bisect_right(self.offsets, offset) - 1, bisect_right(self.offsets, end - 1))


class Symlink(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    target: str


class Directory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    mode: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One directory tree.

    `kind`: `weights`, `snapshot`, or `source` (read-through of `source`). `meta`: free-form string pairs set by the writer.
    """

    version: Literal[1]
    kind: str
    directories: tuple[Directory, ...]
    files: tuple[File, ...]
    symlinks: tuple[Symlink, ...]
    meta: dict[str, str] = {}
    source: str = ""

    @property
    def size(self) -> int:
        """Total bytes of all files."""
        return sum(f.size for f in self.files)

    def chunk_digests(self) -> set[str]:
        """Return the digests of all chunks that this manifest needs."""
        return {c.digest for f in self.files for c in f.chunks if c.digest}


def encode(manifest: Manifest) -> tuple[str, bytes]:
    """Return the manifest's digest (hex) and its encoded bytes."""
    data = msgspec.json.encode(manifest, order="deterministic")
    return blake3.blake3(data).hexdigest(), data


def decode(data: bytes, digest: str, *, local: bool = False) -> Manifest:
    """Decode and validate the manifest in `data`.

    Raises Integrity if it does not match `digest` or is malformed. `local`: this host wrote the manifest, so it may
    describe a source that is read in place. A manifest from a store may not (Integrity, foreign-source): it could make the
    daemon open any file or URL with the daemon's credentials.
    """
    if blake3.blake3(data).hexdigest() != digest:
        raise Integrity(f"manifest {digest[:12]} does not match its digest; fetch or import it again")
    try:
        manifest = msgspec.json.decode(data, type=ready(Manifest))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Integrity(f"manifest {digest[:12]} is malformed: {error}") from error
    _check(manifest, digest)
    if not local and is_source(manifest):
        raise Integrity(
            f"manifest {digest[:12]} names a source to read in place, which a manifest from a store must not; mount the source itself",
            code="foreign-source",
        )
    return manifest


def is_source(manifest: Manifest) -> bool:
    """Return whether any byte is read, unverified, from a source in place instead of from chunks of a store."""
    return (
        manifest.kind == "source"
        or bool(manifest.source)
        or any(f.version or any(not c.digest for c in f.chunks) for f in manifest.files)
    )


def _check(manifest: Manifest, digest: str) -> None:
    directories = {""} | {d.path for d in manifest.directories}
    seen: set[str] = set()
    paths = [d.path for d in manifest.directories]
    paths += [f.path for f in manifest.files] + [s.path for s in manifest.symlinks]
    for path in paths:
        parts = path.split("/")
        parent = "/".join(parts[:-1])
        if any(p in ("", ".", "..") or "\0" in p for p in parts) or path in seen or parent not in directories:
            raise Integrity(f"manifest {digest[:12]} has a bad path: {path!r}")
        seen.add(path)
    modes = [d.mode for d in manifest.directories] + [f.mode for f in manifest.files]
    if any(not 0 <= mode <= 0o7777 for mode in modes):
        raise Integrity(f"manifest {digest[:12]} has an invalid mode")
    for file in manifest.files:
        if file.size != file.offsets[-1] or any(c.length <= 0 for c in file.chunks):
            raise Integrity(f"manifest {digest[:12]}: the chunks of {file.path} do not add up to its size")
        if any(c.length > MAX_CHUNK for c in file.chunks):
            raise Integrity(f"manifest {digest[:12]}: {file.path} has a chunk of more than {MAX_CHUNK} bytes")
        if any(c.digest and not is_digest(c.digest) for c in file.chunks):
            raise Integrity(f"manifest {digest[:12]}: {file.path} has a malformed chunk digest")
    if any(not s.target or "\0" in s.target or len(s.target) > 4095 for s in manifest.symlinks):
        raise Integrity(f"manifest {digest[:12]} has an invalid link target")
    # Snapshots of process trees hold whatever links their programs made: those are validated where they are mounted or written.
    if manifest.kind in ("weights", "source"):
        reject_escaping_links(manifest, digest)


def reject_escaping_links(manifest: Manifest, digest: str) -> None:
    """Raise Integrity (link-out) if a symbolic link leads out of the tree, directly or through other links."""
    links = {s.path: s.target for s in manifest.symlinks}
    for path, target in links.items():
        if _escapes(path, links):
            raise Integrity(
                f"manifest {digest[:12]}: the link {path} leads out of the tree, to {target}",
                code="link-out",
            )


def _escapes(path: str, links: Mapping[str, str]) -> bool:
    at = path.split("/")[:-1]
    rest, followed = deque([path.rpartition("/")[2]]), 0
    while rest:
        part = rest.popleft()
        if part == "..":
            if not at:
                return True
            at.pop()
        elif part not in ("", "."):
            at.append(part)
            target = links.get("/".join(at))
            if target is None:
                continue
            followed += 1
            if followed > _MAX_LINKS:
                # Possibly circular: the kernel gives up as well.
                return False
            if target.startswith("/"):
                return True
            at.pop()
            rest.extendleft(reversed(target.split("/")))
    return False


def is_digest(text: str) -> bool:
    """Return whether `text` is a BLAKE3 digest in lower-case hex."""
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)
