"""Cache the page maps in CRIU's images as `.verified-pages` (checkpoint.lazy_pages.cache_file).

Reading the cache takes 2 ms, reading the images 60. If the images' fingerprints differ, the images are read again.
Standard library only.
"""

from __future__ import annotations

from checkpoint.criu.pagemap import ProcessImage, process_ids, read_process
from checkpoint.lazy_pages import cache_file

FILE_NAME = ".verified-pages"
_VERSION = 4


def read(images: str, stamps: cache_file.Stamps) -> tuple[dict[int, ProcessImage], bool]:
    """Return the page map of every process in a folder of images, and whether it came from the cache.

    `stamps`: the images' fingerprints, just taken. Raises BadImage, or OSError when a file is missing.
    """
    known = _known(images, stamps)
    if known is not None:
        return known, True
    return {pid: read_process(images, pid) for pid in process_ids(images)}, False


def keep(images: str, stamps: cache_file.Stamps, found: dict[int, ProcessImage]) -> OSError | None:
    """Cache the result of `read` for the next restore.

    `stamps`: those given to `read`. By now the folder may hold another snapshot's images, and the cache must not be
    believed of those. Return the error if it could not be written; then images are read again.
    """
    processes, sections = [], []
    for image in found.values():
        processes.append([image.pid, image.pages_file])
        sections += [cache_file.flat(runs) for runs in (image.runs, image.mapped, image.eager, image.wiped_on_fork)]
        sections.append(cache_file.flat([image.borders]))
    head = {"images": stamps, "processes": processes}
    return cache_file.write(images, FILE_NAME, _VERSION, head, sections)


def _known(images: str, stamps: cache_file.Stamps) -> dict[int, ProcessImage] | None:
    try:
        head, sections = cache_file.read(images, FILE_NAME, _VERSION)
        if head["images"] != stamps:
            return None
        found = {}
        parts = iter(sections)
        for pid, pages_file in head["processes"]:
            image = found[int(pid)] = ProcessImage(int(pid), cache_file.pages_file(pages_file))
            image.runs, image.mapped, image.eager = (cache_file.triples(next(parts)) for _ in range(3))
            image.wiped_on_fork, image.borders = cache_file.pairs(next(parts)), cache_file.numbers(next(parts)).tolist()
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        return None  # none yet, of another version, or damaged
    return found
