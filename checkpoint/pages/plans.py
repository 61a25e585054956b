"""The plans made of a working set, kept as `.verified-plans` beside the page maps (checkpoint.pages.index), for later restores.

What is kept says for which image files and which working set it holds, and carries a digest of itself, since a wrong offset would put
wrong bytes in place. Where anything differs, the plans are made again. Standard library only.
"""

from __future__ import annotations

import marshal
import sys
from array import array
from collections.abc import Mapping

from checkpoint.pages import index, pack, uffd
from checkpoint.pages.fetch import Source
from checkpoint.pages.images import ProcessImage
from checkpoint.pages.space import Plan

FILE_NAME = ".verified-plans"
_VERSION = 2


def keep(
    images: str,
    working_set: bytes,
    found: Mapping[int, Plan],
    of: Mapping[int, ProcessImage],
    sources: Mapping[str, Source],
) -> bool:
    """Keep sealed plans for the next restore from the folder `images` with this working set; whether their pages are packed."""
    place = index.path(images, pack.FILE_NAME)
    places = pack.write(place, found)
    bodies = []
    for pid, plan in found.items():
        source = sources.get(of[pid].pages_file)
        starts, ends, addresses, zero, by_address = plan.parts()
        base = source.address if source else 0
        offsets = (
            places[pid]
            if places
            else array("Q", [0 if none else at - base for at, none in zip(addresses, zero, strict=True)])
        )
        bodies.append((pid, starts.tobytes(), ends.tobytes(), offsets.tobytes(), bytes(zero), by_address.tobytes()))
    try:
        packed = pack.stamp(place) if places else None
    except OSError:
        return False  # somebody has removed it
    body = marshal.dumps((_VERSION, sys.version, index.stamps(images), working_set, packed, bodies))
    index.write(images, FILE_NAME, body)
    return bool(places)


def read(
    images: str, working_set: bytes, of: Mapping[int, ProcessImage], sources: Mapping[str, Source], zeros: int
) -> tuple[dict[int, Plan], Source | None] | None:
    """What `keep` kept, for sources as they are mapped here, and `zeros`, our own address of zeros; None where nothing fits these files.

    With it the pack that these plans copy from, if any: it has to stay as long as they do.
    """
    packed = None
    try:
        version, python, stamps, digest, stamp, bodies = marshal.loads(index.checked(images, FILE_NAME))
        if version != _VERSION or python != sys.version or digest != working_set or stamps != index.stamps(images):
            return None
        if stamp is not None:
            packed = Source(index.path(images, pack.FILE_NAME))
            if packed.stamp() != stamp:
                return None
            uffd.prefer_large(packed.address, packed.size)
        found = {}
        for pid, starts, ends, offsets, zero, by_address in bodies:
            source = packed or sources.get(of[pid].pages_file)
            base = source.address if source else 0
            nothing = [bool(byte) for byte in zero]
            at = array(
                "Q",
                [zeros if none else offset + base for offset, none in zip(array("Q", offsets), nothing, strict=True)],
            )
            found[pid] = Plan.sealed(array("Q", starts), array("Q", ends), at, nothing, array("Q", by_address))
    except (OSError, ValueError, EOFError, TypeError, LookupError):
        return None  # none yet, of another version, or damaged
    return found, packed
