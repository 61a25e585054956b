"""Weights and libraries' data shown to a restored engine as what they are on the disk: private mappings of the snapshot's own pages file.

CRIU and the page server copy every page of an engine into it. Most of those pages are weights, which nobody writes: here a process's
map of mappings (`mm-N.img`) is rewritten so that CRIU maps `pages-N.img` itself over them. Nothing is copied, the kernel brings a page
when it is read, N replicas share the one copy in the page cache, and a write stays a replica's own (MAP_PRIVATE). The page map still
lists the pages, so that a restore that is not lazy, which copies them, comes to the same bytes.

What is rewritten is a view, `.mapped/` in the snapshot's folder: links to the images and its own few files. It is this host's own, made
with the snapshot, or after the first restore of one that was pulled, and believed only while stat fields and its own digests fit.

Which pages: those wholly inside the areas that the engine named (Snapshot.weight_areas), and only where glibc's malloc handed them out as
a mapping of their own or from the main heap: memory that an arena of another thread drops and takes again must read as zeros, and a
mapping of a file would not. Other allocators keep other promises; theirs are left alone.

The same is done with what the loader and the program wrote into private mappings of libraries (relocated tables, globals): 14 to 28 MB in
each process of an engine, which CRIU would read before it lets anything run, since userfaultfd does not watch mappings of files. The page
map of the view calls those pages lazy, so CRIU leaves them to the mapping.
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
from checkpoint.criu.images import Message, decode, encode, encoded, fields, framed, head_size, number, payloads
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
from lazyfs.content.records import ready

FOLDER = ".mapped"
LEAST = 128 << 10
"""Bytes from which a mapping of its own is worth one more entry in a process's map."""
_LEAST_WHOLE = 2 * PAGE
"""Bytes from which a mapping that was written in full is shown as another file's; it costs no entry, but each of its pages a fault."""
_FACTS = "facts.json"
_VERSION = 2
_HEADER = 8
_SLACK = 3 * PAGE
"""How much larger than what was asked for a chunk may be: rounding to pages and the alignment."""
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
"""By process number, (address, bytes)."""
_Piece = tuple[int, int, int]
"""(start, end, offset in the pages file)"""


class _Facts(msgspec.Struct, forbid_unknown_fields=True):
    """What a view was made of and is: the images' folder, stat fields of files it depends on, digests of its own, bytes mapped."""

    version: int
    images: str
    stamps: dict[str, tuple[int, int, int, int, int]]
    digests: dict[str, str]
    mapped: int


def find(folder: Path) -> Path | None:
    """The folder of images to restore from lazily in place of `folder/images`, where there is a view that fits; about 1 ms."""
    facts = _fitting(folder)
    return folder / FOLDER / "images" if facts and facts.mapped else None


def made(folder: Path) -> bool:
    """Whether a view that fits was made, also one in which nothing could be mapped."""
    return _fitting(folder) is not None


def _fitting(folder: Path) -> _Facts | None:
    view = folder / FOLDER
    try:
        facts = msgspec.json.decode((view / _FACTS).read_bytes(), type=ready(_Facts))
        if facts.version != _VERSION or facts.images != str(folder / "images"):
            return None
        if facts.stamps != _stamps(folder / "images"):
            return None
        for name, digest in facts.digests.items():
            if "/" in name or blake3.blake3((view / "images" / name).read_bytes()).hexdigest() != digest:
                return None
    except (OSError, msgspec.MsgspecError):
        return None  # none yet, or damaged: everything is copied, as before
    return facts


def make(folder: Path, areas: Areas) -> int:
    """Make the view of a snapshot, and return how many bytes it maps, 0 where nothing can be. Takes tenths of a second.

    Raises Busy where another process is making it, Failed where the disk is full or the images are none.
    """
    images = folder / "images"
    try:
        held = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stamps = _stamps(images)
            changed, mapped = _rewrite(images, areas)
            digests = {name: blake3.blake3(data).hexdigest() for name, data in changed.items()}
            _write(folder, images, changed, _Facts(_VERSION, str(images), stamps, digests, mapped))
        finally:
            os.close(held)
    except BlockingIOError:
        raise Busy("mapping-being-made", f"another process is making the view of {folder.name}") from None
    except OSError as error:
        raise disk.failure(f"no view of {folder.name}", error, "mapping-not-made") from error
    except (BadImage, Integrity, ValueError, struct.error, IndexError) as error:
        raise Failed("mapping-not-made", f"{images} holds an image that does not fit the others: {error}") from error
    return mapped


def _write(folder: Path, images: Path, changed: dict[str, bytes], facts: _Facts) -> None:
    """Aside, then in place of the one that is there; what a killed maker left is in the way of nobody, and removed."""
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


def _stamps(images: Path) -> dict[str, tuple[int, int, int, int, int]]:
    """Of everything a view is made of."""
    found = {}
    with os.scandir(images) as entries:
        for entry in entries:
            if entry.name.startswith(("mm-", "pagemap-", "pages-")) or entry.name == "files.img":
                info = entry.stat()
                found[entry.name] = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    return found


def _rewrite(images: Path, areas: Areas) -> tuple[dict[str, bytes], int]:
    """The files of the view that differ from the images, and how many bytes are mapped in it."""
    files = bytearray((images / "files.img").read_bytes())
    entries = [decode(payload) for payload in payloads(bytes(files))]
    next_id = max(number(entry, 2) for entry in entries) + 1
    changed: dict[str, bytes] = {}
    mapped = 0
    for pid in process_ids(str(images)):
        image = read_process(str(images), pid)
        pages, page_map = images / image.pages_file, images / f"pagemap-{pid}.img"
        weights = _pieces(image, pages, areas.get(str(pid), ()))
        data, shown = _map(images / f"mm-{pid}.img", weights, image.eager, next_id)
        if not shown:
            continue
        changed[f"mm-{pid}.img"] = data
        changed[page_map.name] = _left_to_mappings(page_map, shown)
        mapped += sum(end - start for start, end, _ in shown)
        files += framed(_file_entry(next_id, pages))
        next_id += 1
    if changed:
        changed["files.img"] = bytes(files)
    return changed, mapped


def _pieces(image: ProcessImage, pages: Path, areas: Sequence[tuple[int, int]]) -> list[_Piece]:
    """What of the areas can be mapped, ascending."""
    found = []
    with open(pages, "rb") as file:
        for start, size in areas:
            low, high = -(-start // PAGE) * PAGE, (start + size) // PAGE * PAGE
            if high - low >= LEAST and _from_malloc(image, file.fileno(), start, size):
                found += [piece for piece in image.within(low, high) if piece[1] - piece[0] >= LEAST]
    return sorted(found)


def _from_malloc(image: ProcessImage, file: int, start: int, size: int) -> bool:
    """Whether a chunk of glibc's malloc begins there that is a mapping of its own, or of the main arena."""
    header = start - _HEADER
    for low, _, offset in image.within(header // PAGE * PAGE, header // PAGE * PAGE + PAGE):
        data = os.pread(file, _HEADER, offset + header - low)
        if len(data) == _HEADER:
            (word,) = struct.unpack("<Q", data)
            chunk = word & ~7
            return not word & _OTHER_ARENA and size <= chunk <= size + _SLACK
    return False


def _map(path: Path, weights: Sequence[_Piece], libraries: Sequence[_Piece], file: int) -> tuple[bytes, list[_Piece]]:
    """An `mm-N.img` with the pieces as mappings of `file` where they may be that, and which of them are."""
    data = path.read_bytes()
    (payload,) = payloads(data)
    parts, shown = [], []
    for field, value, raw in fields(payload):
        if field != _VMAS or not isinstance(value, bytes):
            parts.append(raw)
            continue
        vma = decode(value)
        first, end = number(vma, _START), number(vma, _END)
        inside: list[_Piece] = []
        if _plain(vma):
            inside = [piece for piece in weights if first <= piece[0] and piece[1] <= end]
        elif number(vma, _STATUS) == _REGULAR | FILE_PRIVATE and not number(vma, _MADV):
            inside = [
                piece
                for piece in within(libraries, first, end)
                if piece[1] - piece[0] >= (_LEAST_WHOLE if piece[:2] == (first, end) else LEAST)
            ]
        if not inside:
            parts.append(raw)
            continue
        start = first
        for low, high, offset in [*inside, (end, end, 0)]:
            if start < low:
                rest = vma | {_START: [start], _END: [low]}
                if number(vma, _STATUS) & FILE_PRIVATE:
                    rest |= {_PGOFF: [number(vma, _PGOFF) + start - first]}
                parts.append(encoded(_VMAS, encode(rest)))
            if low < high:
                mapping = vma | {_START: [low], _END: [high], _PGOFF: [offset], _SHMID: [file], _FLAGS: [_PRIVATE]}
                mapping |= {_STATUS: [_REGULAR | FILE_PRIVATE], _FDFLAGS: [os.O_RDONLY]}
                parts.append(encoded(_VMAS, encode(mapping)))
            start = high
        shown += inside
    return data[: head_size(data)] + framed(b"".join(parts)), shown


def _left_to_mappings(page_map: Path, shown: Sequence[_Piece]) -> bytes:
    """A `pagemap-N.img` in which these pieces are lazy; weights are already."""
    data = page_map.read_bytes()
    head, *entries = _entries(page_map)
    parts = [framed(encode(head))]
    for entry in entries:
        start, flags = number(entry, _ADDRESS), number(entry, _PAGE_FLAGS, PRESENT)
        end = start + _pages(entry) * PAGE
        eager = flags & PRESENT and not flags & LAZY
        for low, high, _ in [*(within(shown, start, end) if eager else ()), (end, end, 0)]:
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
    """The part of an entry of a page map that lies in [start, end)."""
    part: Message = entry | {_ADDRESS: [start], _PAGE_FLAGS: [flags]}
    for field in (_PAGES, _MANY_PAGES):
        if number(entry, field):
            part[field] = [(end - start) // PAGE]
    return part


def _plain(vma: Message) -> bool:
    """A private anonymous mapping of which nothing is asked (no advice to the kernel, no stack)."""
    status, flags = number(vma, _STATUS), number(vma, _FLAGS)
    return (
        bool(status & _ANON_PRIVATE)
        and not status & _STACK
        and flags & (_PRIVATE | _ANONYMOUS | _GROWSDOWN) == _PRIVATE | _ANONYMOUS
        and not number(vma, _MADV)
    )


def _file_entry(ident: int, pages: Path) -> bytes:
    """A FileEntry for a pages file, as CRIU writes one for a file that is mapped."""
    info = pages.stat()
    owner = encode({field: [0] for field in (1, 2, 3, 4, 5)})
    regular: Message = {1: [ident], 2: [os.O_RDONLY], 3: [0], 5: [owner], 6: [os.fsencode(pages)]}
    regular |= {8: [info.st_size], 10: [info.st_mode]}
    return encode({1: [_REGULAR_FILE], 2: [ident], 3: [encode(regular)]})
