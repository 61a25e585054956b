"""The mount's daemon process: `python -m lazyfs.mount.daemon SOCKET CONFIG-FD READY-FD MODE`.

SOCKET only identifies the mount in the process list. The daemon detaches before any slow import, mounts, reports ready (or
the error) through READY-FD, and runs until the mount is gone, by whatever means it was unmounted. It never touches a path
below its mount.
"""

from __future__ import annotations

import json
import os
import sys


def detach(log_file: str) -> None:
    """Detach from the caller: become a child of init in a new session, with standard streams on the log file."""
    if os.fork() != 0:
        os._exit(0)
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)


def main() -> None:
    """Serve until unmounted."""
    config_fd, ready_fd, mode = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    try:
        text = os.pread(config_fd, os.fstat(config_fd).st_size, 0).decode()
        os.close(config_fd)
        if mode == "detached":
            detach(json.loads(text)["log_file"])
        from lazyfs.mount.server import serve

        serve(text, lambda answer: _tell(ready_fd, answer))
        # Threads may still block in reads of a connection that other namespaces keep; only closing it ends them.
        os._exit(0)
    except Exception as error:
        _tell(
            ready_fd,
            {
                "ok": False,
                "code": getattr(error, "code", "internal"),
                "error": str(error),
                "kind": type(error).__name__,
            },
        )
        raise


def _tell(fd: int, answer: dict[str, object]) -> None:
    try:
        os.write(fd, json.dumps(answer).encode() + b"\n")
        os.close(fd)
    except OSError:
        # The waiting process is gone; keep serving for later ones.
        return


if __name__ == "__main__":
    main()
