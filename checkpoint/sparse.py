"""Find the data in sparse files.

Engines map hundreds of megabytes of shared memory and write a few pages of them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator


def extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each data extent in the first `size` bytes of an open file.

    Extents are ascending, with holes between them.

    Raises OSError.
    """
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # a hole to the end
            raise
        if start >= size:
            return
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, at
