"""Where everything of quickthaw's lies on this host. Of its own, since a command asks for it before it imports anything else."""

from __future__ import annotations

import os
from pathlib import Path


def state_home() -> Path:
    """`$QUICKTHAW_HOME`, or `~/.cache/quickthaw`."""
    return Path(os.environ.get("QUICKTHAW_HOME") or Path.home() / ".cache" / "quickthaw")
