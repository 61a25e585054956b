"""`quickthaw proxy --config` with a real engine: a model that is a snapshot is restored when it is asked for, goes to sleep
for another, and is restored again.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from plugin.bench import client as measure
from tests.kits.engine_kit import NAME, REPO, post

pytestmark = [pytest.mark.t2, pytest.mark.timeout(1200)]
TOY = Path(__file__).parents[1] / "programs" / "proxy_engine.py"


@pytest.mark.engine("sglang")  # the same code for both engines
def test_a_snapshot_is_woken_by_a_request_put_to_sleep_for_another_and_woken_again(rig):
    config = rig.home / "models.yaml"
    config.write_text(f"""
max_awake: 1
min_awake: 0
models:
  real: {{snapshot: {NAME}, aliases: [gpt-4o-mini], served_name: "{rig.preset.model}"}}
  toy:  {{command: "exec {sys.executable} -S {TOY} ${{PORT}} toy"}}
""")
    environment = os.environ | rig.preset.environment | rig.watch.environment | {"QUICKTHAW_HOME": str(rig.home)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    argv = [sys.executable, "-m", "plugin", "proxy", "--config", str(config), "--listen", "127.0.0.1:0"]
    command = measure.Command(argv, environment, rig.home / "proxy.log", REPO)
    process = command.start()
    try:
        while not (listening := re.search(r"listening on http://127.0.0.1:(\d+)", command.log.read_text())):
            assert process.poll() is None, command.log.read_text()[-2000:]
            time.sleep(0.02)
        port = int(listening[1])
        asked = {"prompt": "The capital of France is", "max_tokens": 5, "temperature": 0}
        answers = []
        for model in ("gpt-4o-mini", "toy", "real"):
            status, body = post(port, "/v1/completions", asked | {"model": model}, timeout_s=300)
            assert status == 200, body
            answers.append(json.loads(body))
        assert answers[0]["choices"][0]["text"] == answers[2]["choices"][0]["text"] and answers[1]["name"] == "toy"
        real, toy = measure.status(port)["pools"]
        assert (real["wakes"], real["sleeps"], toy["wakes"], toy["sleeps"]) == (2, 1, 1, 1)
        assert list(real["starts"]) == ["restored"], "known for a restore, and not for a cold start"
        assert [span["phase"] for span in real["starts"]["restored"]] == [
            "mounting",
            "restoring",
            "waking",
            "verifying",
        ]
    finally:
        command.stop()
    assert rig.watch.gone() == set()
