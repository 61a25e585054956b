"""Choose the chunk boundaries in a snapshot's page files so that equal pages become equal chunks, which are stored once.

Chunks are named by their content. A run of pages that copies an earlier run (for example the same library data in
two processes) can share its chunks only if both have the same boundaries. So every page is hashed, copies of at
least MIN_RUN pages are found, and a copy gets the same boundaries as its original. Runs of zeros become separate
chunks, which are never fetched. Large mappings begin a chunk, so that snapshots with a common mapping (weights)
share its chunks.

The hashes (XXH3, 64 bits) only choose boundaries; BLAKE3 digests decide whether chunks are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from checkpoint.criu.images import messages, nested, number
from checkpoint.criu.pagemap import BadImage, read_page_map
from checkpoint.errors import Integrity

PAGE = 4096
MIN_RUN = 8
"""Minimum run in pages. On vLLM and SGLang, 98 % of SGLang's 185 MB of copies are in runs this long; shorter runs cost a request each."""
CHUNK = 8 << 20
"""Maximum chunk size in bytes, the same as lazyfs' own."""
MAPPING = 4 << 20
"""A mapping with at least this many dumped bytes begins a chunk."""
_BLOCK = 4 << 20

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """The chunk lengths by file name, in order, and the bytes in runs of zeros and in copies of earlier runs."""

    lengths: dict[str, list[int]]
    zero: int
    copies: int


def plan(images: Path, holes: Mapping[str, Sequence[tuple[int, int]]] = {}, longest: int = CHUNK) -> Found:
    """Choose chunk boundaries for every `pages-N.img` of a folder.

    `holes`: byte ranges (start, end) by file that are stored elsewhere and count as unlike all others. `longest`:
    maximum bytes of a chunk. Raises Integrity when an image cannot be read. A page file without a page map is split
    evenly.
    """
    files = sorted((f for f in images.glob("pages-*.img")), key=lambda f: (len(f.name), f.name))
    if not files:
        return Found({}, 0, 0)
    hashes = [page_hashes(file) for file in files]
    ends = np.cumsum([len(h) for h in hashes])
    bounds = np.concatenate([[0], ends])
    joined = np.concatenate(hashes)
    for file, low in zip(files, bounds.tolist(), strict=False):
        for start, end in holes.get(file.name, ()):
            # Make these pages unique, so that they form neither copies nor runs of zeros.
            joined[low + start // PAGE : low + end // PAGE] = (
                np.arange(start // PAGE, end // PAGE, dtype=np.uint64) + low
            )
    boundaries, zero, copies = _boundaries(joined, ends)
    mappings = _mappings(images)
    lengths = {}
    for index, file in enumerate(files):
        low, high = int(bounds[index]), int(bounds[index + 1])
        own = {int(c) - low for c in boundaries[(boundaries > low) & (boundaries < high)]} | mappings.get(
            file.name, set()
        )
        lengths[file.name] = _split(
            sorted(c for c in own if 0 < c < high - low), high - low, file.stat().st_size, longest
        )
    return Found(lengths, zero * PAGE, copies * PAGE)


def page_hashes(file: Path) -> npt.NDArray[np.uint64]:
    """Return the XXH3 of every whole page; a shorter remainder is skipped. Raises Integrity (image-unreadable)."""
    digest = xxhash.xxh3_64_intdigest
    block = bytearray(_BLOCK)
    view, at = memoryview(block), 0
    try:
        found = np.empty(file.stat().st_size // PAGE, dtype=np.uint64)
        with file.open("rb") as source:
            while at < len(found) and (pages := source.readinto(block) // PAGE):
                found[at : at + pages] = [digest(view[i : i + PAGE]) for i in range(0, pages * PAGE, PAGE)]
                at += pages
    except OSError as error:
        raise Integrity("image-unreadable", f"{file}: {error.strerror}") from error
    return found[:at]


def _boundaries(pages: npt.NDArray[np.uint64], ends: _Ints) -> tuple[_Ints, int, int]:
    """Return the page numbers (over all files) at which a chunk must begin.

    Also returns the number of pages in zero runs and in copies.
    """
    count = len(pages)
    if not count:
        return np.empty(0, dtype=np.int64), 0, 0
    here = np.arange(count, dtype=np.int64)
    _, first, inverse = np.unique(pages, return_index=True, return_inverse=True)
    origin = first[inverse].astype(np.int64)
    is_zero = pages == np.uint64(xxhash.xxh3_64_intdigest(bytes(PAGE)))
    is_copy = (origin < here) & ~is_zero
    # A run has a constant distance from its original (0: an original, -1: zeros) and crosses no file border on either
    # side.
    distance = np.where(is_zero, -1, np.where(is_copy, here - origin, 0))
    file = np.searchsorted(ends, here, side="right")
    begins = np.ones(count, dtype=bool)
    begins[1:] = (np.diff(distance) != 0) | (np.diff(file) != 0) | (is_copy[1:] & (np.diff(file[origin]) != 0))
    starts = np.flatnonzero(begins)
    lengths = np.diff(np.append(starts, count))
    long = lengths >= MIN_RUN
    zeros = long & (distance[starts] == -1)
    copies = long & (distance[starts] > 0)
    edges = [starts[zeros], starts[zeros] + lengths[zeros]]
    copy_starts, copy_lengths, copy_distances = starts[copies], lengths[copies], distance[starts[copies]]
    edges += [copy_starts, copy_starts + copy_lengths]
    originals = np.unique(
        np.concatenate([copy_starts - copy_distances, copy_starts - copy_distances + copy_lengths, *edges, ends])
    )
    # A boundary in an original also applies to its copies. Originals are first occurrences, so no copy is another
    # copy's original.
    for start, length, distant in zip(
        copy_starts.tolist(), copy_lengths.tolist(), copy_distances.tolist(), strict=True
    ):
        low, high = np.searchsorted(originals, [start - distant, start - distant + length])
        edges.append(originals[low:high] + distant)
    boundaries = np.unique(np.concatenate([originals, *edges]))
    return boundaries, int(lengths[zeros].sum()), int(copy_lengths.sum())


def _mappings(images: Path) -> dict[str, set[int]]:
    """Return, by pages file, the page numbers in it at which the pages of large mappings begin."""
    found: dict[str, set[int]] = {}
    for page_map in images.glob("pagemap-*.img"):
        memory = images / page_map.name.replace("pagemap-", "mm-")
        if not memory.exists():
            continue  # shared memory: one mapping
        try:
            pages_file, runs = read_page_map(str(page_map))
        except (BadImage, OSError) as error:
            raise Integrity("image-garbled", str(error)) from error
        starts = np.array(sorted(number(v, 1) for m in messages(memory) for v in nested(m, 14)), dtype=np.uint64)
        first: dict[int, int] = {}
        size: dict[int, int] = {}
        for start, end, offset, _ in runs:
            mapping = int(np.searchsorted(starts, np.uint64(start), side="right"))
            first.setdefault(mapping, offset // PAGE)
            size[mapping] = size.get(mapping, 0) + end - start
        found[pages_file] = {first[mapping] for mapping in first if size[mapping] >= MAPPING}
    return found


def _split(boundaries: list[int], pages: int, size: int, longest: int) -> list[int]:
    """Return chunk lengths in bytes: none exceeds `longest`, and equal runs are split alike."""
    lengths: list[int] = []
    for low, high in zip([0, *boundaries], [*boundaries, pages], strict=True):
        left = (high - low) * PAGE
        while left > 0:
            lengths.append(min(left, longest))
            left -= longest
    rest = size - pages * PAGE
    return [*lengths, rest] if rest else lengths
