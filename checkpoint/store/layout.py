"""The order of an archive whose snapshot's working set is known: data needed first lies together, in its own chunks.

Such an archive has three kinds of files:

    first.index            which extents of which files `first.bytes` consists of, in order
    first.bytes            small files and the pages that CRIU itself copies; then the working set up to the first
                           token, in the order of need; then the pages of the next requests
    images/pages-N.rest    pages-N.img with zeros in place of the pages in `first.bytes` (zeros compress to nothing)

All other files (large ones, the manifest, its signature) are stored unchanged. The suffix `.rest` keeps programs
from using such a file as an image when a mount shows the archive, because its missing pages read as zeros.
`Layout.extents` maps each byte of an archive to its place in the snapshot's folder, and `Layout.locate` maps back.
The index is validated: it may only name complete pages of page files, or complete small files, each once.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from checkpoint.errors import Integrity
from lazyfs.content.records import ready

if TYPE_CHECKING:
    from lazyfs.content.manifest import Manifest

BYTES, INDEX = "first.bytes", "first.index"
REST = ".rest"
PAGE = 4096
SMALL = 256 << 10
"""Size limit of small files in bytes. Larger files keep their own chunks, which other snapshots may share."""
CHUNK = 1 << 20
"""Maximum chunk size of `first.bytes`. Chunks in flight share the link, so they arrive together instead of in the order
of need: twelve of this size take a twentieth of a second at 1 Gbit/s. Shorter chunks cost a request each."""
REST_CHUNK = 1 << 20
"""Maximum chunk size of a `.rest` file: a fault on a page outside the working set waits for its chunk."""
_VERSION = 1
_PAGES = re.compile(r"images/pages-\d+\.img")
_ALONE = ("manifest.json", "manifest.sig")
_WORKING_SET = "working-set"

Extent = tuple[str, int, int, int]
"""(path below the snapshot's folder, offset there, offset within the requested range, length)"""


class _Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The index file.

    `extents`: (number of the path, offset, length). The first `start` extents are read by CRIU or before it, those up
    to `first` before the first token. `modes`: of the paths. `sizes`: of the page files, by path.
    """

    version: int
    paths: list[str]
    modes: list[int]
    sizes: dict[str, int]
    extents: list[tuple[int, int, int]] = msgspec.field(name="pieces")
    start: int
    first: int


class Layout:
    """Maps archive bytes to snapshot bytes.

    CRIU reads `first.bytes` below `start`; bytes below `first` precede the first token.
    """

    def __init__(self, index: _Index) -> None:
        self.index = index
        self.ends: list[int] = []
        at = 0
        for _, _, length in index.extents:
            at += length
            self.ends.append(at)
        self.size = at
        self.start = self.ends[index.start - 1] if index.start else 0
        self.first = self.ends[index.first - 1] if index.first else 0
        self.small = {  # path → (size, mode)
            index.paths[path]: (length, index.modes[path])
            for path, _, length in index.extents
            if index.paths[path] not in index.sizes
        }
        # For each page file: holes in `.rest`, ascending, as (start, end, offset in first.bytes).
        self.holes: dict[str, list[tuple[int, int, int]]] = {path: [] for path in index.sizes}
        for (path, offset, length), end in zip(index.extents, self.ends, strict=True):
            name = index.paths[path]
            if name in self.holes:
                self.holes[name].append((offset, offset + length, end - length))
        for holes in self.holes.values():
            holes.sort()

    @staticmethod
    def target(path: str) -> str:
        """Return the snapshot's file to which a file of the archive contributes."""
        return path.removesuffix(REST) + ".img" if path.endswith(REST) else path

    def extents(self, path: str, offset: int, length: int) -> list[Extent]:
        """Return where [offset, offset + length) of an archive file belongs.

        Zeros that stand for pages in `first.bytes` are skipped.
        """
        if path == BYTES:
            return self._extents_of_first_bytes(offset, length)
        name = self.target(path)
        if name == path or name not in self.holes:
            return [(path, offset, 0, length)]
        found, at, end = [], offset, offset + length
        holes = self.holes[name]
        for low, high, _ in holes[max(0, bisect_right(holes, (offset,)) - 1) :]:
            if low >= end:
                break
            if high <= at:
                continue
            if low > at:
                found.append((name, at, at - offset, low - at))
            at = min(high, end)
        if at < end:
            found.append((name, at, at - offset, end - at))
        return found

    def _extents_of_first_bytes(self, offset: int, length: int) -> list[Extent]:
        found = []
        position, end = offset, offset + length
        number_ = bisect_right(self.ends, offset)
        while position < end:
            path, at, size = self.index.extents[number_]
            begin = self.ends[number_] - size
            take = min(self.ends[number_], end) - position
            found.append((self.index.paths[path], at + position - begin, position - offset, take))
            position += take
            number_ += 1
        return found

    def locate(self, path: str, offset: int) -> tuple[str, int, int]:
        """Locate a byte of a page file: (file of the archive, offset there, number of bytes available from there)."""
        holes = self.holes[path]
        index = bisect_right(holes, (offset, 1 << 62)) - 1
        if index >= 0 and offset < holes[index][1]:
            low, high, at = holes[index]
            return BYTES, at + offset - low, high - offset
        following = holes[index + 1][0] if index + 1 < len(holes) else self.index.sizes[path]
        return rest_path(path), offset, following - offset

    def lengths(self) -> list[int]:
        """Return the chunk lengths of `first.bytes`.

        CRIU's data, the working set and later pages do not share chunks.
        """
        found = []
        for low, high in ((0, self.start), (self.start, self.first), (self.first, self.size)):
            found += [min(CHUNK, high - at) for at in range(low, high, CHUNK)]
        return found

    def holes_by_name(self) -> dict[str, list[tuple[int, int]]]:
        """Return, for each page file in `images/`, the byte ranges (start, end) that lie in `first.bytes`, ascending."""
        return {
            path.removeprefix("images/"): [(low, high) for low, high, _ in holes] for path, holes in self.holes.items()
        }

    def check(self, archive: Manifest) -> None:
        """Check that an archive holds what its index says. Raises Integrity (layout-garbled)."""
        files = {file.path: file.size for file in archive.files}
        folders = {""} | {directory.path for directory in archive.directories}
        rests = {self.target(path): size for path, size in files.items() if path.endswith(REST)}
        clash = any(path in files or path.rpartition("/")[0] not in folders for path in self.small)
        if files.get(BYTES) != self.size or rests != self.index.sizes or clash or any(path in files for path in rests):
            raise Integrity("layout-garbled", "the archive does not match its own index; push the snapshot again")

    def encode(self) -> bytes:
        """Encode the index file."""
        return msgspec.json.encode(self.index)


def rest_path(path: str) -> str:
    """Return the archive file that holds the rest of a page file, outside `first.bytes`."""
    return path.removesuffix(".img") + REST


def decode(data: bytes) -> Layout:
    """Decode an index file. Raises Integrity (layout-garbled) for invalid input."""
    try:
        index = msgspec.json.decode(data, type=ready(_Index))
    except msgspec.MsgspecError as error:
        raise Integrity("layout-garbled", f"the archive's index is damaged: {error}") from error
    if index.version != _VERSION:
        raise Integrity(
            "layout-garbled", f"the archive's index has version {index.version}, and this quickthaw reads {_VERSION}"
        )
    _check(index)
    return Layout(index)


def _check(index: _Index) -> None:
    consistent = len(set(index.paths)) == len(index.paths) == len(index.modes)
    if not consistent or not 0 <= index.start <= index.first <= len(index.extents):
        raise Integrity("layout-garbled", "the archive's index contradicts itself; push the snapshot again")
    for name in (*index.paths, *index.sizes):
        within = "/" in name and "\0" not in name and not any(part in ("", ".", "..") for part in name.split("/"))
        if not within and name != _WORKING_SET:
            raise Integrity("layout-garbled", f"the archive's index holds the invalid path {name!r}")
    by_path: dict[int, list[tuple[int, int]]] = {}
    for path, offset, length in index.extents:
        if not 0 <= path < len(index.paths) or offset < 0 or length <= 0:
            raise Integrity("layout-garbled", "the archive's index holds an impossible extent")
        by_path.setdefault(path, []).append((offset, offset + length))
    for path, ranges in by_path.items():
        name = index.paths[path]
        if name in index.sizes:
            ranges.sort()
            aligned = all(low % PAGE == 0 and high % PAGE == 0 for low, high in ranges)
            apart = all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
            if not _PAGES.fullmatch(name) or not aligned or not apart or ranges[-1][1] > index.sizes[name]:
                raise Integrity(
                    "layout-garbled", f"the archive's index places pages of {name} outside the file, or twice"
                )
        elif len(ranges) != 1 or ranges[0][0] or ranges[0][1] >= SMALL or name in _ALONE:
            raise Integrity("layout-garbled", f"the archive's index holds parts of {name}")


def plan(folder: Path, files: Sequence[tuple[str, int, int]], links: Mapping[str, str]) -> Layout | None:
    """Plan the layout of a snapshot's folder.

    Return None if it has no recorded working set, or pages cannot be separated.

    `files`: path, size and mode of each file. `links`: paths that are another name of a file, which an archive does
    not store twice.
    """
    from checkpoint.criu.pagemap import process_ids, read_process
    from checkpoint.lazy_pages.working_set import BadWorkingSet, WorkingSet

    sizes = {path: size for path, size, _ in files if path not in links}
    modes = {path: mode for path, _, mode in files}
    pages = {path: size for path, size in sizes.items() if _PAGES.fullmatch(path)}
    try:
        known = WorkingSet.load(str(folder / _WORKING_SET))
        images = {pid: read_process(str(folder / "images"), pid) for pid in process_ids(str(folder / "images"))}
        by_criu = _read_by_criu(folder, pages)
    except (OSError, BadWorkingSet, ValueError):
        return None
    if not known.first or any(size % PAGE for size in pages.values()):
        return None
    small = [path for path, size in sorted(sizes.items()) if 0 < size < SMALL and path not in pages]
    small = [path for path in small if "/" in path or path == _WORKING_SET]
    paths = [*small, *pages]
    numbers = {path: index for index, path in enumerate(paths)}
    start = [(numbers[path], 0, sizes[path]) for path in small]
    start += [(numbers[path], low, high - low) for path, low, high in by_criu]
    before = known.file_ranges(images)
    after = known.file_ranges(images, before_first_token=False)
    taken: dict[int, list[tuple[int, int]]] = {number_: [] for number_ in numbers.values()}
    for number_, low, length in start:
        taken[number_].append((low, low + length))
    first = _without_overlaps(((numbers[f"images/{name}"], low, length) for name, low, length in before), taken)
    later = _without_overlaps(((numbers[f"images/{name}"], low, length) for name, low, length in after), taken)
    return Layout(
        _Index(
            _VERSION,
            paths,
            [modes[path] for path in paths],
            pages,
            [*start, *first, *later],
            len(start),
            len(start) + len(first),
        )
    )


def _without_overlaps(
    ranges: Iterable[tuple[int, int, int]], taken: dict[int, list[tuple[int, int]]]
) -> list[tuple[int, int, int]]:
    """Return the ranges without those already taken.

    Several processes may share one page file (threads of one process do not).
    """
    found = []
    for path, low, length in ranges:
        high = low + length
        known = taken[path]
        index = max(0, bisect_right(known, (low, 1 << 62)) - 1)
        at = low
        extents = []
        while index < len(known) and known[index][0] < high:
            a, b = known[index]
            if b > at:
                if a > at:
                    extents.append((at, a))
                at = max(at, b)
            index += 1
        if at < high:
            extents.append((at, high))
        for a, b in extents:
            insort(known, (a, b))
            found.append((path, a, b - a))
    return found


def _read_by_criu(folder: Path, pages: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Return the ranges that CRIU itself copies, even with a page server, as merged (path, start, end).

    These are images of shared memory, and pages that the page maps mark as not lazy (private file mappings, locked
    memory and the like).
    """
    from checkpoint.criu.pagemap import read_page_map

    found: list[tuple[str, int, int]] = []
    for page_map in sorted((folder / "images").glob("pagemap-*.img")):
        pages_file, runs = read_page_map(str(page_map))
        path = f"images/{pages_file}"
        for start, end, offset, lazy in runs if path in pages else ():
            if lazy:
                continue
            after = offset + end - start
            if found and found[-1][0] == path and found[-1][2] == offset:
                found[-1] = (path, found[-1][1], after)
            else:
                found.append((path, offset, after))
    return found
