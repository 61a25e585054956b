"""What a restore on a GPU does side by side, by its recorded times; and that each failure on the way ends in a served request.

Both engines' control, CRIU, the sandbox, the page server, the ring and the driver's helper process are real; the driver
in the helper and the engine are doubles.
"""

import logging
from functools import partial

import pytest

from checkpoint.cuda import checkpoint as cuda
from checkpoint.sandbox.sandbox import Sandbox
from plugin.runtime.phases import Phase, Work
from tests.kits.checkpoint.cuda_double import GPU0, TOTAL, configure, timed, write
from tests.kits.gpu_rig import USED, answer, gpu_rig, helped_rig, worker
from tests.t1.plugin.launch.snapshot.test_launch_ring import after, until

__all__ = ["gpu_rig", "helped_rig"]
pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
MOVE_S = 0.3


@pytest.fixture
def replicas(helped_rig):
    """Return a function that makes replicas that exclude their weights; and the double's folder."""
    make = partial(helped_rig, weights="excluded")
    make.gpu = helped_rig.gpu
    return make


@pytest.fixture(params=["vllm", "sglang"])
def cold(request, replicas):
    """Return (engine, answer) of an engine that was started cold, snapshotted and ended."""
    replica = replicas(request.param)
    replica.start()
    assert replica.snapshot.weights == "excluded" and replica.snapshot.asleep
    expected = answer(replica)
    replica.stop(5.0)
    return request.param, expected


def work_of(replica):
    return {one.name: one for one in replica.tracker.work}


def criu_ends_first(monkeypatch, file):
    """Make `file` once CRIU has ended: what waits for it cannot have been waited for before."""
    whole = Sandbox.wait_criu

    def wait_criu(self, *arguments, **named):
        found = whole(self, *arguments, **named)
        file.touch()
        return found

    monkeypatch.setattr(Sandbox, "wait_criu", wait_criu)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_weights_pages_and_the_drivers_helper_are_at_work_side_by_side(replicas, monkeypatch, engine):
    first = replicas(engine, contexts=2)
    first.start()
    expected = answer(first)
    first.stop(5.0)
    until(monkeypatch, after(monkeypatch, cuda, "resume"))  # the last of the weights is read when the driver is done
    replica = replicas(engine, contexts=2)
    criu_ended = replicas.gpu / "criu-ended"
    criu_ends_first(monkeypatch, criu_ended)
    configure(replicas.gpu, init_until=str(criu_ended), restore=(MOVE_S, 0.0))
    replica._cuda.start()  # as `replica.driver` does at the start's first moment
    replica.start()
    assert replica.restored and answer(replica) == expected
    work, since = work_of(replica), replica.tracker._began
    assert work.keys() >= {"criu", "fill", "cuda", "weights"}
    # The weights' threads have begun before CRIU, and are at work beside it, beside the pages and beside the driver.
    assert work["weights"].at_s < work["criu"].at_s
    for other in ("criu", "fill", "cuda"):
        assert work["weights"].beside(work[other]) > 0.9 * work[other].took_s, (other, work)
    # The pages are all in place when the driver begins.
    assert work["fill"].until_s <= work["cuda"].at_s
    # cuInit runs beside CRIU, which does not wait for it.
    (call,) = timed(replicas.gpu, "init")
    init = Work("init", call.begin - since, call.end - call.begin)
    assert init.beside(work["criu"]) > 0, (init, work)
    # Both processes are restored at the same time.
    moves = [call for call in timed(replicas.gpu, "restore") if call.begin - since >= work["cuda"].at_s]
    assert len(moves) == 2 and moves[0].overlaps(moves[1])


def test_time_by_bytes_is_only_waited_for(cold, replicas):
    engine, expected = cold
    configure(replicas.gpu, restore=(0.0, 2 * USED))
    replica = replicas(engine)
    replica.start()
    assert replica.restored and answer(replica) == expected
    assert work_of(replica)["cuda"].took_s >= 0.5


EFAULT = "CUDA_ERROR_OPERATING_SYSTEM (EFAULT: 4096 bytes are absent)"
OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
FAULTS = {
    "efault": ({"result": EFAULT, "always": True}, "cuda-restore-failed"),
    "out of memory": ({"at": "end", "gpus": {GPU0: 0}, "result": OUT_OF_MEMORY, "state": "FAILED"}, "gpu-memory-short"),
    "hang": ({"hang": 60.0}, "(restore took longer than 1 s)"),
    "dead helper": ({"at": "end", "exit": True}, "(the helper died in restore)"),
    "dead process": ({"kill": True}, "cuda-restore-failed"),
}


@pytest.mark.parametrize("cold", ["sglang"], indirect=True)  # vLLM's: test_launch_gpu_helper.py
@pytest.mark.parametrize("fault", FAULTS)
def test_a_driver_that_fails_ends_in_a_served_request(cold, replicas, monkeypatch, caplog, fault):
    """The engine that the driver lost is ended, and the same held request is served by one that starts cold."""
    engine, expected = cold
    what, code = FAULTS[fault]
    monkeypatch.setattr(cuda, "MOVE_LEAST_S", 1.0)
    write(replicas.gpu / "faults.json", [{"op": "restore", **what}])
    replica = replicas(engine, take_snapshot=False)
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert replica.tracker.phase is Phase.SERVING and answer(replica) == expected
    assert not replica.restored and worker(replica)["away"] == []
    assert code in caplog.text and "starting cold under the same held requests" in caplog.text
    write(replicas.gpu / "gpus.json", {GPU0: TOTAL})
    name = replica.library.names()[0]
    replica.stop(5.0)
    (replicas.gpu / "faults.json").unlink(missing_ok=True)
    again = replicas(engine, take_snapshot=False)
    again.start()
    assert answer(again) == expected and again.library.names() == [name]
