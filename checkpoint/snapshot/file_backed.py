"""File-backed images: restore weights and library data as private mappings of the snapshot's own pages file.

Otherwise CRIU and the page server copy every page of an engine. Most of those pages are weights, which are never
written. This module rewrites a process's memory map (`mm-N.img`) so that CRIU maps `pages-N.img` over them. Then
nothing is copied: the kernel loads a page when it is read, N replicas share one copy in the page cache, and writes
stay private to a replica (MAP_PRIVATE). The page map still lists the pages, so an eager restore, which copies them,
produces the same memory.

The rewritten images lie in `.mapped/` in the snapshot's folder: links to the images, and a few files of their own.
They belong to this host. They are made with the snapshot, or after the first restore of a pulled one, and are used
only while fingerprints and their own digests match.

Pages are eligible if they lie wholly inside the areas named by the engine (Snapshot.weight_areas), and glibc's
malloc allocated them as a separate mapping or from the main heap. Memory that another thread's arena releases and
reuses must read as zeros, which a file mapping would not provide. Other allocators give other guarantees, so their
memory is left unchanged.

Pages that the loader and the program wrote into private mappings of libraries (relocated tables, globals) are
treated the same way. They are 14 to 28 MB in each process of an engine. CRIU would have to read them before the
engine resumes, since userfaultfd does not watch file mappings. The rewritten page map marks those pages lazy, so
CRIU leaves them to the mapping.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import blake3
import msgspec

from checkpoint import disk
from checkpoint.criu.images import Message, Value, decode, encode, framed, head_size, number, payloads
from checkpoint.criu.pagemap import (
    FILE_PRIVATE,
    LAZY,
    PAGE,
    PRESENT,
    BadImage,
    ProcessImage,
    process_ids,
    read_process,
    within,
)
from checkpoint.errors import Busy, Failed, Integrity
from checkpoint.files import Fingerprint, fingerprint
from lazyfs.content.records import ready

FOLDER = ".mapped"
LEAST = 128 << 10
"""Smallest extent in bytes that is worth one more entry in a process's memory map."""
_LEAST_WHOLE = 2 * PAGE
"""Smallest fully written mapping in bytes that is remapped. Remapping it adds no entry, but one page fault for each page."""
_FACTS = "facts.json"
_VERSION = 2
_HEADER = 8
_SLACK = 3 * PAGE
"""Maximum bytes by which a malloc chunk may exceed the request: rounding to pages, and alignment."""
_OTHER_ARENA = 4  # a low bit of a chunk's size, malloc/malloc.c
# Fields of VmaEntry, bits of its status and flags (images/vma.proto, criu/include/image.h, mman.h).
_START, _END, _PGOFF, _SHMID, _FLAGS, _STATUS, _MADV, _FDFLAGS = 1, 2, 3, 4, 6, 7, 9, 10
_REGULAR, _ANON_PRIVATE, _STACK = 1, 1 << 9, 1 << 1
_PRIVATE, _ANONYMOUS, _GROWSDOWN = 0x02, 0x20, 0x100
_VMAS = 14  # of MmEntry
# Fields of PagemapEntry (images/pagemap.proto). Older images count pages in 32 bits.
_ADDRESS, _PAGES, _PAGE_FLAGS, _MANY_PAGES = 1, 2, 4, 5
_REGULAR_FILE = 1  # FileEntry.type

Areas = Mapping[str, Sequence[tuple[int, int]]]
"""By process number, (address, bytes) of each area."""
_Extent = tuple[int, int, int]
"""An extent: (start, end, offset in the pages file)."""


class _Facts(msgspec.Struct, forbid_unknown_fields=True):
    """Record of file-backed images.

    Holds the images' folder, fingerprints of the files they depend on, digests of their own files, and the bytes
    mapped.
    """

    version: int
    images: str
    fingerprints: dict[str, Fingerprint] = msgspec.field(name="stamps")
    digests: dict[str, str]
    mapped: int


def find(folder: Path) -> Path | None:
    """Return the file-backed images to restore from lazily instead of `folder/images`.

    Returns None if none match. Takes about 1 ms.
    """
    facts = _matching(folder)
    return folder / FOLDER / "images" if facts and facts.mapped else None


def exist(folder: Path) -> bool:
    """Return whether matching file-backed images exist, even if they map nothing."""
    return _matching(folder) is not None


def _matching(folder: Path) -> _Facts | None:
    made_folder = folder / FOLDER
    try:
        facts = msgspec.json.decode((made_folder / _FACTS).read_bytes(), type=ready(_Facts))
        if facts.version != _VERSION or facts.images != str(folder / "images"):
            return None
        if facts.fingerprints != _fingerprints(folder / "images"):
            return None
        for name, digest in facts.digests.items():
            if "/" in name or blake3.blake3((made_folder / "images" / name).read_bytes()).hexdigest() != digest:
                return None
    except (OSError, msgspec.MsgspecError):
        return None  # none yet, or damaged: copy everything
    return facts


def make(folder: Path, areas: Areas) -> int:
    """Make the file-backed images of a snapshot and return how many bytes they map, possibly 0.

    Takes tenths of a second.

    Raises Busy when another process is making them, Failed when the disk is full or the images are invalid.
    """
    images = folder / "images"
    try:
        held = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fingerprints = _fingerprints(images)
            changed, mapped = _rewrite(images, areas)
            digests = {name: blake3.blake3(data).hexdigest() for name, data in changed.items()}
            _write(folder, images, changed, _Facts(_VERSION, str(images), fingerprints, digests, mapped))
        finally:
            os.close(held)
    except BlockingIOError:
        raise Busy("mapping-being-made", f"another process is making the file-backed images of {folder.name}") from None
    except OSError as error:
        raise disk.failure(f"no file-backed images of {folder.name}", error, "mapping-not-made") from error
    except (BadImage, Integrity, ValueError, struct.error, IndexError) as error:
        raise Failed("mapping-not-made", f"{images} holds images that do not match: {error}") from error
    return mapped


def _write(folder: Path, images: Path, changed: dict[str, bytes], facts: _Facts) -> None:
    """Write the new folder beside the current one, then swap them.

    Remove a killed writer's leftovers first.
    """
    new, old = folder / f"{FOLDER}.new", folder / f"{FOLDER}.old"
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    for made_folder in (new, new / "images"):
        made_folder.mkdir(mode=0o700)
    try:
        with os.scandir(images) as entries:
            for entry in entries if changed else ():
                if entry.name not in changed:
                    (new / "images" / entry.name).symlink_to(f"../../images/{entry.name}")
        files = {new / "images" / name: data for name, data in changed.items()}
        for file, data in {**files, new / _FACTS: msgspec.json.encode(facts)}.items():
            file.write_bytes(data)
            file.chmod(0o600)
        with contextlib.suppress(FileNotFoundError):
            (folder / FOLDER).rename(old)
        new.rename(folder / FOLDER)
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def _fingerprints(images: Path) -> dict[str, Fingerprint]:
    """Return fingerprints of every file that file-backed images derive from."""
    found = {}
    with os.scandir(images) as entries:
        for entry in entries:
            if entry.name.startswith(("mm-", "pagemap-", "pages-")) or entry.name == "files.img":
                found[entry.name] = fingerprint(entry.stat())
    return found


def _rewrite(images: Path, areas: Areas) -> tuple[dict[str, bytes], int]:
    """Return the rewritten files, and the number of bytes they map."""
    files = bytearray((images / "files.img").read_bytes())
    entries = [decode(payload) for payload in payloads(bytes(files))]
    next_id = max(number(entry, 2) for entry in entries) + 1
    changed: dict[str, bytes] = {}
    mapped = 0
    for pid in process_ids(str(images)):
        image = read_process(str(images), pid)
        pages, page_map = images / image.pages_file, images / f"pagemap-{pid}.img"
        weights = _extents(image, pages, areas.get(str(pid), ()))
        data, shown = _map(images / f"mm-{pid}.img", weights, image.eager, next_id)
        if not shown:
            continue
        changed[f"mm-{pid}.img"] = data
        changed[page_map.name] = _mark_lazy(page_map, shown)
        mapped += sum(end - start for start, end, _ in shown)
        files += framed(_file_entry(next_id, pages))
        next_id += 1
    if changed:
        changed["files.img"] = bytes(files)
    return changed, mapped


def _extents(image: ProcessImage, pages: Path, areas: Sequence[tuple[int, int]]) -> list[_Extent]:
    """Return the extents of the areas that can be mapped, ascending."""
    found = []
    with open(pages, "rb") as file:
        for start, size in areas:
            low, high = -(-start // PAGE) * PAGE, (start + size) // PAGE * PAGE
            if high - low >= LEAST and _from_malloc(image, file.fileno(), start, size):
                found += [extent for extent in image.within(low, high) if extent[1] - extent[0] >= LEAST]
    return sorted(found)


def _from_malloc(image: ProcessImage, file: int, start: int, size: int) -> bool:
    """Return whether a glibc malloc chunk begins there that is a separate mapping or belongs to the main arena."""
    header = start - _HEADER
    for low, _, offset in image.within(header // PAGE * PAGE, header // PAGE * PAGE + PAGE):
        data = os.pread(file, _HEADER, offset + header - low)
        if len(data) == _HEADER:
            (word,) = struct.unpack("<Q", data)
            chunk = word & ~7
            return not word & _OTHER_ARENA and size <= chunk <= size + _SLACK
    return False


def _map(
    path: Path, weights: Sequence[_Extent], libraries: Sequence[_Extent], file: int
) -> tuple[bytes, list[_Extent]]:
    """Rewrite an `mm-N.img` so that eligible extents map `file`; return it with the extents mapped."""
    data = path.read_bytes()
    (payload,) = payloads(data)
    memory = decode(payload)
    vmas: list[Value] = []
    mapped: list[_Extent] = []
    for value in memory.get(_VMAS, []):
        vma = decode(value) if isinstance(value, bytes) else {}
        first, end = number(vma, _START), number(vma, _END)
        inside: list[_Extent] = []
        if _plain(vma):
            inside = [extent for extent in weights if first <= extent[0] and extent[1] <= end]
        elif number(vma, _STATUS) == _REGULAR | FILE_PRIVATE and not number(vma, _MADV):
            inside = [
                extent
                for extent in within(libraries, first, end)
                if extent[1] - extent[0] >= (_LEAST_WHOLE if extent[:2] == (first, end) else LEAST)
            ]
        if not inside:
            vmas.append(value)
            continue
        start = first
        for low, high, offset in [*inside, (end, end, 0)]:
            if start < low:
                rest = vma | {_START: [start], _END: [low]}
                if number(vma, _STATUS) & FILE_PRIVATE:
                    rest |= {_PGOFF: [number(vma, _PGOFF) + start - first]}
                vmas.append(encode(rest))
            if low < high:
                mapping = vma | {_START: [low], _END: [high], _PGOFF: [offset], _SHMID: [file], _FLAGS: [_PRIVATE]}
                mapping |= {_STATUS: [_REGULAR | FILE_PRIVATE], _FDFLAGS: [os.O_RDONLY]}
                vmas.append(encode(mapping))
            start = high
        mapped += inside
    return data[: head_size(data)] + framed(encode(memory | {_VMAS: vmas})), mapped


def _mark_lazy(page_map: Path, mapped: Sequence[_Extent]) -> bytes:
    """Rewrite a `pagemap-N.img` so that these extents are lazy; those of weights are lazy already."""
    data = page_map.read_bytes()
    head, *entries = _entries(page_map)
    parts = [framed(encode(head))]
    for entry in entries:
        start, flags = number(entry, _ADDRESS), number(entry, _PAGE_FLAGS, PRESENT)
        end = start + _pages(entry) * PAGE
        eager = flags & PRESENT and not flags & LAZY
        for low, high, _ in [*(within(mapped, start, end) if eager else ()), (end, end, 0)]:
            for until, bits in ((low, flags), (high, flags | LAZY)):
                if start < until:
                    parts.append(framed(encode(_cut(entry, start, until, bits))))
                    start = until
    return data[: head_size(data)] + b"".join(parts)


def _entries(page_map: Path) -> list[Message]:
    return [decode(payload) for payload in payloads(page_map.read_bytes())]


def _pages(entry: Message) -> int:
    return number(entry, _MANY_PAGES) or number(entry, _PAGES)


def _cut(entry: Message, start: int, end: int, flags: int) -> Message:
    """Return the part of a page map entry that lies in [start, end)."""
    part: Message = entry | {_ADDRESS: [start], _PAGE_FLAGS: [flags]}
    for field in (_PAGES, _MANY_PAGES):
        if number(entry, field):
            part[field] = [(end - start) // PAGE]
    return part


def _plain(vma: Message) -> bool:
    """Return whether a mapping is private, anonymous, no stack, and has no madvise settings."""
    status, flags = number(vma, _STATUS), number(vma, _FLAGS)
    return (
        bool(status & _ANON_PRIVATE)
        and not status & _STACK
        and flags & (_PRIVATE | _ANONYMOUS | _GROWSDOWN) == _PRIVATE | _ANONYMOUS
        and not number(vma, _MADV)
    )


def _file_entry(ident: int, pages: Path) -> bytes:
    """Build a FileEntry for a pages file, as CRIU writes one for a mapped file."""
    info = pages.stat()
    owner = encode({field: [0] for field in (1, 2, 3, 4, 5)})
    regular: Message = {1: [ident], 2: [os.O_RDONLY], 3: [0], 5: [owner], 6: [os.fsencode(pages)]}
    regular |= {8: [info.st_size], 10: [info.st_mode]}
    return encode({1: [_REGULAR_FILE], 2: [ident], 3: [encode(regular)]})
