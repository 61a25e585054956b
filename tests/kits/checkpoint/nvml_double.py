"""A double of libnvidia-ml, which nvidia-ml-py loads in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml
import pytest

NOT_SUPPORTED = 3


class Nvml:
    """The answers of libnvidia-ml for two GPUs.

    `fails` names a function that returns an error. `modes`: by function, the answer for each GPU, or None where it lacks
    that mode: nvmlDeviceGetMigMode, nvmlDeviceGetPersistenceMode.
    """

    def __init__(self, fails: str = "", driver: str = "580.159.03", **modes: list[int | None]) -> None:
        self.fails, self.driver, self.modes = fails, driver, modes
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.fails:
                return 999
            given = [getattr(argument, "_obj", argument) for argument in arguments]
            handle = getattr(given[0], "value", None) if given else None
            if name == "nvmlDeviceGetCount_v2":
                given[0].value = 2
            elif name == "nvmlDeviceGetHandleByIndex_v2":
                given[1].value = 100 + given[0].value
            elif name == "nvmlDeviceGetMemoryInfo":
                given[1].total = 80 << 30
            elif name == "nvmlDeviceGetMinorNumber":
                given[1].value = handle - 100
            elif name in ("nvmlDeviceGetName", "nvmlDeviceGetUUID"):
                given[1].value = b"H100" if name.endswith("Name") else f"GPU-{handle}".encode()
            elif name == "nvmlSystemGetDriverVersion":
                given[0].value = self.driver.encode()
            elif name.endswith("Mode"):
                mode = self.modes.get(name, [None, None])[handle - 100]
                if mode is None:
                    return NOT_SUPPORTED
                given[1].value = mode
            return 0

        return call


def install(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], object]) -> None:
    """Let nvidia-ml-py load its library with `load`."""
    monkeypatch.setattr(pynvml, "CDLL", load)
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
