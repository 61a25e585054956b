"""A replica with a GPU from cold start to restore: the engine offloads its memory, the driver the rest, and both reload in the right
order.

The engine and the CUDA driver are doubles (tests/programs/engine_double, cuda_double.py). CRIU, the sandbox and all of quickthaw are
real.
"""

import asyncio
import json
import logging
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import launchers
from checkpoint import host_memory
from checkpoint.criu.binary import Criu
from checkpoint.cuda import checkpoint as cuda
from checkpoint.cuda import helper
from checkpoint.cuda.checkpoint import MARGIN, Needs
from checkpoint.errors import Failed, Incompatible
from checkpoint.inspect import contents
from checkpoint.lazy_pages.client import PageServer
from checkpoint.snapshot import rehearsal, restore
from launchers.errors import EngineFailed
from plugin.proxy.admin.costs import memory_bytes
from plugin.proxy.endpoints.admission import Admission, Member
from plugin.proxy.http.address import from_url
from plugin.proxy.pool.pool import ReplicaPool
from plugin.rehearsal.rehearse import GivenUp, Rehearsal, _Rehearsed, named_settings
from plugin.runtime import replica as replica_module
from plugin.runtime.config import state_home
from plugin.runtime.phases import Phase
from plugin.runtime.standby import engine as standby_engine
from tests.kits.checkpoint import cuda_double
from tests.kits.checkpoint.cuda_double import GPU0, TOTAL, TreeDouble, wait_until, write
from tests.kits.gpu_rig import USED, answer, gpu_rig, worker

__all__ = ["gpu_rig"]
pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
PYTHON_GROWTH = 2 << 20
"""Bytes that the double's interpreters may allocate after the dump."""


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


MODEL = "MODEL"
ASLEEP = {
    ("vllm", "included"): [["collective_rpc", "quickthaw_trim"], ["sleep", 1]],
    ("vllm", "excluded"): [["collective_rpc", "quickthaw_trim"], ["sleep", 2]],
    ("sglang", "included"): [["flush_cache"], ["release", ["kv_cache"]]],
    ("sglang", "excluded"): [["flush_cache"], ["release", ["kv_cache", "weights"]]],
}
AWAKE = {
    ("vllm", "included"): [["wake_up", ["weights"]], ["wake_up", ["kv_cache"]]],
    ("vllm", "excluded"): [
        ["wake_up", ["weights"]],
        ["collective_rpc", "reload_weights"],
        ["own_reload"],
        ["wake_up", ["kv_cache"]],
    ],
    ("sglang", "included"): [["resume", ["kv_cache"]]],
    ("sglang", "excluded"): [
        ["resume", ["weights"]],
        ["require_awake", "weights"],
        ["collective_reload", MODEL],
        ["own_reload"],
        ["resume", ["kv_cache"]],
    ],
}


def from_ring(calls):
    """Return the calls of an engine that finds its weights in the ring (plugin/runtime/weight_ring)."""
    asked = json.dumps([call for call in calls if call != ["own_reload"]])
    return json.loads(asked.replace('"reload_weights"', '"quickthaw_reload_weights"'))


@pytest.mark.parametrize("weights", ["included", "excluded"])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_memory_is_offloaded_for_the_dump_and_reloaded_by_engine_and_replicas(gpu_rig, launch_rig, engine, weights):
    cold = gpu_rig(engine, weights=weights)
    cold.start()
    expected = answer(cold)
    calls = json.loads(
        json.dumps([*ASLEEP[engine, weights], *AWAKE[engine, weights]]).replace(MODEL, str(launch_rig.model))
    )
    assert worker(cold)["calls"] == calls, "the weights are in no ring yet"
    assert cold._cuda.changes() == ["lock", "checkpoint", "restore", "unlock"]
    snapshot = cold.snapshot
    assert snapshot.asleep and snapshot.weights == weights and snapshot.gpu.processes == 1
    assert cold.tracker.phase is Phase.SERVING
    cold.stop(5.0)
    for _ in range(2):
        replica = gpu_rig(engine, weights=weights)
        replica.start()
        assert replica.restored and replica.recording
        assert replica.running.restored.pages, "the server has no GPU state, and comes back by its working set"
        assert answer(replica) == expected
        assert worker(replica)["calls"] == from_ring(calls) and worker(replica)["away"] == []
        assert replica._cuda.changes()[-2:] == ["restore", "unlock"]
        replica.stop(5.0)


def test_two_processes_with_contexts_are_moved_and_restored(gpu_rig, caplog):
    cold = gpu_rig("vllm", contexts=2)
    with caplog.at_level(logging.INFO, "quickthaw"):
        cold.start()
    expected = answer(cold)
    assert cold.snapshot.gpu.processes == 2
    assert cold._cuda.changes()[:4] == ["lock"] * 2 + ["checkpoint"] * 2
    found = contents.inspect(cold.library.path(cold.snapshot.name), cold.snapshot.weight_areas)
    assert [p.kinds["GPU state"].bytes >> 20 for p in found.processes if "GPU state" in p.kinds] == [32, 32]
    assert found.total.bytes + found.image_files == cold.snapshot.image_bytes
    assert caplog.text.count("32 MiB") == 2
    cold.stop(5.0)
    replica = gpu_rig("vllm", contexts=2)
    replica.start()
    assert replica.restored and answer(replica) == expected
    assert replica._cuda._used() == {GPU0: 2 * USED}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_without_a_sleep_mode_the_driver_moves_all_memory(gpu_rig, engine, monkeypatch):
    monkeypatch.setattr(
        type(launchers.engine(engine)), "gpu_arguments", lambda self, command, installed, environment: ()
    )
    cold = gpu_rig(engine)
    cold.start()
    assert not cold.snapshot.asleep
    # Neither is called: vLLM would raise, SGLang would agree and release nothing.
    assert worker(cold)["calls"] == ([["collective_rpc", "quickthaw_trim"]] if engine == "vllm" else [["flush_cache"]])
    expected = answer(cold)
    cold.stop(5.0)
    replica = gpu_rig(engine)
    replica.start()
    assert replica.restored and answer(replica) == expected


def test_a_rehearsal_runs_only_where_the_gpu_has_room(gpu_rig, launch_rig, monkeypatch):
    cold = gpu_rig("vllm")
    cold.start()
    found = cold.library.load(cold.snapshot.name)
    cold.stop(5.0)
    monkeypatch.setattr(_Rehearsed, "driver", lambda self: TreeDouble(str(gpu_rig.gpu)))
    settings = named_settings(found, launch_rig.home)
    write(gpu_rig.gpu / "gpus.json", {GPU0: USED})
    with pytest.raises(GivenUp, match="gpu-memory-short"):
        Rehearsal(settings).run()
    assert not cold.library.health(found.name).failures
    write(gpu_rig.gpu / "gpus.json", {GPU0: TOTAL})
    mark = Rehearsal(settings).run()
    assert mark.requests[0] == "short" and mark.requests[-1].startswith("batch")
    assert rehearsal.read(cold.library.path(found.name), found) == mark


def test_the_users_sleep_mode_option_is_kept(gpu_rig):
    cold = gpu_rig("vllm", arguments=["--enable-sleep-mode"])
    cold.start()
    given = {command_line(pid).count(b"--enable-sleep-mode") for pid in processes_of(cold)}
    assert given in ({1}, {0, 1})


def processes_of(replica):
    from checkpoint.sandbox.process_tree import processes

    return processes(replica.running.place.init_pid)


def test_a_dump_that_fails_after_the_offload_leaves_a_serving_engine(gpu_rig, tmp_path, caplog):
    script = tmp_path / "criu.sh"
    real = (state_home() / "criu" / "criu").resolve()
    # The trial of a small process, whose images are in its own sandbox, passes; the engine's dump fails.
    script.write_text(f'#!/bin/sh\ncase "$*" in dump*/snapshots/*) exit 1 ;; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    replica = gpu_rig("vllm", criu=Criu(script), weights="excluded")
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert "no snapshot: criu-dump-failed" in caplog.text
    assert replica.snapshot is None and replica.tracker.phase is Phase.SERVING
    assert worker(replica)["away"] == [] and answer(replica)
    assert replica._cuda.changes() == ["lock", "checkpoint", "restore", "unlock"]
    assert replica.library.names() == []


def test_a_busy_gpu_is_refused_before_anything_is_lost(gpu_rig, caplog):
    cold = gpu_rig("vllm")
    cold.start()
    name = cold.snapshot.name
    created = cold.library.load(name)
    cold.stop(5.0)
    write(gpu_rig.gpu / "gpus.json", {GPU0: USED})
    replica = gpu_rig("vllm")
    before = len(replica._cuda.changes())
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert "gpu-memory-short" in caplog.text
    assert (
        replica._cuda.changes()[before:] == []
    )  # nothing that could lose the process was tried, and no new snapshot was taken
    assert replica.library.load(name) == created


def test_several_gpus_are_refused_with_a_remedy(gpu_rig, tmp_path, caplog):
    store = tmp_path / "kept"
    replica = gpu_rig("vllm", arguments=["--tensor-parallel-size", "2"], snapshot_store=str(store))
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
        assert replica.tracker.phase is Phase.SERVING and answer(replica)
    (line,) = [r.getMessage() for r in caplog.records if "multi-gpu" in r.getMessage()]
    assert "--tensor-parallel-size 2" in line and "--snapshot-store" in line
    assert "probed: driver 580.159.03, CUDA IPC needs 610; CustomStorage missing; NCCL unknown" in line
    assert replica.library.names() == []
    assert not (gpu_rig.gpu / "calls").exists() or replica._cuda.changes() == []
    # The remedy works: its compiled code is in the store.
    wait_until(lambda: list(store.rglob("compile-vllm-*")))


def test_an_engine_on_the_cpu_beside_a_gpu_is_not_put_to_sleep(gpu_rig, monkeypatch):
    """SGLang's scheduler would end at a release of memory that it does not have there."""
    monkeypatch.setattr(cuda_double, "driver_thread", lambda pid: "")
    replica = gpu_rig("sglang")
    replica.start()
    assert worker(replica)["calls"] == [["flush_cache"]]
    assert not replica.snapshot.asleep and replica.snapshot.gpu.processes == 0


def test_an_engine_that_cannot_resume_after_its_dump_is_restarted(gpu_rig, caplog):
    write(gpu_rig.gpu / "faults.json", [{"op": "restore", "result": "CUDA_ERROR_OUT_OF_MEMORY", "state": "FAILED"}])
    replica = gpu_rig("vllm")
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert "cuda-stuck" in caplog.text
    assert "a new one starts without a snapshot" in caplog.text
    assert replica.tracker.phase is Phase.SERVING and answer(replica)
    assert replica.snapshot is None and replica.library.names() == []
    assert replica._cuda.changes() == ["lock", "checkpoint", "restore"]  # the second start takes no snapshot


def test_a_snapshot_with_gpu_state_has_no_lazy_restore(gpu_rig, caplog):
    """A plain restore is the only way: a second try would double the time of a failure."""
    cold = gpu_rig("vllm")
    cold.start()
    cold.stop(5.0)
    write(
        gpu_rig.gpu / "faults.json",
        [{"op": "restore", "result": "CUDA_ERROR_UNKNOWN", "state": "FAILED", "always": True}],
    )
    replica = gpu_rig("vllm", take_snapshot=False)
    before = len(replica._cuda.changes())
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert replica.tracker.phase is Phase.SERVING and not replica.restored
    assert replica._cuda.changes()[before:].count("restore") == 1


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("weights", ["included", "excluded"])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_in_standby_no_gpu_memory_is_held(gpu_rig, launch_rig, engine, weights, restored):
    replica = gpu_rig(engine, weights=weights)
    replica.start()
    if restored:
        replica.stop(5.0)
        replica = gpu_rig(engine, weights=weights)
        replica.start()
        assert replica.restored
    expected = answer(replica)
    before = len(worker(replica)["calls"])
    for _ in range(2):
        replica.standby()
        assert replica.tracker.phase is Phase.STANDBY
        assert replica._cuda._used() == {GPU0: 0}
        held = sum(map(memory_bytes, processes_of(replica)))
        assert 0 < held <= replica.snapshot.image_bytes + PYTHON_GROWTH, "no more than the snapshot's images"
        replica.start()
        assert replica.resting.continued and replica.tracker.phase is Phase.SERVING
        assert replica._cuda._used() == {GPU0: USED}
        assert [span.phase for span in replica.tracker.timeline] == [Phase.WAKING, Phase.VERIFYING]
        assert answer(replica) == expected
    assert replica._cuda.changes()[-4:] == ["lock", "checkpoint", "restore", "unlock"]
    calls = json.dumps([*ASLEEP[engine, weights], *AWAKE[engine, weights]]).replace(MODEL, str(launch_rig.model))
    calls = calls.replace("quickthaw_trim", "quickthaw_drop_cache")
    assert worker(replica)["calls"][before:] == from_ring(json.loads(calls)) * 2 and worker(replica)["away"] == []


@pytest.mark.parametrize(
    ("operation", "code"), [("lock", "cuda-lock-failed"), ("checkpoint", "cuda-checkpoint-failed")]
)
def test_a_driver_that_refuses_leaves_the_engine_serving(gpu_rig, operation, code):
    replica = gpu_rig("sglang")
    replica.start()
    expected = answer(replica)
    write(gpu_rig.gpu / "faults.json", [{"op": operation, "pid": None, "result": "CUDA_ERROR_UNKNOWN"}])
    with pytest.raises(Failed) as refused:
        replica.standby()
    assert refused.value.code == code and replica.tracker.phase is Phase.SERVING
    assert worker(replica)["away"] == [] and answer(replica) == expected
    replica.standby()
    replica.start()
    assert answer(replica) == expected


@pytest.mark.parametrize("take_snapshot", [True, False])
def test_an_engine_whose_gpu_state_does_not_fit_into_host_memory_serves_on(gpu_rig, monkeypatch, take_snapshot):
    replica = gpu_rig("vllm", take_snapshot=take_snapshot)
    replica.start()
    expected, calls = answer(replica), len(replica._cuda.changes()) if take_snapshot else 0
    room = host_memory.Room(512 << 20, 1 << 30)
    monkeypatch.setattr(host_memory, "room", lambda: room)
    monkeypatch.setattr(standby_engine, "memory_held", lambda running: 0)
    with pytest.raises(EngineFailed) as refused:
        replica.standby()
    assert refused.value.code == "standby-memory-short" and replica.tracker.phase is Phase.SERVING
    assert worker(replica)["away"] == [] and answer(replica) == expected
    assert not take_snapshot or len(replica._cuda.changes()) == calls, "nothing was moved"
    room = host_memory.Room(2 << 30, 4 << 30)
    replica.standby()
    replica.start()
    assert answer(replica) == expected


def test_an_engine_whose_gpu_state_does_not_come_back_is_restored(gpu_rig, caplog):
    replica = gpu_rig("vllm")
    replica.start()
    expected = answer(replica)
    replica.standby()
    write(
        gpu_rig.gpu / "faults.json", [{"op": "restore", "pid": None, "result": "CUDA_ERROR_UNKNOWN", "state": "FAILED"}]
    )
    with caplog.at_level(logging.WARNING, "quickthaw"):
        replica.start()
    assert "standby-lost" in caplog.text and "cuda" in caplog.text
    assert replica.restored and not replica.resting.continued and answer(replica) == expected


def test_two_models_take_turns_on_a_gpu_that_holds_one(gpu_rig):
    """Without admission the driver's double has no room for the second, as a driver has none."""
    write(gpu_rig.gpu / "gpus.json", {GPU0: USED + MARGIN + USED // 2})
    replicas = {name: gpu_rig("sglang", take_snapshot=False) for name in ("red", "blue")}
    answers, engines = {}, {}
    for name, replica in replicas.items():
        replica.start()
        answers[name] = answer(replica)
        engines[name] = processes_of(replica)
        assert cuda.holders(replica._cuda, engines[name]), "the double knows it as one that was started here"
    for replica in replicas.values():
        replica.standby()
    with pytest.raises(Incompatible, match="gpu-memory-short"):
        cuda.check_memory(replicas["red"]._cuda, Needs(2, {GPU0: 2 * USED}))

    async def take_turns():
        admission = Admission(0, "lru", 0.0, 10.0, gpu_memory=USED + USED // 2)
        pools = {}
        for name, replica in replicas.items():
            start, standby = partial(asyncio.to_thread, replica.start), partial(asyncio.to_thread, replica.standby)
            pool = pools[name] = ReplicaPool(name=name, wake=admission.guard(name, start), standby=standby)
            pool.sleeper.evicts_to_standby = True
            pool.bind(asyncio.get_running_loop())
            pool.add(name, replica.tracker, from_url("http://127.0.0.1:1"))
            admission.add(Member(SimpleNamespace(name=name, pool=pool, tracker=replica.tracker), gpu_memory=USED))
        for number in range(6):
            name, other = ("red", "blue") if number % 2 else ("blue", "red")
            taken = await pools[name].acquire(60.0)
            assert replicas[name]._cuda._used() == {GPU0: USED}
            assert replicas[other].tracker.phase is Phase.STANDBY
            assert answer(replicas[name]) == answers[name] and processes_of(replicas[name]) == engines[name]
            pools[name].release(taken)

    asyncio.run(take_turns())


def test_a_page_server_that_dies_leaves_the_restore_to_criu(gpu_rig, monkeypatch, caplog):
    """The driver has not begun then, so there is a second try; it needs no page server, and the snapshot is not to blame."""
    cold = gpu_rig("vllm")
    cold.start()
    expected, name = answer(cold), cold.snapshot.name
    cold.stop(5.0)
    killed = []

    class Killed(PageServer):
        def _handle(self, event, message, fds):
            super()._handle(event, message, fds)
            if event == "space":
                self._process.kill()
                killed.append(self.pid)

    monkeypatch.setattr(restore, "PageServer", Killed)
    replica = gpu_rig("vllm", take_snapshot=False)
    before = len(replica._cuda.changes())
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert replica.restored and answer(replica) == expected
    assert len(set(killed)) == 1 and "pages-lost" in caplog.text, caplog.text
    assert replica._cuda.changes()[before:] == ["restore", "unlock"]
    assert not replica.library.health(name).failures


def test_damaged_pages_are_refused_before_the_driver_begins(gpu_rig, caplog):
    cold = gpu_rig("vllm")
    cold.start()
    expected = answer(cold)
    images = cold.library.path(cold.snapshot.name) / "images"
    cold.stop(5.0)
    os.truncate(max(images.glob("pages-*.img"), key=lambda file: file.stat().st_size), 1 << 20)
    replica = gpu_rig("vllm", take_snapshot=False)
    before = len(replica._cuda.changes())
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert not replica.restored and replica.tracker.phase is Phase.SERVING and answer(replica) == expected
    assert "starting cold" in caplog.text
    assert replica._cuda.changes()[before:] == []


def test_the_drivers_helper_starts_first_of_all(gpu_rig, monkeypatch):
    """cuInit takes up to a second, and CRIU, which is at work meanwhile, less."""
    cold = gpu_rig("vllm")
    cold.start()
    cold.stop(5.0)
    replica = gpu_rig("vllm")
    replica._cuda, started = None, []

    class Helper(TreeDouble):
        def start(self):
            started.append([span.phase for span in replica.tracker.timeline])

    monkeypatch.setattr(replica_module, "NVIDIA", gpu_rig.gpu)
    monkeypatch.setattr(helper, "Helper", lambda: Helper(str(gpu_rig.gpu)))
    replica.start()
    assert replica.restored
    assert len(started) == 1 and "restoring" not in started[0], started
