"""This package's errors, by kind.

CheckpointError
├── HostLacks       this host cannot do it, whatever the snapshot (no CRIU, a missing privilege, an old kernel)
├── Incompatible    this snapshot does not fit this host or this launch (another kernel, CPU, engine, argument)
├── Integrity       bytes are not what was recorded (a flipped bit, a truncated or missing file, a wrong signature)
├── NotFound        no snapshot of that name
├── Busy            another process holds a needed lock; a later attempt may succeed
└── Failed          the operation itself failed (CRIU's own error, a full disk, a process that died)

Every error has a stable `code` in kebab-case, which logs, metrics and `--json` show, and a one-line message with the
cause and the remedy.
"""

from __future__ import annotations

from lazyfs.errors import one_line


class CheckpointError(Exception):
    """Base of this package's errors; `str()` is one line that ends with the remedy."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(one_line(message))
        self.code = code

    def __str__(self) -> str:
        return f"{self.code}: {self.args[0]}"


class HostLacks(CheckpointError):
    """This host cannot do it, whatever the snapshot."""


class Incompatible(CheckpointError):
    """This snapshot does not fit this host or this launch; `reasons` lists every mismatch by its code."""

    def __init__(self, code: str, message: str, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(code, message)
        self.reasons = reasons or (code,)


class Integrity(CheckpointError):
    """Bytes are not what was recorded."""


class NotFound(CheckpointError):
    """No snapshot of that name."""


class Busy(CheckpointError):
    """Another process holds a needed lock."""


class Failed(CheckpointError):
    """The operation itself failed."""
