"""Which layers this host can do, found out in a few system calls, and said once.

A layer that is off never stops a launch (unless `--strict`): the engine then starts as it would alone, with what is left. What only shows
in use is tried out during a cold start (plugin.runtime.trial).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from checkpoint.criu.binary import Criu
from checkpoint.errors import HostLacks
from checkpoint.sandbox.privileges import Privileges, remedy

log = logging.getLogger("quickthaw")
_said: set[str] = set()


@dataclass(frozen=True)
class Layers:
    """For each layer None where it works, else why it is off and the remedy, in one line.

    `pages`: restores that go on while pages are still to come (the working set first); without it every page is put in place before.
    """

    mount: str | None = None
    sandbox: str | None = None
    snapshots: str | None = None
    pages: str | None = None

    def off(self) -> dict[str, str]:
        """Return why layers are off, by their names; those that are off for one reason together."""
        named = {"lazy weights": self.mount, "sandbox": self.sandbox, "snapshots": self.snapshots}
        if self.snapshots is None:
            named["pages on demand"] = self.pages
        together: dict[str, list[str]] = {}
        for name, why in named.items():
            if why:
                together.setdefault(why, []).append(name)
        return {", ".join(names): why for why, names in together.items()}

    def say(self) -> None:
        """Log what is off; each reason once, however many replicas find it out."""
        for names, why in self.off().items():
            if why not in _said:
                _said.add(why)
                log.warning("%s off: %s", names, why)

    @classmethod
    def none(cls, why: str) -> Layers:
        """Return layers that are all off for one reason."""
        return cls(why, why, why, why)


def judge(found: Privileges) -> Layers:
    """Return what these privileges allow. Where the base is missing, the reason names everything that all layers need."""
    if found.missing("sandbox"):
        return Layers.none(remedy(found.missing("mount", "sandbox", "snapshots", "pages")))
    reasons = {layer: found.missing(layer) for layer in ("mount", "snapshots", "pages")}
    return Layers(**{layer: remedy(names) if names else None for layer, names in reasons.items()})


def detect(home: Path) -> tuple[Layers, Criu | None]:
    """Return what this host offers, and its CRIU. Takes under a millisecond, but where a CRIU is asked for its version the first time."""
    layers = judge(Privileges.here())
    if layers.snapshots:
        return layers, None
    try:
        return layers, Criu.find(home)
    except HostLacks as error:
        return Layers(layers.mount, layers.sandbox, str(error), layers.pages), None
