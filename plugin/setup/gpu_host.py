"""What this host's GPUs, and the way they are shared, allow: the lines of `quickthaw doctor` about them.

Read from NVML and /proc; nothing is changed, and no CUDA context is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from checkpoint import host_memory
from checkpoint.cuda.leaving import HANGS_AT_KILL, LEAST_DRIVER, hangs_at_kill, numbers

CONTROL = Path("/dev/nvidiactl")
MPS_PIPES = "/tmp/nvidia-mps"
"""Where the daemon of CUDA's multi-process service (MPS) listens, unless CUDA_MPS_PIPE_DIRECTORY says otherwise."""
HOST_PID_NAMESPACE = 0xEFFFFFFC
"""Inode of the kernel's first PID namespace (PROC_PID_INIT_INO)."""


@dataclass(frozen=True)
class Line:
    """One line of the table, as plugin.doctor.Finding: `state` is `ok`, `note` or `off`."""

    what: str
    state: str
    detail: str
    remedy: str = ""
    administrator: bool = False


@dataclass(frozen=True)
class Device:
    """A GPU: `minor` is the number in /dev/nvidiaN, `memory` is in bytes."""

    index: int
    name: str
    minor: int
    memory: int
    divided: bool
    persistent: bool


def lines(environment: Mapping[str, str] | None = None) -> list[Line]:
    """Return the lines about this host's GPUs; `environment`: an engine's, by default this process's."""
    if not CONTROL.exists():
        return [Line("gpu", "note", "no NVIDIA device: CPU snapshots only")]
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            devices = [_device(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
            driver = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return [Line("gpu", "off", f"NVML: {error}", "install the driver's libnvidia-ml, or check the driver", True)]
    return [
        _gpus(devices, driver),
        *_bindings(),
        *_kill(driver),
        *_divided(devices),
        *_device_files(devices),
        *_mps(os.environ if environment is None else environment),
        *_container(),
        *_host_memory(devices),
        *_persistence(devices),
    ]


def _device(nvml: Any, index: int) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def mode(ask: Any) -> Any:
        try:
            return ask(handle)
        except nvml.NVMLError:
            return None  # a GPU without this mode

    divided, persistence = mode(nvml.nvmlDeviceGetMigMode), mode(nvml.nvmlDeviceGetPersistenceMode)
    return Device(
        index,
        nvml.nvmlDeviceGetName(handle),
        nvml.nvmlDeviceGetMinorNumber(handle),
        nvml.nvmlDeviceGetMemoryInfo(handle).total,
        bool(divided and divided[0]),
        persistence != 0,
    )


def _gpus(devices: list[Device], driver: str) -> Line:
    named = "; ".join(device.name for device in devices) or "none visible"
    if numbers(driver) < LEAST_DRIVER:
        least = f"CUDA checkpoint calls need driver >= {LEAST_DRIVER[0]}"
        return Line("gpu", "off", f"{named}, driver {driver}", least, True)
    return Line("gpu", "ok", f"{named}, driver {driver}")


def _bindings() -> Iterator[Line]:
    try:
        found = find_spec("cuda.bindings")
    except ModuleNotFoundError:
        found = None
    if found is None:
        yield Line("gpu bindings", "off", "cuda-bindings is not installed", "pip install 'quickthaw[cuda]'")


def _kill(driver: str) -> Iterator[Line]:
    if hangs_at_kill(driver):
        detail = f"driver {driver}: killing a restored process hung hosts (cuda-checkpoint #53)"
        yield Line(
            "gpu driver",
            "note",
            f"{detail}; engines are taken off the GPU first, a crash cannot be",
            f"use a driver other than {', '.join(map(str, sorted(HANGS_AT_KILL)))}",
            True,
        )


def _divided(devices: list[Device]) -> Iterator[Line]:
    for device in devices:
        if device.divided:
            whole = any(not other.divided for other in devices)
            yield Line(
                "gpu slices (MIG)",
                "note" if whole else "off",
                f"GPU {device.index} is divided, and no known driver checkpoints a slice: engines on it start cold",
                f"nvidia-smi -i {device.index} -mig 0" + (", or choose another with CUDA_VISIBLE_DEVICES" * whole),
                True,
            )


def _device_files(devices: list[Device]) -> Iterator[Line]:
    """Open each GPU's file: a container's rules for devices may refuse what NVML shows."""
    for device in devices:
        file = f"{CONTROL.parent}/nvidia{device.minor}"
        try:
            os.close(os.open(file, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            remedy = "give the container the GPU (docker run --gpus, or a device plugin); see docs/deploy.md"
            yield Line("gpu device", "off", f"GPU {device.index}: {file}: {error.strerror}", remedy, True)


def _mps(environment: Mapping[str, str]) -> Iterator[Line]:
    pipes = environment.get("CUDA_MPS_PIPE_DIRECTORY") or MPS_PIPES
    if (Path(pipes) / "control").exists():
        yield Line(
            "gpu sharing (MPS)",
            "note",
            f"the multi-process service listens in {pipes}; no document says that its clients can be checkpointed, and it was not tried",
            "launch with CUDA_MPS_PIPE_DIRECTORY set to a folder that does not exist, or end it: echo quit | nvidia-cuda-mps-control",
            True,
        )


def _container() -> Iterator[Line]:
    if Path("/proc/self/ns/pid").stat().st_ino != HOST_PID_NAMESPACE:
        yield Line(
            "gpu processes",
            "note",
            "NVML does not know a container's processes: an engine's GPU memory is what becomes free, which others change",
            "give each container its own GPU, or run with --pid=host",
            True,
        )


def _host_memory(devices: list[Device]) -> Iterator[Line]:
    """Compare the host memory, or the control group's limit, with the largest GPU: a checkpoint moves GPU state there."""
    try:
        room = host_memory.room()
    except (OSError, LookupError, ValueError):
        return  # this host does not say
    most = max((device.memory for device in devices), default=0)
    if room.total - room.margin < most:
        yield Line(
            "gpu host memory",
            "note",
            f"{room.total / 1e9:.0f} GB here, {most / 1e9:.0f} GB on a GPU: a full one is not dumped (host-memory-short)",
            "raise the memory limit, or launch with --weights excluded and the engine's sleep mode",
            True,
        )


def _persistence(devices: list[Device]) -> Iterator[Line]:
    without = [str(device.index) for device in devices if not device.persistent]
    if without:
        yield Line(
            "gpu persistence",
            "note",
            f"off for GPU {', '.join(without)}: the driver starts anew whenever nothing used the GPU before",
            "run nvidia-persistenced, or nvidia-smi -pm 1",
            True,
        )
