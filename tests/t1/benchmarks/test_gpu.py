"""The script for a lent GPU, whole, on the doubles of the engine and of the driver; and killed in the middle.

The launches, CRIU and the sandbox are real.
"""

import json
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from benchmarks.gpu_figures import JSON, TABLE
from plugin.runtime.home import state_home
from tests.kits.checkpoint.cuda_double import GPU0, TOTAL, configure, write
from tests.kits.checkpoint.gpu_launch import check_launch
from tests.kits.launch_rig import REPO

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
STANDBY = "from standby"
OWN = {
    "vllm": {"vLLM's sleep level 1, awake", "vLLM's sleep level 2, awake"},
    "sglang": {"SGLang's release of the KV cache, awake", "SGLang's release of all, awake"},
}


@pytest.fixture
def script(launch_rig):
    """Return a function that starts the script; nothing of it is left at the end (launch_rig)."""
    work, out = launch_rig.folder / "gpu", launch_rig.folder / "out"
    (work / "home").mkdir(parents=True)
    (work / "home" / "criu").symlink_to(state_home() / "criu")

    def start(engine, *options):
        words = [
            "--double",
            "--engine",
            engine,
            "--work",
            work,
            "--out",
            out,
            "--restores",
            "1",
            "--alones",
            "1",
            *options,
        ]
        argv = [sys.executable, "benchmarks/gpu.py", "run", *map(str, words)]
        return subprocess.Popen(
            argv,
            cwd=REPO,
            env=launch_rig.env(PYTHONPATH=None),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    start.out = out
    return start


def figures(script):
    return json.loads((script.out / JSON).read_text())


def wait_for(script, row, process):
    limit = time.monotonic() + 60
    while not (script.out / JSON).exists() or row not in figures(script)["rows"]:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_way_is_in_the_table(script, engine):
    process = script(engine, "--budget", "2m", "--wakes", "2")
    said = process.communicate(timeout=110)[0]
    assert process.returncode == 0, said
    found = figures(script)
    assert found["rows"].keys() >= {
        "first start through quickthaw",
        STANDBY,
        "restored",
        "alone, warm caches",
        *OWN[engine],
    }
    assert len(found["rows"][STANDBY]) == 2 and len(found["answers"]) == 1
    assert found["phases"]["restored"].keys() >= {
        "restoring",
        "waking",
        "verifying",
        "(criu)",
        "(fill)",
        "(cuda)",
        "(weights)",
    }
    assert found["facts"]["snapshot"]["processes with a context"] == 1
    assert {how.split()[0] for how in found["steps"].values()} <= {"done", "not"}, found["steps"]
    table = (script.out / TABLE).read_text()
    with tarfile.open(script.out / "logs.tar.gz") as archive:
        assert {"logs/restored-first.log", "logs/alone-alone-1.log"} <= {*archive.getnames()}, archive.getnames()
    assert table in said and "all answers equal" in table and "times faster than alone" in table


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_the_table_so_far(script, number):
    process = script("sglang", "--budget", "2m", "--wakes", "1", "--restores", "50")
    wait_for(script, "restored", process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    found = figures(script)
    assert found["rows"][STANDBY] and found["rows"]["restored"] and "alone, warm caches" not in found["rows"]
    assert "restored " in (script.out / TABLE).read_text()
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number and (script.out / TABLE).read_text() in said
        assert found["steps"]["restores"].startswith("failed after") and "SystemExit" in found["steps"]["restores"]
    else:
        assert found["steps"]["restores"] == "begun, not ended"


def test_what_does_not_fit_into_the_time_is_not_begun(script):
    process = script("sglang", "--budget", "2s", "--wakes", "1")
    process.communicate(timeout=60)
    found = figures(script)
    assert (
        found["steps"]["the engine alone"].startswith(("not begun", "failed"))
        and "alone, warm caches" not in found["rows"]
    )


@pytest.mark.parametrize("weights", ["included", "excluded"])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_tests_gpu_asks_of_real_engines_holds_for_the_doubles(launch_rig, engine, weights):
    launch_rig.engine = engine
    gpu = launch_rig.folder / "gpu"
    gpu.mkdir()
    write(gpu / "gpus.json", {GPU0: TOTAL})
    configure(gpu, memory={GPU0: 1 << 20})
    env = {"GPU_DOUBLE": str(gpu), "ENGINE_DOUBLE_GPU": "1"}
    check_launch(launch_rig, weights, "--no-mount", program=("-m", "tests.programs.gpu_launch"), env=env)
