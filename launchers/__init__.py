"""Engine launchers: command line, environment, readiness, warm-up, and trimming before a dump, per engine.

To add an engine: write a subclass of `launchers.base.Engine` in a module of its own and name it in `ENGINES`. Tables in
`command_words`, `options.known` and `model_source` hold what else differs between engines; an engine need not be in them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launchers.base import Engine

ENGINES = {"vllm": ("launchers.vllm", "Vllm"), "sglang": ("launchers.sglang", "Sglang")}
"""Module and class of each engine, by its name on the command line."""


def engine(name: str) -> Engine:
    """Return the launcher of an engine by its name.

    Raises Usage (unknown-engine), listing the known names.
    """
    if name not in ENGINES:
        from launchers.errors import Usage

        raise Usage("unknown-engine", f"there is no engine {name!r}; quickthaw knows {' and '.join(ENGINES)}")
    module, kind = ENGINES[name]
    found: Engine = getattr(importlib.import_module(module), kind)()
    return found
