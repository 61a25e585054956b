"""An engine that runs somewhere, restored or started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.sandbox import Sandbox
from launchers.client import Client

if TYPE_CHECKING:
    from checkpoint.snapshot import Restored
    from launchers.bare import BareProcess
    from launchers.base import EngineCommand
    from plugin.output import Output


def client_of(place: Sandbox | BareProcess, port: int, command: EngineCommand) -> Client:
    """How the launcher calls the engine at `place`, with the keys of its command line; control is for a sandboxed one."""
    folder = place.control_dir if isinstance(place, Sandbox) else None
    return Client(lambda: place.connect(port), command.api_key, admin_token=command.admin_key, control_dir=folder)


@dataclass
class Running:
    """An engine that runs somewhere, and how to reach it."""

    place: Sandbox | BareProcess
    pid: int
    port: int
    client: Client
    outputs: dict[str, Output]
    restored: Restored | None = None

    def close(self) -> None:
        """End it and everything made for it."""
        if self.restored:
            self.restored.close()
        else:
            self.place.close()

    def last_words(self) -> str:
        """The last line that it printed on the stream that explains most."""
        words = self.outputs["stderr"].last()
        return self.outputs["stdout"].last() if words.startswith("(") else words
