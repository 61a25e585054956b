"""Detect which capabilities this host has, in a few system calls, and log once which are off.

A missing capability never stops a launch (unless `--strict`): the engine starts as it would alone, with the remaining
ones. What only shows in use is tested during a cold start (plugin.runtime.steps.trial).
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
    """For each capability None if it works, else why it is off and the remedy, in one line.

    `pages`: on-demand paging, which lets a restore resume while pages are still to come (working set first). Without it
    every page is loaded before the engine resumes.
    """

    mount: str | None = None
    sandbox: str | None = None
    snapshots: str | None = None
    pages: str | None = None

    def off(self) -> dict[str, str]:
        """Return the reasons by capability name; names that share a reason are joined into one key."""
        named = {"lazy weights": self.mount, "sandbox": self.sandbox, "snapshots": self.snapshots}
        if self.snapshots is None:
            named["pages on demand"] = self.pages
        together: dict[str, list[str]] = {}
        for name, why in named.items():
            if why:
                together.setdefault(why, []).append(name)
        return {", ".join(names): why for why, names in together.items()}

    def say(self) -> None:
        """Log each reason once, however many replicas find it."""
        for names, why in self.off().items():
            if why not in _said:
                _said.add(why)
                log.warning("%s off: %s", names, why)

    @classmethod
    def none(cls, why: str) -> Layers:
        """Return capabilities that are all off for one reason."""
        return cls(why, why, why, why)


def judge(found: Privileges) -> Layers:
    """Return the capabilities that these privileges allow.

    Without the privileges for a sandbox all are off, and the reason names everything that all of them need.
    """
    if found.missing("sandbox"):
        return Layers.none(remedy(found.missing("mount", "sandbox", "snapshots", "pages")))
    reasons = {layer: found.missing(layer) for layer in ("mount", "snapshots", "pages")}
    return Layers(**{layer: remedy(names) if names else None for layer, names in reasons.items()})


def detect(home: Path) -> tuple[Layers, Criu | None]:
    """Return this host's capabilities and its CRIU, if any.

    Takes under 1 ms, except the first time, when CRIU is run for its version.
    """
    layers = judge(Privileges.here())
    if layers.snapshots:
        return layers, None
    try:
        return layers, Criu.find(home)
    except HostLacks as error:
        return Layers(layers.mount, layers.sandbox, str(error), layers.pages), None
