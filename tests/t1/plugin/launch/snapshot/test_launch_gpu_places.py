"""Replicas and GPUs: one engine per GPU from one snapshot, a GPU that fills up during a restore, and graphs that a restore broke.

Engine and CUDA driver are doubles, as in test_launch_gpu.py; CRIU, the sandboxes and all of quickthaw are real.
"""

import fcntl
import json
import logging
import os
from pathlib import Path

import pytest

import launchers
from checkpoint.compatibility import host
from checkpoint.compatibility.gpu import Gpu, select_visible
from checkpoint.criu.binary import Criu
from checkpoint.cuda import helper
from checkpoint.errors import Integrity
from plugin.runtime import replica as replica_module
from plugin.runtime.capabilities import Capabilities
from plugin.runtime.config import LaunchSettings, state_home
from plugin.runtime.gpu import placement
from plugin.runtime.launcher import Launch
from plugin.runtime.phases import Phase
from plugin.runtime.steps.model_mount import Weights
from tests.kits.checkpoint.cuda_double import GPU0, GPU1, TOTAL, TreeDouble, alive, configure, timed, wait_until, write
from tests.kits.gpu_rig import USED, answer, gpu_rig, worker

__all__ = ["gpu_rig"]
pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
GPUS = (Gpu("Double", TOTAL, GPU0), Gpu("Double", TOTAL, GPU1))


def chosen(pid):
    """Return the GPU that a process sees first, by its environment at its start."""
    words = dict(line.partition(b"=")[::2] for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    visible = words.get(b"CUDA_VISIBLE_DEVICES")
    return select_visible(GPUS, visible.decode() if visible is not None else None)[0].uuid


class TwoGpus(TreeDouble):
    """The driver's double on a host with two GPUs: an engine takes the one that it sees."""

    def _record(self, pid):
        file = self.folder / f"{pid}.json"
        known = file.exists()
        record = super()._record(pid)
        if not known and record["state"] == "RUNNING":
            record["memory"] = {chosen(pid): USED}
            write(file, record)
        return record

    def start(self):
        pass


@pytest.fixture
def two_gpus(launch_rig, monkeypatch, tmp_path):
    """Return a function that begins a launch of vLLM with replicas on two GPUs, and the folder of the driver's double."""
    gpu = tmp_path / "gpu"
    gpu.mkdir()
    write(gpu / "gpus.json", {GPU0: TOTAL, GPU1: TOTAL})
    configure(gpu, memory={GPU0: USED})

    def facts(environment=None):
        visible = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
        return select_visible(GPUS, visible), "580.159.03"

    monkeypatch.setattr(host, "gpu_facts", facts)
    monkeypatch.setattr(placement, "gpu_facts", facts)
    monkeypatch.setattr(replica_module, "NVIDIA", gpu)
    monkeypatch.setattr(helper, "Helper", lambda: TwoGpus(str(gpu)))
    for name, value in launch_rig.env().items():
        monkeypatch.setenv(name, value)
    made = []

    def begin(replicas=2, **more):
        engine = launchers.engine("vllm")
        environment = {**os.environ, "ENGINE_DOUBLE_GPU": "1", **more}
        settings = LaunchSettings(
            engine="vllm",
            command=engine.parse(["--model", str(launch_rig.model)], environment),
            engine_python=str(launch_rig.python),
            home=launch_rig.home,
            environment=environment,
            replicas=replicas,
        )
        launch = Launch(settings, None, Capabilities(), stdout=None, stderr=None)
        made.append(launch)
        launch.begin(Criu.find(state_home()), engine, Weights(str(launch_rig.model), launch_rig.home, None, True))
        wait_until(lambda: all(r.tracker.phase is Phase.SERVING for r in launch.replicas), 120.0)
        return launch

    yield begin, gpu
    for launch in made:
        end(launch)


def end(launch):
    launch._ending.set()
    for replica in launch.replicas:
        replica.stop(5.0)
    launch.weights.close()


def used(launch):
    return launch.replicas[0]._cuda._used()


def test_each_replica_has_its_own_gpu_and_all_come_from_one_snapshot(two_gpus):
    begin, _ = two_gpus
    launch = begin()
    first, second = launch.replicas
    assert not first.restored and second.restored, "the first takes the snapshot on its GPU"
    assert used(launch) == {GPU0: USED, GPU1: USED}
    assert first.library.names() == [second.snapshot.name]
    assert second.snapshot.gpu.memory.keys() == {GPU0} and second.snapshot.gpu.gpus == [GPU0, GPU1]
    expected = answer(first)
    assert answer(second) == expected
    end(launch)
    again = begin()
    assert all(replica.restored for replica in again.replicas)
    assert used(again) == {GPU0: USED, GPU1: USED}
    assert [answer(replica) for replica in again.replicas] == [expected] * 2
    first, second = again.replicas
    second.standby()
    assert used(again) == {GPU0: USED, GPU1: 0}
    second.start()
    assert used(again) == {GPU0: USED, GPU1: USED} and answer(second) == expected


def test_the_users_choice_of_gpus_is_kept(two_gpus, caplog):
    begin, gpu = two_gpus
    with caplog.at_level(logging.WARNING, "quickthaw"):
        launch = begin(CUDA_VISIBLE_DEVICES=GPU1)
    assert used(launch) == {GPU0: 0, GPU1: 2 * USED}
    assert "replicas-share-gpu: 2 replicas on 1 GPU;" in caplog.text
    end(launch)
    swapped = begin(CUDA_VISIBLE_DEVICES="1,0")
    assert all(replica.restored for replica in swapped.replicas)
    moved = [json.loads(file.read_text())["memory"] for file in gpu.glob("[0-9]*.json") if alive(int(file.stem))]
    assert sorted(map(str, moved)) == [str({GPU0: USED}), str({GPU1: USED})]


@pytest.mark.parametrize("contexts", [1, 2])
def test_a_gpu_that_fills_up_during_a_restore_leaves_a_cold_start(gpu_rig, caplog, contexts):
    """Another program takes the memory after it was checked: the driver loses a process, and nothing stays of its tree."""
    cold = gpu_rig("vllm", contexts=contexts)
    cold.start()
    expected, name = answer(cold), cold.snapshot.name
    cold.stop(5.0)
    before = {file.name for file in gpu_rig.gpu.glob("[0-9]*.json")}
    write(gpu_rig.gpu / "faults.json", [{"op": "restore", "gpus": {GPU0: contexts * USED - USED // 2}}])
    replica = gpu_rig("vllm", contexts=contexts)
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert "CUDA_ERROR_OUT_OF_MEMORY" in [call.result for call in timed(gpu_rig.gpu, "restore")]
    assert not replica.restored and replica.tracker.phase is Phase.SERVING and answer(replica) == expected
    assert "gpu-memory-short" in caplog.text and "took the GPU's memory" in caplog.text
    tried = {int(file.stem) for file in gpu_rig.gpu.glob("[0-9]*.json") if file.name not in before}
    assert len(tried) >= contexts and not any(alive(pid) for pid in tried), "the processes of that tree have ended"
    assert not replica.library.health(name).failures and replica.library.has(name), "the snapshot is not to blame"
    with (replica.library.home / "run" / f"gpu-{GPU0}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    write(gpu_rig.gpu / "gpus.json", {GPU0: TOTAL})
    replica.stop(5.0)
    later = gpu_rig("vllm", contexts=contexts)
    later.start()
    assert later.restored and answer(later) == expected


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_graphs_that_a_restore_broke_are_noticed(gpu_rig, engine, monkeypatch, caplog):
    """The prefill and the first decode step are right; a later one is not."""
    cold = gpu_rig(engine)
    cold.start()
    expected = answer(cold)
    cold.stop(5.0)
    monkeypatch.setenv("POD_STALE_GRAPHS", "1")
    replica = gpu_rig(engine, take_snapshot=False, strict=True)
    with pytest.raises(Integrity) as refused:
        replica.start()
    assert refused.value.code == "canary-differs"
    monkeypatch.delenv("POD_STALE_GRAPHS")
    later = gpu_rig(engine)
    later.start()
    assert answer(later) == expected and worker(later)["away"] == []


DEVICES = """
set -e
mount -t tmpfs dev "$0"
for one in null zero full random urandom tty fuse userfaultfd; do [ ! -e /dev/$one ] || cp -a /dev/$one "$0/"; done
mkdir "$0/shm" "$0/pts"
mount --bind /dev/pts "$0/pts"
ln -s /proc/self/fd "$0/fd"
touch "$0/$1"
mount --bind /dev/null "$0/$1"
mount --rbind "$0" /dev
shift
exec "$@"
"""
"""Give a command a /dev of its own, in which a GPU's file is a mount, as container runtimes make it."""


def test_the_number_of_a_gpus_file_is_in_no_image(rig_of, tmp_path):
    """A container that restores may have /dev/nvidia1 where that of the dump had /dev/nvidia0."""
    rig = rig_of("vllm")
    folder = tmp_path / "dev"
    folder.mkdir()

    def among(device):
        return ["unshare", "--mount", "sh", "-c", DEVICES, str(folder), device]

    with rig.running(prefix=among("nvidia0")) as started:
        started.wait_serving()
        expected = started.ask()
    (name,) = rig.library.names()
    images = rig.library.path(name) / "images"
    small = [file for file in images.iterdir() if not file.name.startswith("pages-")]
    assert not any(b"/dev/nvidia" in file.read_bytes() for file in small)
    with rig.running(prefix=among("nvidia1")) as started:
        started.wait_serving()
        assert "restoring" in started.phases()[0] and "loading" not in started.phases()[0]
        assert started.ask() == expected
