"""Engine launchers: command line, environment, readiness, warm-up, and trimming before a dump, per engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launchers.base import Engine

ENGINES = ("vllm", "sglang")


def engine(name: str) -> Engine:
    """Return the launcher of an engine by its name.

    Raises Usage (unknown-engine), listing the known names.
    """
    if name == "vllm":
        from launchers.vllm import Vllm

        return Vllm()
    if name == "sglang":
        from launchers.sglang import Sglang

        return Sglang()
    from launchers.errors import Usage

    raise Usage("unknown-engine", f"there is no engine {name!r}; quickthaw knows {' and '.join(ENGINES)}")
