"""A real engine on a real GPU: suspended and resumed, and launched, snapshotted, restored and back from standby, always with the same answer.

Skipped, with the reason, where either is missing.

QUICKTHAW_GPU_PYTHON: an interpreter with vLLM or SGLang for CUDA. QUICKTHAW_GPU_MODEL: a folder with a small model.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu_steps import ARGUMENTS, ENVIRONMENT
from checkpoint.cuda.checkpoint import resume, suspend
from checkpoint.cuda.helper import Helper
from tests.kits.checkpoint.gpu import GPU_PYTHON, skip_reason
from tests.kits.checkpoint.gpu_launch import check_launch
from tests.kits.launch_rig import Rig

MODEL = os.environ.get("QUICKTHAW_GPU_MODEL", "")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(skip_reason()), reason=skip_reason() or "a GPU is here"),
    pytest.mark.skipif(not MODEL, reason="set QUICKTHAW_GPU_MODEL to a folder with a small model"),
]
START_LIMIT_S = 900.0
COMMANDS = {
    "vllm": ["-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, *ARGUMENTS["vllm"]],
    "sglang": ["-m", "sglang.launch_server", "--model-path", MODEL, *ARGUMENTS["sglang"]],
}
OTHER = {"QUICKTHAW_SHARED_STEP": None, "SGLANG_USE_CPU_ENGINE": None, "PYTHONPATH": None}
"""Variables that Rig sets for the doubles."""


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps(body).encode() if body else None,
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        data = answer.read()
    return json.loads(data) if data else None


@pytest.fixture(params=COMMANDS)
def engine(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if subprocess.run([GPU_PYTHON, "-c", f"import {name}"], capture_output=True, timeout=300, check=False).returncode:
        pytest.skip(f"{GPU_PYTHON} has no {name}; set QUICKTHAW_GPU_PYTHON")
    return name


@pytest.mark.parametrize("weights", ["included", "excluded"])
def test_a_launch_is_restored_and_comes_back_from_standby_with_the_same_answer(
    engine: str, weights: str, tmp_path: Path
) -> None:
    rig = Rig(tmp_path, Path(GPU_PYTHON), engine)
    rig.model = Path(MODEL)
    check_launch(rig, weights, "--no-mount", arguments=ARGUMENTS[engine], env=OTHER | ENVIRONMENT)


def test_an_engine_gives_the_same_answer_after_suspend_and_resume(engine: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "log").open("wb") as log:
        argv = [GPU_PYTHON, *COMMANDS[engine], "--host", "127.0.0.1", "--port", str(port)]
        env = {**os.environ, **ENVIRONMENT}
        process = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    tree: list[psutil.Process] = []
    try:
        limit = time.monotonic() + START_LIMIT_S
        while True:
            assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
            assert time.monotonic() < limit
            try:
                ask(port, "/health")
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        question = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
        before = ask(port, "/v1/completions", question)["choices"][0]["text"]
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        with Helper() as helper:
            free = sum(d.free for d in helper.devices())
            found, needs = suspend(helper, [p.pid for p in tree], lock_timeout_s=30.0)
            assert found
            assert sum(d.free for d in helper.devices()) > free + (512 << 20)
            resume(helper, [p.pid for p in tree], needs, lock_folders=[tmp_path])
        assert ask(port, "/v1/completions", question)["choices"][0]["text"] == before
    finally:
        for member in tree or [psutil.Process(process.pid)]:
            if member.is_running():
                member.kill()
        process.wait(60)
