"""What can go wrong between us and an engine, by kind.

LauncherError
├── Usage           the command line cannot be understood (unknown engine, no model)
├── BadModel        the model directory cannot be served (no weights, no config)
├── EngineDied      the engine ended before it served; carries its exit code and last lines
└── EngineFailed    the engine runs and does not do what it must (no generation, a refused operation, a time-out)
"""

from __future__ import annotations


class LauncherError(Exception):
    """Base; `str()` is one line that starts with the stable code and ends in the way out."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __str__(self) -> str:
        return f"{self.code}: {self.args[0]}"

    @property
    def public(self) -> str:
        """The message for whoever sends a request: without what an engine wrote, which is for the log and the admin pages."""
        return str(self.args[0])


class Usage(LauncherError):
    """The command line cannot be understood."""


class BadModel(LauncherError):
    """The model directory cannot be served."""


class EngineDied(LauncherError):
    """The engine ended before it served. `exit_code` is its own (negative: a signal), `last_words` what it wrote last."""

    def __init__(self, code: str, message: str, exit_code: int, last_words: str) -> None:
        super().__init__(code, f"{message}; its last words: {last_words}")
        self.exit_code = exit_code
        self._public = message

    @property
    def public(self) -> str:
        """The message without the last words."""
        return f"{self._public}; see the launcher's log"


class EngineFailed(LauncherError):
    """The engine runs and does not do what it must."""
