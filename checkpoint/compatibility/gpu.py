"""Read which GPUs this host has and which of them an engine sees."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from checkpoint.errors import HostLacks

_NVML_CONTROL = Path("/dev/nvidiactl")


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One GPU: `name` as reported by the driver, `memory` in bytes, `uuid` as `GPU-…` (may differ at a restore)."""

    name: str
    memory: int
    uuid: str = ""


# GPUs, through NVML


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def gpu_facts(environment: Mapping[str, str] | None = None) -> tuple[tuple[Gpu, ...], str]:
    """Return the GPUs visible under CUDA_VISIBLE_DEVICES, in its order, and the driver's version.

    Returns `((), "")` without a driver. NVML is opened only if /dev/nvidiactl exists, because its start takes tens of
    milliseconds. Raises HostLacks (nvml-missing, nvml-failed).
    """
    if not _NVML_CONTROL.exists():
        return (), ""
    visible = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise HostLacks(
            "nvml-missing", f"there is a GPU and no NVML ({error}); install the driver's libnvidia-ml"
        ) from error
    _nvml(nvml.nvmlInit_v2())
    try:
        count = ctypes.c_uint()
        _nvml(nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        found = [_nvml_gpu(nvml, index) for index in range(count.value)]
        text = ctypes.create_string_buffer(96)
        _nvml(nvml.nvmlSystemGetDriverVersion(text, 96))
    finally:
        nvml.nvmlShutdown()
    return select_visible(tuple(found), visible), text.value.decode()


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


def _nvml_gpu(nvml: ctypes.CDLL, index: int) -> Gpu:
    handle, memory = ctypes.c_void_p(), _Memory()
    name, uuid = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    _nvml(nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)))
    _nvml(nvml.nvmlDeviceGetName(handle, name, 96))
    _nvml(nvml.nvmlDeviceGetUUID(handle, uuid, 96))
    _nvml(nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)))
    return Gpu(name=name.value.decode(), memory=memory.total, uuid=uuid.value.decode())


def _nvml(code: int) -> None:
    if code:
        raise HostLacks("nvml-failed", f"NVML answers with error {code}; does nvidia-smi work on this host?")
