"""Exceptions of the launchers.

LauncherError
├── Usage           invalid command line (unknown engine, no model)
├── BadModel        the model directory cannot be served (no weights, no config)
├── EngineDied      the engine exited before it served; has its exit code and last lines
└── EngineFailed    the engine runs but fails (no generation, a refused operation, a timeout)
"""

from __future__ import annotations


class LauncherError(Exception):
    """Base class. `str()` is one line that starts with the stable code and ends with the remedy."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __str__(self) -> str:
        return f"{self.code}: {self.args[0]}"

    @property
    def public(self) -> str:
        """The message for HTTP clients, without the engine's own output, which is for the log and the admin endpoints."""
        return str(self.args[0])


class Usage(LauncherError):
    """Invalid command line."""


class BadModel(LauncherError):
    """The model directory cannot be served."""


class EngineDied(LauncherError):
    """The engine exited before it served.

    `exit_code` is negative for a signal; `last_lines` are its last lines of output.
    """

    def __init__(self, code: str, message: str, exit_code: int, last_lines: str) -> None:
        super().__init__(code, f"{message}; its last lines: {last_lines}")
        self.exit_code = exit_code
        self._public = message

    @property
    def public(self) -> str:
        """The message without the engine's output."""
        return f"{self._public}; see the launcher's log"


class EngineFailed(LauncherError):
    """The engine runs but a requested operation fails.

    `words`: the engine's own message, which is not sent to clients; `status`: the HTTP status with which it refused, or 0.
    """

    def __init__(self, code: str, message: str, words: str = "", status: int = 0) -> None:
        super().__init__(code, f"{message}: {words}" if words else message)
        self._public = f"{message}; see the launcher's log" if words else message
        self.status = status

    @property
    def public(self) -> str:
        """The message without the engine's words."""
        return self._public
