"""The main job with the real engines: started cold, restored, asleep, dead, alone. Nothing here is a double.

A skipped test in this folder is a failure in CI (.ci/run counts).
"""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from plugin.bench import client as measure
from tests.kits.engine_kit import NAME, answer_at_rest, engine_root, phases, post

pytestmark = [pytest.mark.t2, pytest.mark.timeout(1200)]


def test_the_cold_start_answers_serves_on_and_leaves_a_snapshot(rig):
    assert "degrees" in rig.cold_text
    timeline = [span["phase"] for span in rig.cold_status["pools"][0]["replicas"][0]["timeline"]]
    assert timeline == ["mounting", "starting", "loading", "warming", "trimming", "checkpointing", "resuming"]
    assert len(rig.mounts) == 1
    snapshot = rig.library.load(NAME)
    assert snapshot.kv_cache_bytes > 300e6
    assert snapshot.canary.token_ids


def test_ten_restores_in_a_row_all_verify_and_answer_the_same(rig):
    for _ in range(10):
        with rig.running(limit_s=120.0) as (port, answer, _, _):
            assert answer.text == rig.cold_text
            assert phases(port) == [["mounting", "restoring", "waking", "verifying"]]


def test_two_replicas_of_one_snapshot_answer_at_the_same_time(rig):
    with rig.running("--replicas", "2", NAME, words=("restore",), limit_s=120.0) as (port, answer, _, _):
        assert answer.text == rig.cold_text
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            replicas = measure.status(port)["pools"][0]["replicas"]
            if all(replica["phase"] == "serving" for replica in replicas):
                break
            time.sleep(0.1)
        body = {"model": str(rig.preset.model), "prompt": measure.PROMPT, "max_tokens": 16, "temperature": 0}
        # One at a time for each replica: in a batch the engine alone gives another greedy text on some processors (bf16 matrix units).
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: post(port, "/v1/completions", body), range(6)))
        assert {status for status, _ in answers} == {200}
        assert {json.loads(data)["choices"][0]["text"] for _, data in answers} == {rig.cold_text}
        served = [replica["served"] for replica in measure.status(port)["pools"][0]["replicas"]]
        assert min(served) > 0, served


def test_plain_restores_work_too(rig):
    with rig.running("--no-lazy", limit_s=120.0) as (port, answer, _, _):
        assert answer.text == rig.cold_text
        assert phases(port) == [["mounting", "restoring", "waking", "verifying"]]


def test_a_request_to_a_sleeping_engine_wakes_it(rig):
    with rig.running("--sleep-after", "1", limit_s=120.0) as (port, answer, _, _):
        limit = time.monotonic() + 60
        while measure.status(port)["pools"][0]["replicas"][0]["phase"] != "asleep":
            assert time.monotonic() < limit
            time.sleep(0.1)
        again = measure.stream_completion(port, str(rig.preset.model), time.monotonic(), 16, 120.0)
        assert again.text == answer.text == rig.cold_text


def test_an_engine_that_dies_while_serving_comes_back(rig):
    with rig.running(limit_s=120.0) as (port, _, process, _):
        os.kill(engine_root(process), 9)
        limit = time.monotonic() + 120
        while True:
            try:
                answer = measure.stream_completion(port, str(rig.preset.model), time.monotonic(), 16, 120.0)
                break
            except (OSError, measure.MeasureError):
                assert time.monotonic() < limit
        assert answer.text == rig.cold_text


@pytest.mark.engine("sglang")  # the same code for both engines, and a cold start of a minute
def test_without_fuse_and_criu_the_engine_still_serves(rig):
    with rig.running("--no-mount", QUICKTHAW_CRIU="/nowhere/criu") as (port, answer, _, command):
        assert answer.text and answer_at_rest(rig, port) == rig.cold_text
        assert phases(port) == [["mounting", "starting", "loading", "warming"]]
        assert command.log.read_text().count("snapshots off: criu-missing") == 1


@pytest.mark.engine("sglang")  # vLLM's own failure takes half a minute longer and shows nothing else
def test_an_engine_that_cannot_load_says_so_in_one_line(rig, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(rig.preset.model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"], "model_type": "nosuch"}))
    arguments = ["--model-path", str(broken), "--device", "cpu", "--attention-backend", "torch_native"]
    port, command = rig.command(arguments=arguments)
    process = command.start()
    assert process.wait(300) not in (0, None)
    lines = [line for line in command.log.read_text().splitlines() if line.startswith("quickthaw: engine-died")]
    assert len(lines) == 1, command.log.read_text()[-2000:]
    assert rig.watch.gone() == set()
