"""Run a module of this package in a process of its own, whatever lies in the working directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])


def own_module(name: str) -> list[str]:
    """Return the words that run a module as a script.

    Python does not search the working directory for it (-P), which may hold a `plugin` of the user's, unless that directory
    is this package's own: there it may be the only way to find it.
    """
    try:
        inside = os.getcwd() == ROOT
    except OSError:  # the directory was removed
        inside = False
    return [sys.executable, *([] if inside else ["-P"]), "-m", name]
