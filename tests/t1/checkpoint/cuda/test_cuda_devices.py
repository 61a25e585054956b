"""Which GPUs a process tree may use: another one after a restore, several, one shared with neighbours, one divided by MIG."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from checkpoint.compatibility.gpu import Gpu
from checkpoint.cuda import checkpoint as cuda
from checkpoint.cuda.checkpoint import (
    MARGIN,
    Needs,
    bring_to_running,
    check_memory,
    gpu_pairs,
    refuse_parallel,
    refuse_slice,
    resume,
    resume_after_dump,
    suspend,
)
from checkpoint.cuda.driver import DeviceMemory
from checkpoint.errors import Failed, Incompatible
from tests.kits.checkpoint.cuda_children import Children
from tests.kits.checkpoint.cuda_double import GPU0, GPU1, TOTAL, Double, write

pytestmark = pytest.mark.t1


def test_another_gpu_can_replace_the_recorded_one(
    children: Children, driver: Double, pids: list[int], tmp_path: Path
) -> None:
    _, needs = suspend(driver, pids)
    write(children.folder / "gpus.json", {GPU1: TOTAL})
    with pytest.raises(Incompatible, match="gpu-gone"):
        resume(driver, pids, needs, lock_folders=[tmp_path])
    pairs = gpu_pairs([Gpu("Double", TOTAL, GPU0)], [Gpu("Double", TOTAL, GPU1)])
    assert pairs == [(GPU0, GPU1)]
    resume(driver, pids, needs, pairs, lock_folders=[tmp_path])
    assert driver.usage(pids[0]) == {GPU1: 1 << 20}
    for pid in pids:
        children.wait_running(pid)


def test_a_hidden_gpu_is_part_of_the_map(children: Children, driver: Double, tmp_path: Path) -> None:
    """The driver knew both GPUs of the host at the checkpoint, though CUDA_VISIBLE_DEVICES showed one."""
    write(children.folder / "gpus.json", {GPU0: TOTAL, GPU1: TOTAL})
    pid = children.start()
    _, needs = suspend(driver, [pid])
    assert needs.gpus == [GPU0, GPU1]
    assert msgspec.json.decode(msgspec.json.encode(needs), type=Needs) == needs
    resume(driver, [pid], needs, [(GPU0, GPU1)], lock_folders=[tmp_path])
    assert driver.usage(pid) == {GPU1: 1 << 20}
    children.wait_running(pid)
    _, needs = suspend(driver, [pid])
    write(children.folder / "gpus.json", {GPU0: TOTAL})  # another host, with one
    with pytest.raises(Failed, match="cuda-restore-failed"):
        resume(driver, [pid], needs, [(GPU1, GPU0)], lock_folders=[tmp_path])


def test_the_same_gpus_need_no_pairs() -> None:
    gpus = [Gpu("a", 1, GPU0), Gpu("a", 1, GPU1)]
    assert gpu_pairs(gpus, gpus) == []
    assert gpu_pairs(gpus, gpus[::-1]) == [(GPU0, GPU1), (GPU1, GPU0)]
    with pytest.raises(Incompatible, match="gpu-count-differs"):
        gpu_pairs(gpus, gpus[:1])


def test_memory_is_summed_if_one_gpu_replaces_two(children: Children, driver: Double) -> None:
    size = TOTAL // 2
    check_memory(driver, Needs(1, {GPU1: size}), [(GPU1, GPU0)])
    with pytest.raises(Incompatible, match="gpu-memory-short"):
        check_memory(driver, Needs(2, {GPU0: size, GPU1: size}), [(GPU0, GPU0), (GPU1, GPU0)])


def test_several_gpus_are_refused_by_name(children: Children, driver: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    write(children.folder / "gpus.json", {GPU0: TOTAL, GPU1: TOTAL})
    pids = [children.start(gpu=GPU0), children.start(gpu=GPU1)]
    with pytest.raises(Incompatible) as caught:
        suspend(driver, pids)
    assert caught.value.code == "multi-gpu"
    assert "--snapshot-store" in str(caught.value)
    assert children.states(pids) == ["RUNNING"] * 2
    monkeypatch.setattr(cuda, "MULTI_GPU_SINCE", (580,))
    assert suspend(driver, pids)[1] == Needs(2, {GPU0: 1 << 20, GPU1: 1 << 20}, [GPU0, GPU1])
    assert bring_to_running(driver, pids) == {}


class DoubleInContainer(Double):
    """The double as seen from a container: NVML reports the host's PIDs, so it knows none of the container's."""

    def usage(self, pid: int) -> dict[str, int]:
        return {}


def test_several_gpus_are_refused_if_nvml_knows_no_own_process(children: Children) -> None:
    write(children.folder / "gpus.json", {GPU0: 4 * TOTAL, GPU1: 4 * TOTAL})
    contained = DoubleInContainer(str(children.folder))
    pids = [children.start(TOTAL, gpu=GPU0), children.start(TOTAL, gpu=GPU1)]
    with pytest.raises(Incompatible, match="multi-gpu"):
        suspend(contained, pids)
    for pid in pids:
        children.wait_running(pid)
    found, needs = suspend(contained, pids[:1])
    assert needs.memory == {GPU0: TOTAL}
    resume_after_dump(contained, found, needs, [children.folder / "locks"])
    children.wait_running(pids[0])


class Neighbour(Double):
    """Frees memory of another GPU during the checkpoint, like a neighbour process that ends."""

    def checkpoint(self, pid: int, limit_s: float = 0.0) -> None:
        super().checkpoint(pid)
        write(self.folder / "gpus.json", {GPU0: TOTAL, GPU1: TOTAL})


@pytest.mark.parametrize(
    ("nvml_knows_us", "visible"),
    [(True, None), (True, [GPU0]), (False, [GPU0])],  # without either, the memory's owner is unknown
    ids=["nvml-knows-us", "nvml-knows-us-one-visible", "in-a-container"],
)
def test_memory_freed_by_a_neighbour_on_another_gpu_does_not_count(
    children: Children, monkeypatch: pytest.MonkeyPatch, visible: list[str] | None, nvml_knows_us: bool
) -> None:
    write(children.folder / "gpus.json", {GPU0: TOTAL, GPU1: TOTAL // 2})
    driver = Neighbour(str(children.folder))
    if not nvml_knows_us:
        monkeypatch.setattr(Neighbour, "usage", lambda self, pid: {})
    pid = children.start(MARGIN * 2)
    found, needs = suspend(driver, [pid], visible=visible)
    assert needs.memory == {GPU0: MARGIN * 2}
    resume_after_dump(driver, found, needs, [children.folder / "locks"])


class Divided(Double):
    def devices(self) -> list[DeviceMemory]:
        return [msgspec.structs.replace(device, mig=device.uuid == GPU0) for device in super().devices()]


def test_only_a_used_mig_gpu_is_refused(children: Children) -> None:
    write(children.folder / "gpus.json", {GPU0: TOTAL, GPU1: TOTAL})
    driver = Divided(str(children.folder))
    pid, other = children.start(gpu=GPU0), children.start(gpu=GPU1)
    with pytest.raises(Incompatible, match="gpu-mig"):
        suspend(driver, [pid])
    found, needs = suspend(driver, [other])
    resume_after_dump(driver, found, needs, [children.folder / "locks"])
    with pytest.raises(Incompatible, match="gpu-mig: MIG-12"):
        refuse_slice("MIG-12")
    refuse_slice("0,1")
    refuse_slice(None)


@pytest.mark.parametrize(
    ("text", "arguments", "refused"),
    [
        ("tensor-parallel-size: 2", {}, True),
        ("tensor_parallel_size: 2", {}, True),
        ("tensor-parallel-size: 2", {"--tensor-parallel-size": (("1",),)}, False),
        ("tp-size: 1", {}, False),
        ("- a list", {}, False),
        ("{", {}, False),
    ],
)
def test_a_parallel_config_file_is_refused_before_the_start(
    tmp_path: Path, text: str, arguments: dict[str, tuple[tuple[str, ...], ...]], refused: bool
) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(text)
    arguments = {"--config": ((str(file),),), **arguments}
    if refused:
        with pytest.raises(Incompatible, match=rf"multi-gpu: .* in {file} 2"):
            refuse_parallel(arguments)
    else:
        refuse_parallel(arguments)
    refuse_parallel({"--config": ((str(tmp_path / "none"),),)})


@pytest.mark.parametrize(
    ("flag", "value", "refused"),
    [("--tensor-parallel-size", "2", True), ("-tp", "4", True), ("--tp", "1", False), ("--seed", "2", False)],
)
def test_a_parallel_command_line_is_refused_before_the_start(flag: str, value: str, refused: bool) -> None:
    if refused:
        with pytest.raises(Incompatible, match=r"multi-gpu.*" + flag):
            refuse_parallel({flag: ((value,),)})
    else:
        refuse_parallel({flag: ((value,),), "--enforce-eager": ((),)})
