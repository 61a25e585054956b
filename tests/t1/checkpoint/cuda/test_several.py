"""What a refusal of several GPUs says about the machine that refuses."""

from __future__ import annotations

import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest

from checkpoint.cuda import several
from checkpoint.cuda.driver import DriverError, RealDriver
from checkpoint.cuda.helper import Helper
from checkpoint.cuda.several import CUSTOM_STORAGE, probe
from tests.kits.checkpoint.cuda_children import Children
from tests.kits.checkpoint.cuda_double import Double, configure

pytestmark = pytest.mark.t1
NCCL = {"nvidia_nccl_cu13": "2.29.7", "numpy": "2"}


def test_all_that_is_there_is_named(children: Children) -> None:
    configure(children.folder, entry_points=[CUSTOM_STORAGE])
    with Helper("tests.kits.checkpoint.cuda_double:Double", str(children.folder)) as helper:
        found = probe("615.71.02", NCCL, helper)
    assert found == "driver 615.71.02, CUDA IPC there; CustomStorage there; NCCL 2.29.7, ncclCommSuspend there"


def test_all_that_is_missing_is_named(children: Children, driver: Double) -> None:
    found = probe("580.159.03", {"nvidia_nccl_cu12": "2.29.3"}, driver)
    assert found == (
        "driver 580.159.03, CUDA IPC needs 610; CustomStorage missing; NCCL 2.29.3, ncclCommSuspend needs 2.29.7"
    )
    assert probe("", {}, None) == (
        "driver unknown, CUDA IPC needs 610; CustomStorage not probed; NCCL unknown, ncclCommSuspend needs 2.29.7"
    )


def test_a_driver_that_fails_or_hangs_costs_no_start(
    children: Children, driver: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    children.faults({"op": "finds", "result": "CUDA_ERROR_UNKNOWN"})
    assert "CustomStorage not probed (CUDA_ERROR_UNKNOWN);" in probe("610", NCCL, driver)
    monkeypatch.setattr(several, "LIMIT_S", 0.2)
    children.faults({"op": "finds", "hang": 60.0})
    with Helper("tests.kits.checkpoint.cuda_double:Double", str(children.folder)) as helper:
        assert "not probed (the driver did not answer" in probe("610", NCCL, helper)


class Result(Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_UNKNOWN = 999


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ((Result.CUDA_SUCCESS, 4096, 0), True),
        ((Result.CUDA_SUCCESS, 0, 1), False),
        ((Result.CUDA_ERROR_NOT_FOUND, 0, 1), False),
        ((Result.CUDA_ERROR_UNKNOWN, 0, 0), None),
    ],
)
def test_an_entry_point_is_asked_of_the_driver(monkeypatch, answer, found) -> None:
    """With cuda-bindings doubled: its cuGetProcAddress takes the name in bytes, a CUDA version and flags."""
    asked = []

    def address(*arguments):
        asked.append(arguments)
        return answer

    bindings = SimpleNamespace(
        CUresult=Result,
        cuCheckpointProcessLock=None,
        cuInit=lambda flags: (Result.CUDA_SUCCESS,),
        cuDriverGetVersion=lambda: (Result.CUDA_SUCCESS, 13040),
        cuGetProcAddress=address,
    )
    parent = ModuleType("cuda.bindings")
    parent.driver = bindings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", parent)
    monkeypatch.setattr("pynvml.nvmlInit", lambda: None)
    driver = RealDriver()
    if found is None:
        with pytest.raises(DriverError, match="CUDA_ERROR_UNKNOWN"):
            driver.finds(CUSTOM_STORAGE)
    else:
        assert driver.finds(CUSTOM_STORAGE) is found
    assert asked == [(b"cuCheckpointOperationComplete", 13040, 0)]
