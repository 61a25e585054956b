"""Read which GPUs this host has and which of them an engine sees."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from checkpoint.errors import HostLacks

_NVML_CONTROL = Path("/dev/nvidiactl")
_KERNEL_DRIVER = Path("/proc/driver/nvidia/version")


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One GPU: `name` as reported by the driver, `memory` in bytes, `uuid` as `GPU-…` (may differ at a restore)."""

    name: str
    memory: int
    uuid: str = ""


def gpu_facts(environment: Mapping[str, str] | None = None) -> tuple[tuple[Gpu, ...], str]:
    """Return the GPUs visible under CUDA_VISIBLE_DEVICES, in its order, and the driver's version.

    Returns `((), "")` without a driver. NVML is imported and started only if /dev/nvidiactl exists, because that takes
    tens of milliseconds. Raises HostLacks (nvml-missing, nvml-failed).
    """
    if not _NVML_CONTROL.exists():
        return (), ""
    import pynvml

    visible = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    try:
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            found = tuple(
                Gpu(
                    pynvml.nvmlDeviceGetName(handle),
                    pynvml.nvmlDeviceGetMemoryInfo(handle).total,
                    pynvml.nvmlDeviceGetUUID(handle),
                )
                for handle in handles
            )
            driver = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError_LibraryNotFound as error:
        raise HostLacks(
            "nvml-missing", "this host has a GPU but no libnvidia-ml.so.1; install the driver's libnvidia-ml"
        ) from error
    except pynvml.NVMLError as error:
        raise HostLacks("nvml-failed", f"NVML: {error}; see whether nvidia-smi works on this host") from error
    return select_visible(found, visible), driver


def kernel_driver() -> str:
    """Return the version of the NVIDIA driver that the kernel has loaded, also where no GPU is visible; "" without one."""
    try:
        text = _KERNEL_DRIVER.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    found = re.search(r"NVRM version:[^\n]*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else ""


def select_visible(gpus: tuple[Gpu, ...], visible: str | None) -> tuple[Gpu, ...]:
    """Apply CUDA_VISIBLE_DEVICES as CUDA does: indices or UUID prefixes, truncated at the first invalid one."""
    if visible is None:
        return gpus
    chosen = []
    for word in (w.strip() for w in visible.split(",")):
        if word.isdigit() and int(word) < len(gpus):
            chosen.append(gpus[int(word)])
            continue
        matching = [g for g in gpus if word and g.uuid.startswith(word)]
        if len(matching) != 1:
            break
        chosen.append(matching[0])
    return tuple(chosen)
