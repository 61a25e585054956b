"""A hub name, as every quick start writes it, with the real engines: an empty cache, a hub on loopback that wants a token, a snapshot, a
restore, the same answers."""

import json
import time
from pathlib import Path

import pytest

from plugin.bench import client as measure
from plugin.runtime.config import state_home
from tests.kits.engine_kit import Rig, get, phases
from tests.kits.hub_kit import Hub

pytestmark = [pytest.mark.t2, pytest.mark.timeout(1200)]
NAME = "acme/SmolLM2"
TOKEN = "hf_of_a_test"


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_a_hub_name_is_downloaded_snapshotted_and_restored(engine, tmp_path):
    shared = state_home()
    (shared / "compile").mkdir(mode=0o700, exist_ok=True)
    (tmp_path / "compile").symlink_to(shared / "compile")
    (tmp_path / "criu").symlink_to(shared / "criu")
    rig, hub = Rig(engine, tmp_path), Hub()
    hub.add(NAME, rig.preset.model, token=TOKEN)
    environment = hub.environment(tmp_path / "hf", HF_TOKEN=TOKEN)
    arguments = tuple(NAME if word == str(rig.preset.model) else word for word in rig.preset.arguments)
    try:
        answers = []
        for expected in (["mounting", "starting"], ["mounting", "restoring"]):
            port, command = rig.command(arguments=arguments, **environment)
            process = command.start()
            try:
                answer = measure.waiting_client(port, NAME, command.began, 900.0, process)
                limit = time.monotonic() + 300
                while measure.status(port)["pools"][0]["replicas"][0]["phase"] != "serving":
                    assert time.monotonic() < limit
                    time.sleep(0.2)
                assert phases(port)[0][:2] == expected
                assert json.loads(get(port, "/v1/models"))["data"][0]["id"] == NAME
                answers.append(answer.text)
            finally:
                command.stop()
                text = command.log.read_text(errors="replace")
            assert "off:" not in "\n".join(line for line in text.splitlines() if line.startswith("quickthaw:")), text[
                -2000:
            ]
            assert rig.watch.gone() == set()
            if expected[1] == "starting":
                assert hub.downloads().count("model.safetensors") == 1
                hub.requests.clear()
        assert answers[0] == answers[1] != ""
        assert hub.requests == []
        assert rig.library.load("under-test").model_path.startswith(str(Path(tmp_path / "hf" / "hub")))
    finally:
        hub.close()
