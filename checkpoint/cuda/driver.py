"""The CUDA driver's checkpoint calls behind one small interface, and its implementation with cuda-bindings.

State machine, as the driver documents it:

    RUNNING ──lock──▶ LOCKED ──checkpoint──▶ CHECKPOINTED ──restore──▶ LOCKED ──unlock──▶ RUNNING

A lock that times out leaves the process RUNNING. A restore that runs out of GPU memory loses the process: as documented it
is FAILED, and driver 580.95 leaves it CHECKPOINTED and refuses every further restore (cuda-checkpoint #44).
Every call is made from a process outside the tree, with the target's PID in the caller's PID namespace. Only the
helper process loads the driver's libraries (checkpoint.cuda.helper): hosts without a GPU do not import them.
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


MOVE_TIMEOUT_S = 900.0
"""Timeout of checkpoint and restore, which move GPU memory. At the measured 1.4 to 5 GB/s it suffices for a terabyte."""
STALLED = "QUICKTHAW_STALLED"
"""The `result` of a call that exceeded its timeout, or whose helper died; the helper was killed."""


class DriverError(Exception):
    """A call that the driver refused; `result` is the driver's name for the error, such as CUDA_ERROR_ILLEGAL_STATE."""

    def __init__(self, result: str) -> None:
        super().__init__(result)
        self.result = result


class DeviceMemory(msgspec.Struct, frozen=True):
    """Memory of one GPU in bytes, with `uuid` (`GPU-…`) and product name.

    `mig`: it is divided into slices (multi-instance GPU). `node`: its device file, or "" if NVML does not know it.
    """

    uuid: str
    name: str
    free: int
    total: int
    mig: bool = False
    node: str = ""


class Driver(Protocol):
    """The required functions of the CUDA driver and NVML. Every method raises DriverError."""

    def version(self) -> str:
        """Return the kernel driver's version, such as 580.159.03."""

    def finds(self, name: str) -> bool:
        """Return whether the driver has this entry point."""

    def devices(self) -> list[DeviceMemory]:
        """List every GPU, with its currently free memory."""

    def usage(self, pid: int) -> dict[str, int]:
        """Return a process's GPU memory in bytes by GPU uuid.

        Empty if the driver does not report it (another PID namespace).
        """

    def state(self, pid: int) -> State | None:
        """Return a process's state; None if it holds no CUDA context or has ended."""

    def lock(self, pid: int, timeout_ms: int) -> None:
        """Block the process's CUDA calls once running ones are done.

        Raises CUDA_ERROR_NOT_READY after the timeout.
        """

    def checkpoint(self, pid: int, limit_s: float = MOVE_TIMEOUT_S) -> None:
        """Move the process's GPU memory into its host memory and release the GPU. `limit_s`: how long a helper waits for it."""

    def restore(self, pid: int, pairs: list[tuple[str, str]], limit_s: float = MOVE_TIMEOUT_S) -> None:
        """Move a process back to its GPUs, or to others.

        `pairs` maps (old uuid, new uuid), and must name all of its GPUs or none. `limit_s`: how long a helper waits for it.
        """

    def unlock(self, pid: int) -> None:
        """Unblock the process's CUDA calls."""


class RealDriver:
    """libcuda through cuda-bindings, and NVML through nvidia-ml-py.

    Creating one costs cuInit and nvmlInit (0.1 to 1 s), once.
    """

    def __init__(self) -> None:
        try:
            import pynvml
            from cuda.bindings import driver
        except ImportError as error:
            raise DriverError(f"cuda-bindings or nvidia-ml-py is missing ({error})") from error
        self._nvml = pynvml
        self._cuda = driver
        if not hasattr(driver, "cuCheckpointProcessLock"):
            raise DriverError("CUDA_ERROR_NOT_SUPPORTED (cuda-bindings is older than 12.8)")
        try:
            # Restoring a process requires an initialised driver in the caller, or persistence mode.
            self._call(driver.cuInit, 0)
            pynvml.nvmlInit()
        except (pynvml.NVMLError, RuntimeError, OSError) as error:
            # cuda-bindings raises RuntimeError if libcuda is missing or lacks a function.
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
        return str(found)

    def finds(self, name: str) -> bool:
        newest = self._call(self._cuda.cuDriverGetVersion)
        try:
            return bool(int(self._call(self._cuda.cuGetProcAddress, name.encode(), newest, 0) or 0))
        except DriverError as error:
            if error.result in ("CUDA_ERROR_NOT_FOUND", "CUDA_ERROR_INVALID_VALUE"):
                return False
            raise

    def devices(self) -> list[DeviceMemory]:
        try:
            return [self._device(index) for index in range(self._nvml.nvmlDeviceGetCount())]
        except self._nvml.NVMLError as error:
            self._refused(error)

    def _device(self, index: int) -> DeviceMemory:
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        return DeviceMemory(
            self._nvml.nvmlDeviceGetUUID(handle),
            self._nvml.nvmlDeviceGetName(handle),
            memory.free,
            memory.total,
            self._divided(handle),
            self._node(handle),
        )

    def _node(self, handle: Any) -> str:
        try:
            return f"/dev/nvidia{self._nvml.nvmlDeviceGetMinorNumber(handle)}"
        except self._nvml.NVMLError:
            return ""

    def _divided(self, handle: Any) -> bool:
        try:
            return bool(self._nvml.nvmlDeviceGetMigMode(handle)[0])
        except self._nvml.NVMLError:
            return False  # a GPU without this mode

    def usage(self, pid: int) -> dict[str, int]:
        found: dict[str, int] = {}
        try:
            for index in range(self._nvml.nvmlDeviceGetCount()):
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    if process.pid == pid:
                        found[self._nvml.nvmlDeviceGetUUID(handle)] = process.usedGpuMemory or 0
        except self._nvml.NVMLError as error:
            self._refused(error)
        return found

    def state(self, pid: int) -> State | None:
        try:
            return State(int(self._call(self._cuda.cuCheckpointProcessGetState, pid)))
        except DriverError as error:
            # The driver's result for a process without a context.
            if error.result in ("CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_NOT_INITIALIZED"):
                return None
            # Driver 580.159's result for a process that has ended (seen on an H200). If the process has CUDA, the error
            # is real.
            if error.result == "CUDA_ERROR_OPERATING_SYSTEM" and not _has_cuda(pid):
                return None
            raise

    def lock(self, pid: int, timeout_ms: int) -> None:
        arguments = self._cuda.CUcheckpointLockArgs()
        arguments.timeoutMs = timeout_ms
        self._call(self._cuda.cuCheckpointProcessLock, pid, arguments)

    def checkpoint(self, pid: int, limit_s: float = MOVE_TIMEOUT_S) -> None:
        self._call(self._cuda.cuCheckpointProcessCheckpoint, pid, None)

    def restore(self, pid: int, pairs: list[tuple[str, str]], limit_s: float = MOVE_TIMEOUT_S) -> None:
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
    """Return the 16 bytes of `GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.

    Raises DriverError otherwise (a MIG slice's name).
    """
    digits = uuid.removeprefix("GPU-").replace("-", "")
    try:
        found = bytes.fromhex(digits)
    except ValueError:
        found = b""
    if len(found) != 16:
        raise DriverError(f"CUDA_ERROR_INVALID_DEVICE ({uuid} is not the UUID of a whole GPU)")
    return found


def _has_cuda(pid: int) -> bool:
    """Return whether a process has the driver's library mapped; False if it has ended."""
    try:
        return b"/libcuda.so" in Path(f"/proc/{pid}/maps").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True  # not readable for us: keep the driver's error
