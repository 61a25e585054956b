"""The CUDA driver's checkpoint calls behind one small interface, and its real implementation over cuda-bindings.

State machine, as the driver documents it:

    RUNNING ──lock──▶ LOCKED ──checkpoint──▶ CHECKPOINTED ──restore──▶ LOCKED ──unlock──▶ RUNNING

A lock that times out leaves the process RUNNING; a restore that runs out of GPU memory leaves it FAILED, for good. Every call is made
from a process outside the tree, with the target's PID as this process's PID namespace numbers it. Loaded in the helper process only
(checkpoint.cuda.helper): nothing here is imported on a host without a GPU.
"""

from __future__ import annotations

import ctypes
import enum
from pathlib import Path
from typing import Any, NoReturn, Protocol

import msgspec


class State(enum.Enum):
    """CUprocessState. CHECKPOINTING and RESTORING belong to custom storage, which is not used here."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3
    CHECKPOINTING = 4
    RESTORING = 5


class DriverError(Exception):
    """A call that the driver refused; `result` is its name for it, such as CUDA_ERROR_ILLEGAL_STATE."""

    def __init__(self, result: str) -> None:
        super().__init__(result)
        self.result = result


class DeviceMemory(msgspec.Struct, frozen=True):
    """Bytes of one GPU, by `uuid` (`GPU-…`), with its product name. `mig`: it is divided into slices (multi-instance GPU)."""

    uuid: str
    name: str
    free: int
    total: int
    mig: bool = False


class Driver(Protocol):
    """What is needed of the CUDA driver and NVML. Every method raises DriverError."""

    def version(self) -> str:
        """The kernel driver's version, such as 580.159.03."""

    def devices(self) -> list[DeviceMemory]:
        """Every GPU, with the memory free now."""

    def usage(self, pid: int) -> dict[str, int]:
        """GPU memory of a process in bytes by GPU uuid; empty where the driver does not tell (another PID namespace)."""

    def state(self, pid: int) -> State | None:
        """Where a process stands; None when it holds no CUDA context or is gone."""

    def lock(self, pid: int, timeout_ms: int) -> None:
        """Hold back the process's CUDA calls once those under way are done; CUDA_ERROR_NOT_READY after the timeout."""

    def checkpoint(self, pid: int) -> None:
        """Move its GPU memory into its host memory and let go of the GPU."""

    def restore(self, pid: int, pairs: list[tuple[str, str]]) -> None:
        """The way back, onto other GPUs where `pairs` (old uuid, new uuid) says so; all of its GPUs or none must be named."""

    def unlock(self, pid: int) -> None:
        """Let its CUDA calls go on."""


class RealDriver:
    """libcuda through cuda-bindings, and NVML through nvidia-ml-py. Making one costs cuInit and nvmlInit (0.1 to 1 s), once."""

    def __init__(self) -> None:
        try:
            import pynvml
            from cuda.bindings import driver
        except ImportError as error:
            raise DriverError(f"cuda-bindings or nvidia-ml-py missing ({error})") from error
        self._nvml = pynvml
        self._cuda = driver
        if not hasattr(driver, "cuCheckpointProcessLock"):
            raise DriverError("CUDA_ERROR_NOT_SUPPORTED (cuda-bindings is older than 12.8)")
        try:
            # The restore of a process needs the driver initialised in the caller, or persistence mode.
            self._call(driver.cuInit, 0)
            pynvml.nvmlInit()
        except (pynvml.NVMLError, RuntimeError, OSError) as error:
            # cuda-bindings raises a RuntimeError of its own where libcuda is missing, or lacks a function.
            raise DriverError(str(error)) from error

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            result, *values = function(*arguments)
        except RuntimeError as error:
            raise DriverError(f"CUDA_ERROR_NOT_SUPPORTED ({error})") from error
        if result != self._cuda.CUresult.CUDA_SUCCESS:
            raise DriverError(result.name)
        return values[0] if values else None

    def _refused(self, error: Exception) -> NoReturn:
        raise DriverError(f"NVML: {error}") from error

    def version(self) -> str:
        try:
            found = self._nvml.nvmlSystemGetDriverVersion()
        except self._nvml.NVMLError as error:
            self._refused(error)
        return found.decode() if isinstance(found, bytes) else str(found)

    def devices(self) -> list[DeviceMemory]:
        try:
            return [self._device(index) for index in range(self._nvml.nvmlDeviceGetCount())]
        except self._nvml.NVMLError as error:
            self._refused(error)

    def _device(self, index: int) -> DeviceMemory:
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        return DeviceMemory(
            _text(self._nvml.nvmlDeviceGetUUID(handle)),
            _text(self._nvml.nvmlDeviceGetName(handle)),
            memory.free,
            memory.total,
            self._divided(handle),
        )

    def _divided(self, handle: Any) -> bool:
        try:
            return bool(self._nvml.nvmlDeviceGetMigMode(handle)[0])
        except self._nvml.NVMLError:
            return False  # a GPU that knows no such mode

    def usage(self, pid: int) -> dict[str, int]:
        found: dict[str, int] = {}
        try:
            for index in range(self._nvml.nvmlDeviceGetCount()):
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    if process.pid == pid:
                        found[_text(self._nvml.nvmlDeviceGetUUID(handle))] = process.usedGpuMemory or 0
        except self._nvml.NVMLError as error:
            self._refused(error)
        return found

    def state(self, pid: int) -> State | None:
        try:
            return State(int(self._call(self._cuda.cuCheckpointProcessGetState, pid)))
        except DriverError as error:
            # What the driver says of a process without a context.
            if error.result in ("CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_NOT_INITIALIZED"):
                return None
            # What driver 580.159 says of one that is gone (seen on an H200). Any process that has CUDA keeps its error.
            if error.result == "CUDA_ERROR_OPERATING_SYSTEM" and not _has_cuda(pid):
                return None
            raise

    def lock(self, pid: int, timeout_ms: int) -> None:
        arguments = self._cuda.CUcheckpointLockArgs()
        arguments.timeoutMs = timeout_ms
        self._call(self._cuda.cuCheckpointProcessLock, pid, arguments)

    def checkpoint(self, pid: int) -> None:
        self._call(self._cuda.cuCheckpointProcessCheckpoint, pid, None)

    def restore(self, pid: int, pairs: list[tuple[str, str]]) -> None:
        arguments = None
        if pairs:
            arguments = self._cuda.CUcheckpointRestoreArgs()
            arguments.gpuPairs = [self._pair(old, new) for old, new in pairs]
            arguments.gpuPairsCount = len(pairs)
        self._call(self._cuda.cuCheckpointProcessRestore, pid, arguments)

    def _pair(self, old: str, new: str) -> Any:
        pair = self._cuda.CUcheckpointGpuPair()
        for field, uuid in (("oldUuid", old), ("newUuid", new)):
            value = self._cuda.CUuuid()
            # Its `bytes` cannot be assigned (cuda-bindings 13.5).
            ctypes.memmove(value.getPtr(), uuid_bytes(uuid), 16)
            setattr(pair, field, value)
        return pair

    def unlock(self, pid: int) -> None:
        self._call(self._cuda.cuCheckpointProcessUnlock, pid, None)


def uuid_bytes(uuid: str) -> bytes:
    """The 16 bytes of `GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`. Raises DriverError for anything else (a MIG slice's name)."""
    digits = uuid.removeprefix("GPU-").replace("-", "")
    try:
        found = bytes.fromhex(digits)
    except ValueError:
        found = b""
    if len(found) != 16:
        raise DriverError(f"CUDA_ERROR_INVALID_DEVICE ({uuid} is not the UUID of a whole GPU)")
    return found


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _has_cuda(pid: int) -> bool:
    """Whether a process has the driver's library mapped. False for one that is gone."""
    try:
        return b"/libcuda.so" in Path(f"/proc/{pid}/maps").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True  # not ours to look into: the driver's error stands
