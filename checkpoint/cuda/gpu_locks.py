"""Lock GPUs for one restore, on this host and in its containers.

If two restores both found the same memory free, one replica would be lost. A lock is an exclusive flock on every
file that another restore on this host might know, too: `gpu-UUID.lock` in each lock folder (the host's own, and that of
the state folder, which containers may share), and the GPU's device file. NVIDIA's container runtime binds the host's
/dev/nvidiaN into each container, so that its lock reaches them all; a device file that a runtime made anew for a container
locks nothing outside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from checkpoint.errors import Busy, Failed

LOCKS = Path("/run/quickthaw")
LOCK_WAIT_TIMEOUT_S = 300.0


@contextlib.contextmanager
def gpu_locks(
    folders: Iterable[Path],
    gpus: Iterable[str],
    nodes: Mapping[str, Path] | None = None,
    timeout_s: float | None = None,
) -> Iterator[None]:
    """Lock GPUs (uuids); `nodes` has their device files. A file that cannot be opened is skipped if another one can.

    Raises Busy (gpu-busy), Failed (gpu-lock-failed).
    """
    timeout_s = LOCK_WAIT_TIMEOUT_S if timeout_s is None else timeout_s
    limit = time.monotonic() + timeout_s
    with contextlib.ExitStack() as opened:
        # The same order in every process prevents deadlocks.
        for uuid in sorted(gpus):
            refused: OSError | None = None
            files = 0
            for file in [*(folder / f"gpu-{uuid}.lock" for folder in folders), (nodes or {}).get(uuid)]:
                try:
                    fd = _open(file) if file else None
                except OSError as error:
                    refused = error
                    continue
                if fd is None:
                    continue
                opened.callback(os.close, fd)
                files += 1
                _lock(fd, uuid, limit, timeout_s)
            if not files and refused:
                raise Failed(
                    "gpu-lock-failed", f"cannot lock GPU {uuid} for a restore: {refused}; make the folder writable"
                )
        yield


def _open(file: Path) -> int:
    if file.name.startswith("gpu-"):
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def _lock(fd: int, uuid: str, limit: float, timeout_s: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > limit:
                raise Busy("gpu-busy", f"another restore has been using GPU {uuid} for {timeout_s:.0f} s") from None
            time.sleep(0.005)
