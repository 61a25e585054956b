"""Chunks, manifests and refs over a store: the content-addressed layer that weights and snapshots share.

    chunks/ab/<digest>        plain bytes           manifests/<digest>   a manifest, named by its own digest
    chunks/ab/<digest>.zst    the same, zstd        refs/<kind>/<name>   the digest of a manifest, by name

A digest is BLAKE3 in hex of the *plain* bytes. `get` never returns bytes that do not hash to what was asked for. A
manifest is written after all its chunks; so whatever a reader can name is complete. Ref kinds in use: `tags` (name:tag
of weights) and `snapshots`. Garbage is a chunk that no manifest in the store mentions.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Iterator
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
# A chunk is compressed only if a sample of it shrinks below this: decompression costs a core about a second per GB,
# which a network repays from 20 % on and a local disk hardly ever.
PAYS_REMOTE, PAYS_LOCAL = 0.80, 0.50
_SAMPLE = 256 << 10
# Of a frame's window: memory that decompressing takes besides the output.
_WINDOW = 8 << 20
# What is met again by an import is made young when older than this, so that a collection running beside spares it.
GRACE_S = 24 * 3600.0
# What a collection leaves in a remote store (`lazyfs.admin.gc`), and how long it is believed to run without a sign of life. Clocks
# of hosts and stores differ.
GC_MARK = "gc/last"
_GC_SILENT_S, _GC_WAIT_S, _SKEW_S = 120.0, 120.0, 300.0
# Asking a remote store for a chunk's size is all round trip.
HEADS = 32
_local = threading.local()


@dataclass(frozen=True)
class PutResult:
    """What `put_chunk` did: `stored` is the bytes written, 0 when the store had the chunk."""

    chunk: Chunk
    stored: int


def digest_of(data: bytes | memoryview) -> str:
    """BLAKE3 in hex."""
    return blake3.blake3(data).hexdigest()


@functools.lru_cache(maxsize=256)
def zero_digest(length: int) -> str:
    """The digest of `length` zero bytes (holes of sparse files)."""
    return digest_of(bytes(length))


def _compressor(level: int) -> zstandard.ZstdCompressor:
    # Compressors are not safe to share between threads, and making one costs more than compressing a small chunk.
    made: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in made:
        made[level] = zstandard.ZstdCompressor(level=level, write_content_size=True)
    return made[level]


def chunk_key(digest: str, encoding: int = RAW) -> str:
    """The object that holds the chunk in that encoding."""
    return f"chunks/{digest[:2]}/{digest}" + (".zst" if encoding == ZSTD else "")


def mismatch(data: bytes | memoryview, digest: str, length: int) -> str:
    """Why these bytes are not the chunk of that digest and length, for people."""
    if len(data) != length:
        return f"{len(data)} bytes instead of {length}"
    return f"hashes to {digest_of(data)[:12]} instead of {digest[:12]}"


class _Mark(msgspec.Struct, frozen=True):
    """A collection's: the batch that it has begun, and whether it goes on."""

    batch: int = 0
    running: bool = False


class ChunkStore:
    """The blob API. `zstd`: "auto" compresses where a sample shows that it pays, None never, a number always
    (level).
    """

    def __init__(self, store: Store, *, zstd: int | str | None = "auto") -> None:
        if not (zstd is None or zstd == "auto" or (isinstance(zstd, int) and 1 <= zstd <= 19)):
            raise Usage(f"zstd must be 'auto', None or a level from 1 to 19, not {zstd!r}")
        self.store = store
        self.zstd = zstd
        self._since = time.time()

    # -- chunks

    def put(self, data: bytes | memoryview) -> str:
        """Store one chunk, unless it is there; returns its digest."""
        return self.put_chunk(data).chunk.digest

    def put_chunk(self, data: bytes | memoryview, digest: str | None = None) -> PutResult:
        """Like `put`, and tells the encoding and the bytes written. `digest` saves hashing what was hashed already."""
        length = len(data)
        if length > MAX_CHUNK:
            raise Usage(f"a chunk has at most {MAX_CHUNK} bytes, not {length}; cut it")
        digest = digest or digest_of(data)
        for encoding in (RAW, ZSTD):
            info = self._sound(digest, length, encoding)
            if info is not None:
                if time.time() - info.modified > GRACE_S / 2:
                    self.store.touch(info.key)
                return PutResult(Chunk(digest, length, encoding), 0)
        encoding, body = self._encode(data)
        self.store.put(chunk_key(digest, encoding), body)
        return PutResult(Chunk(digest, length, encoding), len(body))

    def _encode(self, data: bytes | memoryview) -> tuple[int, bytes | memoryview]:
        if self.zstd is None:
            return RAW, data
        if isinstance(self.zstd, int):
            body = _compressor(self.zstd).compress(data)
            return (ZSTD, body) if len(body) < len(data) else (RAW, data)
        pays = PAYS_REMOTE if self.store.remote else PAYS_LOCAL
        sample = memoryview(data)[:_SAMPLE]
        if len(sample) < 512 or len(_compressor(1).compress(sample)) > pays * len(sample):
            return RAW, data
        body = _compressor(1).compress(data)
        return (ZSTD, body) if len(body) <= pays * len(data) else (RAW, data)

    def get(self, digest: str, length: int | None = None, encoding: int = RAW) -> bytes:
        """The plain bytes of a chunk, verified. NotFound, Integrity, or what the store raises. `encoding` is a guess, and without
        `length` the chunk may have up to MAX_CHUNK bytes.
        """
        if not is_digest(digest):
            raise Usage(f"{digest!r} is not a chunk digest")
        for form in (encoding, ZSTD if encoding == RAW else RAW):
            try:
                body = self.store.get(chunk_key(digest, form))
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

    @staticmethod
    def decode(digest: str, body: bytes | memoryview, encoding: int, length: int | None) -> bytes | memoryview:
        """Undo the encoding; Integrity when it cannot be undone or has not the expected length (without one: up to MAX_CHUNK)."""
        if encoding == ZSTD:
            limit = MAX_CHUNK if length is None else length
            try:
                # The library takes the size that the frame states for granted, and as much memory, whatever the limit.
                stated = zstandard.frame_content_size(body)
                if stated > limit:
                    raise Integrity(f"chunk {digest[:12]} would become {stated} bytes instead of at most {limit}")
                body = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompress(body, max_output_size=limit)
            except zstandard.ZstdError as error:
                raise Integrity(f"chunk {digest[:12]} does not decompress: {error}") from error
        if length is None and len(body) > MAX_CHUNK:
            raise Integrity(f"chunk {digest[:12]} has {len(body)} bytes, and no chunk has more than {MAX_CHUNK}")
        if length is not None and len(body) != length:
            raise Integrity(f"chunk {digest[:12]} has {len(body)} bytes instead of {length}")
        return body

    def has(self, digest: str, length: int) -> bool:
        """Whether the store has the chunk in any encoding, of a size that can be right. Its bytes are not read."""
        return any(self._sound(digest, length, encoding) is not None for encoding in (RAW, ZSTD))

    def _sound(self, digest: str, length: int, encoding: int) -> ObjectInfo | None:
        info = self.store.head(chunk_key(digest, encoding))
        # A size that cannot be right is what a power cut left: as if it were not there.
        right = info is not None and info.size > 0 and (encoding == ZSTD or info.size == length)
        return info if right else None

    # -- manifests

    def put_manifest(self, manifest: Manifest) -> str:
        """Flush the chunks, then write the manifest; returns its digest.

        Busy (`collected-meanwhile`) where a garbage collection of a remote store took a chunk of it: the manifest is not there
        then, and storing everything again helps.
        """
        digest, data = encode(manifest)
        self.store.flush()
        key = f"manifests/{digest}"
        try:
            there = bytes(self.store.get(key))
        except NotFound:
            there = None
        if there != data:
            self.store.put(key, data)
            self.store.flush()
        else:
            # It has no name yet: a collection of what is old and has none must not take it.
            info = self.store.head(key)
            if info is not None and time.time() - info.modified > GRACE_S / 2:
                self.store.touch(key)
        if self.store.remote:
            self._confirm(manifest, key, was_there=there == data)
        return digest

    def _confirm(self, manifest: Manifest, key: str, *, was_there: bool) -> None:
        """See that no chunk went while the manifest was on its way. One look, unless garbage was collected since this object was made."""
        mark = self.store.head(GC_MARK)
        if mark is None or mark.modified < self._since - _SKEW_S:
            return
        self._await_collection(mark)
        lengths = {c.digest: c.length for f in manifest.files for c in f.chunks}
        with ThreadPoolExecutor(HEADS) as pool:
            there = pool.map(lambda item: retrying(lambda: self.has(*item), RetryPolicy()), lengths.items())
            lost = sum(not found for found in there)
        if lost:
            if not was_there:
                self.store.delete(key)
            raise Busy(
                f"a garbage collection of {self.store.url} took {lost} chunks meanwhile; import or push again",
                code="collected-meanwhile",
            )

    def _await_collection(self, mark: ObjectInfo) -> None:
        """Wait until a running collection has begun another batch: it has seen the manifest by then. Busy after two minutes."""
        first, deadline = self._mark(), time.monotonic() + _GC_WAIT_S
        now = first
        while now.running and now == first and time.time() - mark.modified < _GC_SILENT_S:
            if time.monotonic() > deadline:
                raise Busy(f"a garbage collection runs on {self.store.url}; try again after it", code="store-busy")
            time.sleep(0.2)
            now, mark = self._mark(), self.store.head(GC_MARK) or mark

    def _mark(self) -> _Mark:
        try:
            return msgspec.json.decode(self.store.get(GC_MARK), type=ready(_Mark))
        except (NotFound, msgspec.DecodeError):
            return _Mark()

    def get_manifest(self, digest: str) -> Manifest:
        """The manifest, verified. NotFound or Integrity."""
        try:
            data = bytes(self.store.get(f"manifests/{digest}"))
        except NotFound:
            raise NotFound(f"no manifest {digest[:12]} in {self.store.url}; {self._way_out()}") from None
        if self.store.remote and data.lstrip()[:1] == b"<":
            raise Permanent(
                f"{self.store.url} answers with a web page instead of manifest {digest[:12]}; is that the store's URL?",
                code="not-a-store",
            )
        return decode(data, digest)

    def has_manifest(self, digest: str) -> bool:
        return self.store.head(f"manifests/{digest}") is not None

    def manifests(self) -> Iterator[str]:
        """Digests of all manifests in the store."""
        for info in self.store.list("manifests/"):
            name = info.key.removeprefix("manifests/")
            if is_digest(name):
                yield name

    # -- refs

    def set_ref(self, kind: str, name: str, digest: str) -> None:
        """Let `name` mean that manifest. Raises Usage for a name that is not of the form a/b:tag."""
        self._check_ref(kind, name)
        body = msgspec.json.encode({"manifest": digest, "at": int(time.time())})
        self.store.put(self.ref_key(kind, name), body)
        self.store.flush()

    def get_ref(self, kind: str, name: str) -> str:
        """The digest `name` means. NotFound."""
        self._check_ref(kind, name)
        try:
            body = msgspec.json.decode(self.store.get(self.ref_key(kind, name)), type=dict[str, str | int])
        except NotFound:
            raise NotFound(f"no {kind.removesuffix('s')} named {name!r} in {self.store.url}") from None
        except msgspec.DecodeError as error:
            raise Integrity(self._damaged_ref(kind, name, str(error))) from error
        digest = body.get("manifest")
        if not isinstance(digest, str) or not is_digest(digest):
            raise Integrity(self._damaged_ref(kind, name, "it names no manifest"))
        return digest

    def delete_ref(self, kind: str, name: str) -> None:
        self._check_ref(kind, name)
        self.store.delete(self.ref_key(kind, name))

    def refs(self, kind: str) -> Iterator[tuple[str, str]]:
        """(name, manifest digest) of every ref of a kind; damaged ones raise Integrity."""
        for name in self.ref_names(kind):
            yield name, self.get_ref(kind, name)

    def ref_names(self, kind: str) -> Iterator[str]:
        """The names of all refs of a kind, the damaged ones too."""
        prefix = f"refs/{kind}/"
        for info in self.store.list(prefix):
            yield info.key.removeprefix(prefix).replace("@", ":")

    def resolve(self, name: str) -> str:
        """A digest, a unique prefix of one (8 digits or more), a tag or a snapshot's name → the manifest's digest."""
        if is_digest(name):
            return name
        if re.fullmatch(r"[0-9a-f]{8,63}", name):
            found = [d for d in self.manifests() if d.startswith(name)]
            if len(found) == 1:
                return found[0]
            if found:
                raise Usage(f"{name!r} is the beginning of {len(found)} manifests; give more digits")
        for kind, full in (("tags", name if ":" in name else f"{name}:latest"), ("snapshots", name)):
            try:
                return self.get_ref(kind, full)
            except (NotFound, Usage):
                continue
        if re.fullmatch(r"[0-9a-f]{1,7}", name):
            raise NotFound(f"no tag {name!r} in {self.store.url}; the beginning of a digest needs 8 digits or more")
        raise NotFound(f"no manifest, tag or snapshot {name!r} in {self.store.url}; {self._way_out()}")

    def _way_out(self) -> str:
        if self.store.url.startswith("http"):
            return "an HTTP store cannot be listed: give a tag or the whole digest as the import printed it"
        return "`quickthaw weights ls` shows what is there"

    @staticmethod
    def _damaged_ref(kind: str, name: str, why: str) -> str:
        return f"the {kind.removesuffix('s')} {name!r} is damaged: {why}; `quickthaw weights rm {name}` removes it"

    @staticmethod
    def ref_key(kind: str, name: str) -> str:
        """The object that holds what `name` means."""
        # ":" is legal in object keys and yet not everywhere in file names; "@" is in no ref's name.
        return f"refs/{kind}/{name.replace(':', '@')}"

    @staticmethod
    def _check_ref(kind: str, name: str) -> None:
        if not re.fullmatch(r"[a-z]{1,32}", kind) or not _REF.fullmatch(name) or ".." in name:
            raise Usage(f"{name!r} is not a name: use letters, digits, '.', '_', '-', '/', with an optional ':tag'")
