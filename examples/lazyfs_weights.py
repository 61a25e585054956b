"""Import a model directory, mount it, read it, print the counters of the mount, unmount it.

python examples/lazyfs_weights.py MODEL-DIRECTORY MOUNT-POINT
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from lazyfs.api import import_directory, mount


def run(model: Path, where: Path) -> dict[str, object]:
    """Read every file once and return the status of the mount."""
    started = time.perf_counter()
    digest = import_directory(model, tag="example")
    print(f"{digest[:16]} imported in {time.perf_counter() - started:.3f} s")

    started = time.perf_counter()
    handle = mount(digest, where)
    print(f"mounted by process {handle.pid} in {time.perf_counter() - started:.3f} s")
    try:
        total = sum(len(path.read_bytes()) for path in sorted(where.rglob("*")) if path.is_file())
        print(f"{total} bytes read")
        return handle.status()
    finally:
        handle.unmount(force=True)


if __name__ == "__main__":
    print(run(Path(sys.argv[1]), Path(sys.argv[2]))["counters"])
