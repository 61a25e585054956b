"""Replicas in this process on a host whose GPU is the driver's double; the engine is a double, too."""

import os

import pytest

import launchers
from checkpoint.compatibility import host
from checkpoint.compatibility.gpu import Gpu
from checkpoint.criu.binary import Criu
from checkpoint.cuda.driver import MOVE_TIMEOUT_S
from checkpoint.cuda.helper import Helper
from plugin.runtime.capabilities import Capabilities
from plugin.runtime.config import LaunchSettings, state_home
from plugin.runtime.phases import PhaseTracker
from plugin.runtime.replica import Replica
from plugin.runtime.steps.model_mount import Weights
from tests.kits.checkpoint.cuda_double import GPU0, TOTAL, TreeDouble, configure, write

USED = 1 << 20
"""Bytes of the double's GPU memory that each context uses."""


@pytest.fixture
def gpu_rig(launch_rig, monkeypatch, tmp_path):
    """Return a function that makes replicas of the double on a GPU."""
    gpu = tmp_path / "gpu"
    gpu.mkdir()
    write(gpu / "gpus.json", {GPU0: TOTAL})
    configure(gpu, memory={GPU0: USED})
    found = ((Gpu(name="Double", memory=TOTAL, uuid=GPU0),), "580.159.03")
    monkeypatch.setattr(host, "gpu_facts", lambda environment=None: found)
    for name, value in launch_rig.env().items():
        monkeypatch.setenv(name, value)
    made = []

    def make(engine="vllm", arguments=(), criu=None, contexts=1, **settings):
        launcher = launchers.engine(engine)
        flag = "--model" if engine == "vllm" else "--model-path"
        environment = {**os.environ, "ENGINE_DOUBLE_GPU": str(contexts)}
        replica = Replica(
            LaunchSettings(
                engine=engine,
                command=launcher.parse([flag, str(launch_rig.model), *arguments], environment),
                engine_python=str(launch_rig.python),
                home=launch_rig.home,
                environment=environment,
                **settings,
            ),
            launcher,
            Capabilities(),
            criu or Criu.find(state_home()),
            Weights(str(launch_rig.model), launch_rig.home, None, True),
            PhaseTracker(),
            stdout=None,
            stderr=None,
        )
        replica._cuda = TreeDouble(str(gpu))
        made.append(replica)
        return replica

    make.gpu = gpu
    yield make
    for replica in made:
        replica.stop(5.0)
        replica.weights.close()


@pytest.fixture
def helped_rig(gpu_rig):
    """Return a function as `gpu_rig` does, for replicas whose driver is in a real helper process."""
    helpers = []

    def make(engine="vllm", move_timeout_s=MOVE_TIMEOUT_S, **settings):
        replica = gpu_rig(engine, **settings)
        double = "tests.kits.checkpoint.cuda_double:TreeDouble"
        replica._cuda = Helper(double, str(gpu_rig.gpu), move_timeout_s=move_timeout_s)
        helpers.append(replica._cuda)
        return replica

    make.gpu = gpu_rig.gpu
    yield make
    for helper in helpers:
        helper.close()


def worker(replica):
    return replica.running.client.json("GET", "/facts")["worker"]


def answer(replica):
    return replica.engine.generate(replica.running.client, "The quick brown fox", 4)
