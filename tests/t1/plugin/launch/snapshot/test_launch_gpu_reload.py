"""Weights that an engine's own reload leaves out after the GPU has lost them: kept in the snapshot, or by the engine.

Engine and CUDA driver are doubles, as in test_launch_gpu.py; CRIU, the sandboxes and all of quickthaw are real.
"""

import json
import logging

import pytest

import launchers
from plugin.runtime.phases import Phase
from tests.kits.gpu_rig import answer, gpu_rig, worker

__all__ = ["gpu_rig"]
pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
EAGLE = ["--speculative-config", json.dumps({"method": "eagle3", "num_speculative_tokens": 3})]


@pytest.mark.parametrize(("release", "weights"), [((0, 0), "excluded"), ((99, 0), "included")])
def test_the_weights_of_a_draft_model_come_back(gpu_rig, monkeypatch, caplog, release, weights):
    """vLLM keeps them where it can (`release`: the first that does); else the snapshot has all weights."""
    monkeypatch.setattr("launchers.vllm._KEEPS_DRAFTS", release)
    cold = gpu_rig("vllm", arguments=EAGLE, weights="excluded")
    with caplog.at_level(logging.WARNING, "quickthaw"):
        cold.start()
    assert cold.snapshot.weights == weights and cold.snapshot.asleep
    assert ("weights included: reload-unsafe: --speculative-config" in caplog.text) == (weights == "included")
    assert ["sleep", 2 if weights == "excluded" else 1] in worker(cold)["calls"]
    expected, draft = answer(cold), worker(cold)["draft"]
    assert draft, "the first engine has them, too"
    cold.stop(5.0)
    replica = gpu_rig("vllm", arguments=EAGLE, weights="excluded")
    replica.start()
    assert replica.restored and worker(replica)["draft"] == draft and answer(replica) == expected
    replica.standby()
    replica.start()
    assert worker(replica)["draft"] == draft and answer(replica) == expected


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("weights", ["excluded", "auto"])
def test_quantized_weights_stay_in_the_snapshot(gpu_rig, engine, weights, caplog):
    cold = gpu_rig(engine, arguments=["--quantization", "fp8"], weights=weights)
    with caplog.at_level(logging.INFO, "quickthaw"):
        cold.start()
    assert cold.snapshot.weights == "included"
    assert "weights included: reload-unsafe: --quantization fp8" in caplog.text
    expected = answer(cold)
    cold.stop(5.0)
    replica = gpu_rig(engine, arguments=["--quantization", "fp8"], weights=weights)
    replica.start()
    assert replica.restored and answer(replica) == expected


def test_an_engine_that_reloads_other_weights_is_replaced(gpu_rig, launch_rig, monkeypatch, caplog):
    """Its answers after its own dump differ: it must not serve, and the next one takes no snapshot."""
    launcher = type(launchers.engine("vllm"))
    reload, spoilt = launcher.reload, []

    def other(self, client, model, excluded):
        reload(self, client, model, excluded)
        if not spoilt:
            spoilt.append(client.json("POST", "/spoil"))

    monkeypatch.setattr(launcher, "reload", other)
    replica = gpu_rig("vllm", weights="excluded")
    with caplog.at_level(logging.WARNING, "quickthaw"):
        replica.start()
    assert spoilt and "after its own dump the engine generates" in caplog.text
    assert "engine-not-resumed" in caplog.text and "a new one starts without a snapshot" in caplog.text
    assert replica.tracker.phase is Phase.SERVING and replica.snapshot is None and replica.library.names() == []
    monkeypatch.setattr(launcher, "reload", reload)
    sound = gpu_rig("vllm", weights="included")
    sound.start()
    assert answer(replica) == answer(sound)
