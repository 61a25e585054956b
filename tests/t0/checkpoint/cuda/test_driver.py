"""Interpretation of the real driver's answers without a GPU; an H200 gave these answers (driver 580.159)."""

import mmap
import os
import types

import pytest

from checkpoint.cuda.driver import DriverError, RealDriver, State

pytestmark = pytest.mark.t0


class Result(types.SimpleNamespace):
    pass


GONE = 2**22 - 1
SUCCESS, NO_CONTEXT, OPERATING_SYSTEM = (
    Result(name=f"CUDA_{name}") for name in ("SUCCESS", "ERROR_NOT_INITIALIZED", "ERROR_OPERATING_SYSTEM")
)


def driver(answer):
    """Return the driver, with `answer` as the state of every process."""
    made = object.__new__(RealDriver)
    made._cuda = types.SimpleNamespace(
        CUresult=types.SimpleNamespace(CUDA_SUCCESS=SUCCESS), cuCheckpointProcessGetState=lambda pid: answer
    )
    return made


def test_states_of_running_contextless_and_ended_processes():
    assert driver((SUCCESS, 1)).state(os.getpid()) is State.LOCKED
    assert driver((NO_CONTEXT, None)).state(os.getpid()) is None
    assert driver((OPERATING_SYSTEM, None)).state(GONE) is None


def test_an_unknown_state_of_a_cuda_process_is_an_error(tmp_path):
    library = tmp_path / "libcuda.so.580.159.04"
    library.write_bytes(bytes(mmap.PAGESIZE))
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ),
        pytest.raises(DriverError, match="CUDA_ERROR_OPERATING_SYSTEM"),
    ):
        driver((OPERATING_SYSTEM, None)).state(os.getpid())
    assert driver((OPERATING_SYSTEM, None)).state(os.getpid()) is None
