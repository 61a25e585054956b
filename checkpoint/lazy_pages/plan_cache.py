"""Cache the plans made of a working set for later restores, as `.verified-plans` (checkpoint.lazy_pages.cache_file).

If the fingerprints of images, working set or pack differ, the plans are made again. Standard library only.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping

from checkpoint.criu.pagemap import ProcessImage
from checkpoint.lazy_pages import cache_file, pack, uffd
from checkpoint.lazy_pages.address_space import CHUNK, Plan
from checkpoint.lazy_pages.readahead import Source

FILE_NAME = ".verified-plans"
_VERSION = 3


def keep(
    images: str,
    stamps: cache_file.Stamps,
    working_set: bytes,
    found: Mapping[int, Plan],
    of: Mapping[int, ProcessImage],
    sources: Mapping[str, Source],
) -> bool:
    """Cache sealed plans for the next restore from the folder `images` with this working set.

    `stamps`: of the images that the plans were made of (see pagemap_cache). Return whether a pack was written.
    """
    place = cache_file.path(images, pack.FILE_NAME)
    places = pack.write(place, found)
    processes, sections = [], []
    for pid, plan in found.items():
        source = sources.get(of[pid].pages_file)
        starts, ends, addresses, zero, by_address = plan.parts()
        base = source.address if source else 0
        offsets = (
            places[pid]
            if places
            else array("Q", [0 if none else at - base for at, none in zip(addresses, zero, strict=True)])
        )
        processes.append(pid)
        sections += [starts.tobytes(), ends.tobytes(), offsets.tobytes(), bytes(zero), by_address.tobytes()]
    try:
        packed = cache_file.stamp(os.stat(place)) if places else None
    except OSError:
        return False  # removed meanwhile
    head = {"images": stamps, "working_set": working_set.hex(), "pack": packed, "processes": processes}
    cache_file.write(images, FILE_NAME, _VERSION, head, sections)
    return bool(places)


def read(
    images: str,
    stamps: cache_file.Stamps,
    working_set: bytes,
    of: Mapping[int, ProcessImage],
    sources: Mapping[str, Source],
    zeros: int,
) -> tuple[dict[int, Plan], Source | None] | None:
    """Return the cached plans, and the pack they copy from, if any; None if nothing matches.

    `stamps`: of the images that are mapped as `sources`, to whose addresses in this process the plans refer, and to
    `zeros`, our own address of zeros. The pack must live as long as the plans.
    """
    packed = None
    try:
        head, sections = cache_file.read(images, FILE_NAME, _VERSION)
        if head["working_set"] != working_set.hex() or head["images"] != stamps:
            return None
        if head["pack"] is not None:
            packed = Source(cache_file.path(images, pack.FILE_NAME))
            if packed.stamp() != head["pack"]:
                return None
            uffd.prefer_large(packed.address, packed.size)
        found = {}
        parts = iter(sections)
        for pid in head["processes"]:
            source = packed or sources.get(of[pid].pages_file)
            base, size = (source.address, source.size) if source else (0, 0)
            starts, ends, offsets = (cache_file.numbers(next(parts)) for _ in range(3))
            nothing, by_address = [bool(byte) for byte in next(parts)], cache_file.numbers(next(parts))
            _check(starts, ends, offsets, nothing, by_address, size)
            at = array("Q", [zeros if none else offset + base for offset, none in zip(offsets, nothing, strict=True)])
            found[pid] = Plan.sealed(starts, ends, at, nothing, by_address)
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        return None  # none yet, of another version, or damaged
    return found, packed


def _check(
    starts: array[int], ends: array[int], offsets: array[int], nothing: list[bool], by_address: array[int], size: int
) -> None:
    """Raise ValueError if an extent would be copied from outside a source of `size` bytes."""
    for start, end, offset, none in zip(starts, ends, offsets, nothing, strict=True):
        if not 0 < end - start <= CHUNK or (not none and offset + end - start > size):
            raise ValueError("a piece that no image holds")
    if sorted(by_address) != list(range(len(starts))):
        raise ValueError("an order that is none")
