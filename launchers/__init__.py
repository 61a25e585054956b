"""What is particular to an engine: its command line, environment, readiness, warm-up, making it small and waking it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launchers.base import Engine

ENGINES = ("vllm", "sglang")


def engine(name: str) -> Engine:
    """The launcher of an engine by its name. Raises Usage for a name that is none, listing those that are."""
    if name == "vllm":
        from launchers.vllm import Vllm

        return Vllm()
    if name == "sglang":
        from launchers.sglang import Sglang

        return Sglang()
    from launchers.errors import Usage

    raise Usage("unknown-engine", f"there is no engine {name!r}; quickthaw knows {' and '.join(ENGINES)}")
