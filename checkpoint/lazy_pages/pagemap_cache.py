"""Cache the page maps in CRIU's images as `.verified-pages` in the snapshot's folder.

Reading the cache takes 2 ms, reading the images 60. The cache holds fingerprints of its image files (device, inode,
size, mtime, ctime) and a digest of itself, because a wrong offset would put wrong bytes into memory. If anything
differs, the images are read again. The name shares the prefix of the verification ledger: such files belong to this
host, and archives neither include nor provide them. Standard library only.
"""

from __future__ import annotations

import os
from threading import get_ident

try:
    from _blake2 import blake2b as blake2b
except ImportError:
    from hashlib import blake2b as blake2b  # identical, but also loads OpenSSL, which delays a restore by 4 ms

from checkpoint.criu.pagemap import ProcessImage, process_ids, read_process
from checkpoint.lazy_pages import cache_file

Stamps = list[tuple[str, int, int, int, int, int]]

FILE_NAME = ".verified-pages"
_VERSION = 4


def read(images: str, now: Stamps) -> tuple[dict[int, ProcessImage], bool]:
    """Return the page map of every process in a folder of images, and whether it came from the cache.

    `now`: what `stamps` has just returned. Raises BadImage, or OSError when a file is missing.
    """
    known = _known(images, now)
    if known is not None:
        return known, True
    return {pid: read_process(images, pid) for pid in process_ids(images)}, False


def keep(images: str, read_from: Stamps, found: dict[int, ProcessImage]) -> OSError | None:
    """Cache the result of `read` for the next restore.

    `read_from`: the stamps that were given to `read`. By now the folder may hold another snapshot's images, which the
    cache must not be believed of. Return the error if it could not be written; then images are read again.
    """
    processes, sections = [], []
    for image in found.values():
        processes.append([image.pid, image.pages_file])
        sections += [cache_file.flat(runs) for runs in (image.runs, image.mapped, image.eager, image.wiped_on_fork)]
        sections.append(cache_file.flat([image.borders]))
    head = {"version": _VERSION, "images": read_from, "processes": processes}
    return write(images, FILE_NAME, cache_file.packed(head, sections))


def write(images: str, name: str, body: bytes) -> OSError | None:
    """Write `body` to a file beside the folder of images, atomically.

    Return the error if it could not be written.
    """
    target = path(images, name)
    new = f"{target}.{os.getpid()}.{get_ident()}"  # one process may serve several trees
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


def checked(images: str, name: str) -> memoryview:
    """Return the body that `write` wrote. Raises OSError if it is missing, ValueError if it is damaged."""
    with open(path(images, name), "rb") as file:
        data = file.read()
    body = memoryview(data)[64:]
    if blake2b(body).digest() != data[:64]:
        raise ValueError(f"{name} is damaged")
    return body


def _known(images: str, now: Stamps) -> dict[int, ProcessImage] | None:
    try:
        head, sections = cache_file.unpacked(checked(images, FILE_NAME))
        if head["version"] != _VERSION or not same(head["images"], now):
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


def same(kept_stamps: object, now: Stamps) -> bool:
    """Return whether cached fingerprints equal the files' current ones."""
    return kept_stamps == [list(stamp) for stamp in now]


def path(images: str, name: str) -> str:
    """Return the path of a file beside a folder of images."""
    return os.path.join(os.path.dirname(images.rstrip("/")), name)


def stamps(images: str) -> Stamps:
    """Return fingerprints of the files that define where pages lie."""
    found = []
    with os.scandir(images) as entries:
        for entry in entries:
            if entry.name.startswith(("pagemap-", "mm-")):
                info = entry.stat()
                found.append((entry.name, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns))
    return sorted(found)
