"""Read and write chunks, manifests and refs in a store: the content-addressed layer shared by weights and snapshots.

    chunks/ab/<digest>        plain bytes           manifests/<digest>   a manifest, named by its own digest
    chunks/ab/<digest>.zst    the same, zstd        refs/<kind>/<name>   the digest of a manifest, by name
                                                    signatures/<digest>  who has signed a manifest (`lazyfs.signing`)

A digest is the BLAKE3 of the *plain* bytes, in hex. `get` never returns bytes that do not hash to the requested digest.
A manifest is written after all its chunks, so every manifest in a store is complete. Ref kinds in use: `tags` (name:tag of
weights) and `snapshots`. A chunk that no manifest in the store mentions is garbage.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import blake3
import msgspec
import zstandard

from lazyfs.content.chunking import MAX_CHUNK
from lazyfs.content.manifest import RAW, ZSTD, Chunk, Manifest, decode, encode, is_digest
from lazyfs.content.records import ready
from lazyfs.errors import Busy, Integrity, NotFound, Permanent, Usage
from lazyfs.stores.base import ObjectInfo, Store
from lazyfs.stores.retry import RetryPolicy, retrying

_REF = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,127})*(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?"
)
# Compress a chunk only if a sample shrinks below this ratio. Decompression costs a core about a second per GB: a network
# repays that from 20 % savings on, a local disk hardly ever.
COMPRESS_BELOW_REMOTE, COMPRESS_BELOW_LOCAL = 0.80, 0.50
_SAMPLE = 256 << 10
# Largest accepted zstd window: memory that decompression needs besides the output, in bytes.
_WINDOW = 8 << 20
# An import touches existing objects older than half of this, so that a concurrent garbage collection spares them.
GRACE_S = 24 * 3600.0
# `lazyfs.admin.gc` writes this object in a remote store while it runs. A collection silent for _GC_SILENT_S counts as
# dead. _SKEW_S allows for clock differences between hosts and stores.
GC_MARK = "gc/last"
_GC_SILENT_S, _GC_WAIT_S, _SKEW_S = 120.0, 120.0, 300.0
# Concurrent HEAD requests to a remote store: each one is all round trip.
HEADS = 32
# Largest file of signatures, in bytes.
SIGNATURES = 1 << 16
# A signer that holds the lock of a manifest for longer was killed.
_SIGNING_S = 15.0
_local = threading.local()


@dataclass(frozen=True)
class PutResult:
    """Result of `put_chunk`. `stored`: bytes written, 0 if the store already had the chunk."""

    chunk: Chunk
    stored: int


def digest_of(data: bytes | memoryview) -> str:
    """Return the BLAKE3 digest of `data` in hex."""
    return blake3.blake3(data).hexdigest()


@functools.lru_cache(maxsize=256)
def zero_digest(length: int) -> str:
    """Return the digest of `length` zero bytes (a hole in a sparse file)."""
    return digest_of(bytes(length))


def _compressor(level: int) -> zstandard.ZstdCompressor:
    # Compressors are not thread-safe, and creating one costs more than compressing a small chunk.
    made: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in made:
        made[level] = zstandard.ZstdCompressor(level=level, write_content_size=True)
    return made[level]


def chunk_key(digest: str, encoding: int = RAW) -> str:
    """Return the object key of the chunk in that encoding."""
    return f"chunks/{digest[:2]}/{digest}" + (".zst" if encoding == ZSTD else "")


def mismatch(data: bytes | memoryview, digest: str, length: int) -> str:
    """Return a message that says why `data` is not the chunk of that digest and length."""
    if len(data) != length:
        return f"{len(data)} bytes instead of {length}"
    return f"hashes to {digest_of(data)[:12]} instead of {digest[:12]}"


class _Mark(msgspec.Struct, frozen=True):
    """Progress of a garbage collection: the number of the current batch, and whether the collection is running."""

    batch: int = 0
    running: bool = False


class ChunkStore:
    """Chunk API over a `Store`.

    `zstd`: "auto" compresses a chunk where a sample shows that it pays, None never compresses, a number always compresses
    at that level (1 to 19). Raises Usage for any other value.
    """

    def __init__(self, store: Store, *, zstd: int | str | None = "auto") -> None:
        if not (zstd is None or zstd == "auto" or (isinstance(zstd, int) and 1 <= zstd <= 19)):
            raise Usage(f"zstd must be 'auto', None or a level from 1 to 19, not {zstd!r}")
        self.store = store
        self.zstd = zstd
        self._since = time.time()

    # -- chunks

    def put(self, data: bytes | memoryview) -> str:
        """Store one chunk unless the store has it; return its digest."""
        return self.put_chunk(data).chunk.digest

    def put_chunk(self, data: bytes | memoryview, digest: str | None = None) -> PutResult:
        """Store one chunk like `put`; return its encoding and the bytes written too.

        `digest` skips hashing when the caller knows it. Raises Usage for a chunk of more than MAX_CHUNK bytes.
        """
        length = len(data)
        if length > MAX_CHUNK:
            raise Usage(f"a chunk has at most {MAX_CHUNK} bytes, not {length}; split it")
        digest = digest or digest_of(data)
        for encoding in (RAW, ZSTD):
            info = self._stored_intact(digest, length, encoding)
            if info is not None and self._kept(info):
                return PutResult(Chunk(digest, length, encoding), 0)
        encoding, body = self._encode(data)
        self.store.put(chunk_key(digest, encoding), body)
        return PutResult(Chunk(digest, length, encoding), len(body))

    def _kept(self, info: ObjectInfo) -> bool:
        """Touch an object if it is old; return False if a collection has just removed it."""
        try:
            if time.time() - info.modified > GRACE_S / 2:
                self.store.touch(info.key)
        except NotFound:
            return False
        return True

    def _encode(self, data: bytes | memoryview) -> tuple[int, bytes | memoryview]:
        if self.zstd is None:
            return RAW, data
        if isinstance(self.zstd, int):
            body = _compressor(self.zstd).compress(data)
            return (ZSTD, body) if len(body) < len(data) else (RAW, data)
        pays = COMPRESS_BELOW_REMOTE if self.store.remote else COMPRESS_BELOW_LOCAL
        sample = memoryview(data)[:_SAMPLE]
        if len(sample) < 512 or len(_compressor(1).compress(sample)) > pays * len(sample):
            return RAW, data
        body = _compressor(1).compress(data)
        return (ZSTD, body) if len(body) <= pays * len(data) else (RAW, data)

    def get(self, digest: str, length: int | None = None, encoding: int = RAW) -> bytes:
        """Return the plain bytes of a chunk, verified.

        `encoding` is tried first, then the other one. Without `length` the chunk may have up to MAX_CHUNK bytes. Raises
        Usage (malformed digest), NotFound, Integrity, or what the store raises.
        """
        if not is_digest(digest):
            raise Usage(f"{digest!r} is not a chunk digest")
        for form in (encoding, ZSTD if encoding == RAW else RAW):
            try:
                body = self.body(digest, form)
            except NotFound:
                continue
            data = self.decode(digest, body, form, length)
            if digest_of(data) != digest:
                raise Integrity(
                    f"chunk {digest[:12]} in {self.store.url} does not match its digest; "
                    "`quickthaw weights verify --repair` on that store removes it, and the next import or push writes it again"
                )
            return bytes(data) if isinstance(data, memoryview) else data
        raise NotFound(f"chunk {digest[:12]} is not in {self.store.url}")

    def body(self, digest: str, encoding: int, into: memoryview | None = None) -> bytes | memoryview:
        """Return a chunk as it is stored, not verified; `into` as in `Store.get`.

        Raises NotFound, Integrity (too-large) for a body longer than any chunk's, or what the store raises.
        """
        try:
            # A compressed body is stored only if it is smaller than the plain one.
            return self.store.get(chunk_key(digest, encoding), into=into, limit=MAX_CHUNK)
        except Permanent as error:
            if error.code != "too-large":
                raise
            raise Integrity(f"chunk {digest[:12]}: {error}", code=error.code) from error

    @staticmethod
    def decode(digest: str, body: bytes | memoryview, encoding: int, length: int | None) -> bytes | memoryview:
        """Decode a stored chunk and check its length (up to MAX_CHUNK bytes if `length` is None).

        Raises Integrity if the body does not decompress or has the wrong length.
        """
        if encoding == ZSTD:
            limit = MAX_CHUNK if length is None else length
            try:
                # zstandard trusts the size stated in the frame and allocates that much, whatever the limit.
                stated = zstandard.frame_content_size(body)
                if stated > limit:
                    raise Integrity(f"chunk {digest[:12]} claims to decompress to {stated} bytes, more than {limit}")
                body = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompress(body, max_output_size=limit)
            except zstandard.ZstdError as error:
                raise Integrity(f"chunk {digest[:12]} does not decompress: {error}") from error
        if length is None and len(body) > MAX_CHUNK:
            raise Integrity(f"chunk {digest[:12]} has {len(body)} bytes, more than the maximum of {MAX_CHUNK}")
        if length is not None and len(body) != length:
            raise Integrity(f"chunk {digest[:12]} has {len(body)} bytes instead of {length}")
        return body

    def has(self, digest: str, length: int) -> bool:
        """Return whether the store has the chunk in any encoding, with a plausible size.

        Does not read its bytes.
        """
        return any(self._stored_intact(digest, length, encoding) is not None for encoding in (RAW, ZSTD))

    def _stored_intact(self, digest: str, length: int, encoding: int) -> ObjectInfo | None:
        info = self.store.head(chunk_key(digest, encoding))
        # A power cut leaves objects of a wrong size: treat them as missing.
        right = info is not None and info.size > 0 and (encoding == ZSTD or info.size == length)
        return info if right else None

    # -- manifests

    def put_manifest(self, manifest: Manifest) -> str:
        """Flush the chunks, then write the manifest; return its digest.

        Raises Busy (collected-meanwhile) if a garbage collection of a remote store deleted one of its chunks; the manifest
        is then not stored. Remedy: store everything again. Raises Busy (store-busy) if a running collection makes no
        progress.
        """
        digest, data = encode(manifest)
        self.store.flush()
        key = f"manifests/{digest}"
        try:
            there = bytes(self.store.get(key))
        except NotFound:
            there = None
        # The manifest has no ref yet: one that is there is touched, or a collection deletes old manifests without a ref.
        info = self.store.head(key) if there == data else None
        was_there = info is not None and self._kept(info)
        if not was_there:
            self.store.put(key, data)
            self.store.flush()
        if self.store.remote:
            self._check_not_collected(manifest, key, data, was_there=was_there)
        return digest

    def _check_not_collected(self, manifest: Manifest, key: str, data: bytes, *, was_there: bool) -> None:
        """Check that no chunk was deleted while the manifest was written, and write it again if it was itself.

        Costs one HEAD request unless a garbage collection has run since this object was created.
        """
        mark = self.store.head(GC_MARK)
        if mark is None or mark.modified < self._since - _SKEW_S:
            return
        self._await_collection(mark)
        if self.store.head(key) is None:  # it was old, had no name, and was deleted just before it was touched
            self.store.put(key, data)
            was_there = False
        lengths = {c.digest: c.length for f in manifest.files for c in f.chunks}
        with ThreadPoolExecutor(HEADS) as pool:
            there = pool.map(lambda item: retrying(lambda: self.has(*item), RetryPolicy()), lengths.items())
            lost = sum(not found for found in there)
        if lost:
            if not was_there:
                self.store.delete(key)
            raise Busy(
                f"a garbage collection of {self.store.url} deleted {lost} chunks of this import; import or push again",
                code="collected-meanwhile",
            )

    def _await_collection(self, mark: ObjectInfo) -> None:
        """Wait until a running collection has begun another batch, which sees the new manifest.

        Raises Busy (store-busy) after two minutes.
        """
        first, deadline = self._mark(), time.monotonic() + _GC_WAIT_S
        now = first
        while now.running and now == first and time.time() - mark.modified < _GC_SILENT_S:
            if time.monotonic() > deadline:
                raise Busy(f"a garbage collection is running on {self.store.url}; try again later", code="store-busy")
            time.sleep(0.2)
            now, mark = self._mark(), self.store.head(GC_MARK) or mark

    def _mark(self) -> _Mark:
        try:
            return msgspec.json.decode(self.store.get(GC_MARK), type=ready(_Mark))
        except (NotFound, msgspec.DecodeError):
            return _Mark()

    def sign_manifest(self, digest: str, sign: Callable[[bytes], bytes]) -> None:
        """Add a signature of a stored manifest (`lazyfs.signing.signer`); those of others stay.

        Raises NotFound, Integrity (the stored manifest is damaged), or what the store raises.
        """
        manifest = encode(self.get_manifest(digest))[1]
        line = sign(manifest)
        with self._signing(digest):
            before = self.signatures(digest) or b""
            kept = [one for one in before.splitlines(keepends=True) if one.split()[1:2] != line.split()[1:2]]
            self.store.put(f"signatures/{digest}", b"".join([*kept, line]))

    @contextlib.contextmanager
    def _signing(self, digest: str) -> Iterator[None]:
        """Keep other signers of the manifest out: the file of signatures is read and written."""
        key, owner = f"locks/signing-{digest}", secrets.token_bytes(16)
        seen, since = b"", time.monotonic()
        while not self.store.create(key, owner):
            with contextlib.suppress(NotFound):
                held_by = bytes(self.store.get(key, limit=1024))
                if held_by != seen:
                    seen, since = held_by, time.monotonic()
            if time.monotonic() - since > _SIGNING_S:
                self.store.delete(key)  # of a signer that was killed
                since = time.monotonic()
            time.sleep(random.uniform(0.02, 0.1))
        try:
            yield
        finally:
            with contextlib.suppress(NotFound):  # this signer took so long that another one removed it
                if bytes(self.store.get(key, limit=1024)) == owner:
                    self.store.delete(key)

    def signatures(self, digest: str) -> bytes | None:
        """Return the signatures of a manifest, or None."""
        try:
            return bytes(self.store.get(f"signatures/{digest}", limit=SIGNATURES))
        except NotFound:
            return None

    def get_manifest(self, digest: str) -> Manifest:
        """Return the manifest, verified.

        Raises NotFound, Integrity, or Permanent (not-a-store) if the server answers with a web page.
        """
        try:
            data = bytes(self.store.get(f"manifests/{digest}"))
        except NotFound:
            raise NotFound(f"no manifest {digest[:12]} in {self.store.url}; {self._hint()}") from None
        if self.store.remote and data.lstrip()[:1] == b"<":
            raise Permanent(
                f"{self.store.url} answers with a web page instead of manifest {digest[:12]}; check the store URL",
                code="not-a-store",
            )
        return decode(data, digest)

    def delete_manifest(self, digest: str) -> None:
        """Remove a manifest, and what has signed it: `signatures/` of weights, `.sig` of a snapshot's archive."""
        for key in (f"manifests/{digest}", f"signatures/{digest}", f"manifests/{digest}.sig"):
            self.store.delete(key)

    def has_manifest(self, digest: str) -> bool:
        return self.store.head(f"manifests/{digest}") is not None

    def manifests(self) -> Iterator[str]:
        """Yield the digests of all manifests in the store."""
        for info in self.store.list("manifests/"):
            name = info.key.removeprefix("manifests/")
            if is_digest(name):
                yield name

    # -- refs

    def set_ref(self, kind: str, name: str, digest: str) -> None:
        """Point the ref `name` at a manifest. Raises Usage if the name does not have the form a/b:tag."""
        self._check_ref(kind, name)
        body = msgspec.json.encode({"manifest": digest, "at": int(time.time())})
        self.store.put(self.ref_key(kind, name), body)
        self.store.flush()

    def get_ref(self, kind: str, name: str) -> str:
        """Return the manifest digest that the ref points at.

        Raises NotFound, or Integrity for a damaged ref.
        """
        self._check_ref(kind, name)
        try:
            body = msgspec.json.decode(self.store.get(self.ref_key(kind, name)), type=dict[str, str | int])
        except NotFound:
            raise NotFound(f"no {kind.removesuffix('s')} named {name!r} in {self.store.url}") from None
        except msgspec.DecodeError as error:
            raise Integrity(self._damaged_ref(kind, name, str(error))) from error
        digest = body.get("manifest")
        if not isinstance(digest, str) or not is_digest(digest):
            raise Integrity(self._damaged_ref(kind, name, "it does not name a manifest"))
        return digest

    def delete_ref(self, kind: str, name: str) -> None:
        self._check_ref(kind, name)
        self.store.delete(self.ref_key(kind, name))

    def refs(self, kind: str) -> Iterator[tuple[str, str]]:
        """Yield (name, manifest digest) for every ref of a kind. Raises Integrity at a damaged ref."""
        for name in self.ref_names(kind):
            yield name, self.get_ref(kind, name)

    def ref_names(self, kind: str) -> Iterator[str]:
        """Yield the names of all refs of a kind, including damaged ones."""
        prefix = f"refs/{kind}/"
        for info in self.store.list(prefix):
            yield info.key.removeprefix(prefix).replace("@", ":")

    def resolve(self, name: str) -> str:
        """Return the manifest digest for a digest, a unique digest prefix (8 hex digits or more), a tag or a snapshot name.

        Raises NotFound, or Usage for an ambiguous prefix.
        """
        if is_digest(name):
            return name
        if re.fullmatch(r"[0-9a-f]{8,63}", name):
            found = [d for d in self.manifests() if d.startswith(name)]
            if len(found) == 1:
                return found[0]
            if found:
                raise Usage(f"{name!r} matches {len(found)} manifests; give more digits")
        for kind, full in (("tags", name if ":" in name else f"{name}:latest"), ("snapshots", name)):
            try:
                return self.get_ref(kind, full)
            except (NotFound, Usage):
                continue
        if re.fullmatch(r"[0-9a-f]{1,7}", name):
            raise NotFound(f"no tag {name!r} in {self.store.url}; a digest prefix needs at least 8 digits")
        raise NotFound(f"no manifest, tag or snapshot {name!r} in {self.store.url}; {self._hint()}")

    def _hint(self) -> str:
        if self.store.url.startswith("http"):
            return "an HTTP store cannot be listed: give a tag, or the whole digest that the import printed"
        return "`quickthaw weights ls` lists its manifests"

    @staticmethod
    def _damaged_ref(kind: str, name: str, why: str) -> str:
        return f"the {kind.removesuffix('s')} {name!r} is damaged: {why}; `quickthaw weights rm {name}` removes it"

    @staticmethod
    def ref_key(kind: str, name: str) -> str:
        """Return the object key of a ref."""
        # ":" is not allowed in file names everywhere; no ref name contains "@".
        return f"refs/{kind}/{name.replace(':', '@')}"

    @staticmethod
    def _check_ref(kind: str, name: str) -> None:
        if not re.fullmatch(r"[a-z]{1,32}", kind) or not _REF.fullmatch(name) or ".." in name:
            raise Usage(f"{name!r} is not a name: use letters, digits, '.', '_', '-', '/', with an optional ':tag'")
