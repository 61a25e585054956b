"""The caches beside a snapshot's images, files `.verified-NAME`: reading one runs no code.

- `.verified-pages`: the page maps of CRIU's images. Reading it takes 2 ms, reading the images 60.
- `.verified-plans`: the plans made of a working set (checkpoint.lazy_pages.copy_plan).
- `.verified-pack`: a second copy of the working set's pages, in the order of need. In the images these pages lie in
  thousands of small extents, which a cold disk reads at a quarter of its speed. It is used only with the plans it was
  made for, which hold its fingerprint; otherwise pages are copied from the images. Mapped pages are not in it.
- `.verified-reading`: the reads of a restore from a cold disk (checkpoint.lazy_pages.read_order).

All but the pack hold a JSON head and numbers:

    BLAKE2b of what follows, 32-bit length of the head, the head, then the sections of raw bytes whose lengths the head
    lists

The names share the prefix of the verification ledger: such files belong to this host, and archives neither include nor
provide them. The head holds fingerprints of the images, because a wrong offset would put wrong bytes into memory. If
they differ, the cache is ignored. The digest finds damage, not malice: readers check the values as untrusted input.
Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from threading import get_ident

from checkpoint.criu.pagemap import ProcessImage, process_ids, read_process
from checkpoint.files import fingerprint
from checkpoint.lazy_pages import uffd
from checkpoint.lazy_pages.copy_plan import CHUNK, Plan
from checkpoint.lazy_pages.readahead import Source

try:
    from _blake2 import blake2b as blake2b
except ImportError:
    from hashlib import blake2b as blake2b  # identical, but also loads OpenSSL, which delays a restore by 4 ms

TYPE_CHECKING = False  # importing typing would delay a restore by 3 ms
if TYPE_CHECKING:
    from typing import Any

PAGE_MAPS, PLANS, PACK = ".verified-pages", ".verified-plans", ".verified-pack"
_PAGE_MAPS_VERSION, _PLANS_VERSION = 4, 3
_DIGEST_BYTES = 64
_MAX_PACK_BYTES = 256 << 20
"""Maximum size of a pack. A larger working set is not worth storing twice: if nothing is mapped, most of it is weights."""
_EXTENTS_PER_CALL = 512  # below IOV_MAX

Bytes = bytes | memoryview
Run = tuple[int, int, int]
Fingerprints = list[list[str | int]]
"""Name, device, inode, size, mtime and ctime in ns; a JSON document of itself."""


def path(images: str, name: str) -> str:
    """Return the path of a file beside a folder of images."""
    return os.path.join(os.path.dirname(images.rstrip("/")), name)


def fingerprints(images: str, prefixes: tuple[str, ...] = ("pagemap-", "mm-")) -> Fingerprints:
    """Return fingerprints of the files that define where pages lie."""
    with os.scandir(images) as entries:
        return sorted([entry.name, *fingerprint(entry.stat())] for entry in entries if entry.name.startswith(prefixes))


def write(images: str, name: str, version: int, head: dict[str, Any], sections: Sequence[Bytes]) -> OSError | None:
    """Write a cache atomically. Return the error if that failed: the next restore does without it."""
    lengths = [len(section) for section in sections]
    data = json.dumps({**head, "version": version, "sections": lengths}).encode()
    body = b"".join((struct.pack("<I", len(data)), data, *sections))
    target = path(images, name)
    new = f"{target}.{os.getpid()}.{get_ident()}"
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(blake2b(body).digest() + body)
            os.replace(new, target)
        except OSError:
            os.unlink(new)
            raise
    except OSError as error:
        return error
    return None


def read(images: str, name: str, version: int) -> tuple[dict[str, Any], list[memoryview]]:
    """Return the head and the sections of a cache.

    Raises OSError if it is missing, ValueError if it is damaged or of another version.
    """
    with open(path(images, name), "rb") as file:
        data = file.read()
    body = memoryview(data)[_DIGEST_BYTES:]
    if blake2b(body).digest() != data[:_DIGEST_BYTES]:
        raise ValueError(f"{name} is damaged")
    try:
        (size,) = struct.unpack_from("<I", body, 0)
        head = json.loads(bytes(body[4 : 4 + size]))
        if head["version"] != version:
            raise ValueError(f"{name} is of another version")
        lengths = head["sections"]
    except (struct.error, LookupError, TypeError) as error:
        raise ValueError(f"{name} is not a cache file") from error
    sections, at = [], 4 + size
    for length in lengths:
        if not isinstance(length, int) or not 0 <= length <= len(body) - at:
            raise ValueError("a section that is longer than the file")
        sections.append(body[at : at + length])
        at += length
    if at != len(body):
        raise ValueError("more than its sections")
    return head, sections


def numbers(section: memoryview) -> array[int]:
    """Decode a section of 64-bit numbers. Raises ValueError."""
    found = array("Q")
    found.frombytes(section)
    return found


def flat(runs: Iterable[Sequence[int]]) -> bytes:
    """Encode tuples of numbers, one after the other."""
    return array("Q", [part for run in runs for part in run]).tobytes()


def triples(section: memoryview) -> list[Run]:
    """Decode a section of triples. Raises ValueError."""
    found = iter(numbers(section))
    return list(zip(found, found, found, strict=True))


def pairs(section: memoryview) -> list[tuple[int, int]]:
    """Decode a section of pairs. Raises ValueError."""
    found = iter(numbers(section))
    return list(zip(found, found, strict=True))


def checked_pages_file(name: object) -> str:
    """Return a valid CRIU page file name, which contains no path. Raises ValueError otherwise."""
    if isinstance(name, str) and name.startswith("pages-") and name.endswith(".img") and name[6:-4].isdigit():
        return name
    raise ValueError(f"{name!r} is not a page file")


# Page maps


def read_page_maps(images: str, known: Fingerprints) -> tuple[dict[int, ProcessImage], bool]:
    """Return the page map of every process in a folder of images, and whether it came from the cache.

    `known`: the images' fingerprints, just taken. Raises BadImage, or OSError when a file is missing.
    """
    cached = _cached_page_maps(images, known)
    if cached is not None:
        return cached, True
    return {pid: read_process(images, pid) for pid in process_ids(images)}, False


def write_page_maps(images: str, known: Fingerprints, found: dict[int, ProcessImage]) -> OSError | None:
    """Cache the result of `read_page_maps` for the next restore.

    `known`: those given to `read_page_maps`. By now the folder may hold another snapshot's images, and the cache must not be
    used for those. Return the error if it could not be written; then images are read again.
    """
    processes, sections = [], []
    for image in found.values():
        processes.append([image.pid, image.pages_file])
        sections += [flat(runs) for runs in (image.runs, image.mapped, image.eager, image.wiped_on_fork)]
        sections.append(flat([image.borders]))
    head = {"images": known, "processes": processes}
    return write(images, PAGE_MAPS, _PAGE_MAPS_VERSION, head, sections)


def _cached_page_maps(images: str, known: Fingerprints) -> dict[int, ProcessImage] | None:
    try:
        head, sections = read(images, PAGE_MAPS, _PAGE_MAPS_VERSION)
        if head["images"] != known:
            return None
        found = {}
        parts = iter(sections)
        for pid, name in head["processes"]:
            image = found[int(pid)] = ProcessImage(int(pid), checked_pages_file(name))
            image.runs, image.mapped, image.eager = (triples(next(parts)) for _ in range(3))
            image.wiped_on_fork, image.borders = pairs(next(parts)), numbers(next(parts)).tolist()
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        return None  # none yet, of another version, or damaged
    return found


# Plans


def write_plans(
    images: str,
    known: Fingerprints,
    working_set: bytes,
    found: Mapping[int, Plan],
    of: Mapping[int, ProcessImage],
    sources: Mapping[str, Source],
) -> bool:
    """Cache sealed plans for the next restore from the folder `images` with this working set.

    `known`: of the images that the plans were made of (see write_page_maps). Return whether a pack was written.
    """
    place = path(images, PACK)
    places = _write_pack(place, found)
    processes, sections = [], []
    for pid, plan in found.items():
        source = sources.get(of[pid].pages_file)
        starts, ends, addresses, zero, by_address = plan.parts()
        base = source.address if source else 0
        offsets = (
            places[pid]
            if places
            else array("Q", [0 if is_zero else at - base for at, is_zero in zip(addresses, zero, strict=True)])
        )
        processes.append(pid)
        sections += [starts.tobytes(), ends.tobytes(), offsets.tobytes(), bytes(zero), by_address.tobytes()]
    try:
        packed = fingerprint(os.stat(place)) if places else None
    except OSError:
        return False  # removed meanwhile
    head = {"images": known, "working_set": working_set.hex(), "pack": packed, "processes": processes}
    write(images, PLANS, _PLANS_VERSION, head, sections)
    return bool(places)


def read_plans(
    images: str,
    known: Fingerprints,
    working_set: bytes,
    of: Mapping[int, ProcessImage],
    sources: Mapping[str, Source],
    zeros: int,
) -> tuple[dict[int, Plan], Source | None] | None:
    """Return the cached plans, and the pack they copy from, if any; None if nothing matches.

    `known`: of the images that are mapped as `sources`, to whose addresses in this process the plans refer, and to
    `zeros`, our own address of zeros. The pack must live as long as the plans.
    """
    packed = None
    try:
        head, sections = read(images, PLANS, _PLANS_VERSION)
        if head["working_set"] != working_set.hex() or head["images"] != known:
            return None
        if head["pack"] is not None:
            packed = Source(path(images, PACK))
            if list(packed.fingerprint()) != head["pack"]:
                return None
            uffd.prefer_large(packed.address, packed.size)
        found = {}
        parts = iter(sections)
        for pid in head["processes"]:
            source = packed or sources.get(of[pid].pages_file)
            base, size = (source.address, source.size) if source else (0, 0)
            starts, ends, offsets = (numbers(next(parts)) for _ in range(3))
            zero, by_address = [bool(byte) for byte in next(parts)], numbers(next(parts))
            _check_extents(starts, ends, offsets, zero, by_address, size)
            at = array(
                "Q", [zeros if is_zero else offset + base for offset, is_zero in zip(offsets, zero, strict=True)]
            )
            found[pid] = Plan.sealed(starts, ends, at, zero, by_address)
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        return None  # none yet, of another version, or damaged
    return found, packed


def _check_extents(
    starts: array[int], ends: array[int], offsets: array[int], zero: list[bool], by_address: array[int], size: int
) -> None:
    """Raise ValueError if an extent would be copied from outside a source of `size` bytes."""
    for start, end, offset, is_zero in zip(starts, ends, offsets, zero, strict=True):
        if not 0 < end - start <= CHUNK or (not is_zero and offset + end - start > size):
            raise ValueError("an extent outside its file")
    if sorted(by_address) != list(range(len(starts))):
        raise ValueError("an invalid order")


def _write_pack(target: str, plans: Mapping[int, Plan]) -> dict[int, array[int]] | None:
    """Write the non-zero extents of sealed plans; return the offsets of each plan's extents in the file (0 for zeros).

    Returns None, and leaves no file, if there are too many bytes, the disk refuses them, or another process writes a
    pack at the same time.
    """
    order = sorted(
        ((batch, pid, index) for pid, plan in plans.items() for index, batch in enumerate(plan.batches)),
    )
    places = {pid: array("Q", bytes(8 * len(plan.starts))) for pid, plan in plans.items()}
    extents: list[tuple[int, int]] = []
    total = 0
    for _, pid, index in order:
        plan = plans[pid]
        if not plan.zero[index]:
            places[pid][index] = total
            size = plan.ends[index] - plan.starts[index]
            extents.append((plan.source(index), size))
            total += size
    if not extents or total > _MAX_PACK_BYTES:
        return None
    try:
        # The file has no name until it is complete, so a killed process leaves nothing. File systems without O_TMPFILE
        # get no pack.
        fd = os.open(os.path.dirname(target), os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, total)  # few extents, and a full disk is detected before anything is written
            for at in range(0, len(extents), _EXTENTS_PER_CALL):
                _write_all(
                    fd,
                    [
                        (ctypes.c_char * size).from_address(address)
                        for address, size in extents[at : at + _EXTENTS_PER_CALL]
                    ],
                )
            os.fsync(fd)  # its fingerprint is trusted after a crash, so its bytes must be on disk by then
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)
            # With src_dir_fd this is linkat(), which follows the link to the file; link() would not.
            os.link(f"/proc/self/fd/{fd}", target, src_dir_fd=fd, follow_symlinks=True)
        finally:
            os.close(fd)
    except OSError:
        return None
    return places


def _write_all(fd: int, parts: list[ctypes.Array[ctypes.c_char]]) -> None:
    left = sum(len(part) for part in parts)
    while left:
        done = os.writev(fd, parts)
        left -= done
        while parts and done >= len(parts[0]):
            done -= len(parts.pop(0))
        if parts and done:
            rest = len(parts[0]) - done
            parts[0] = (ctypes.c_char * rest).from_address(ctypes.addressof(parts[0]) + done)
