"""Engines that do not generate: ready once they are healthy, snapshotted with a canary of their own kind, never asked to generate.

In these modes the double ends if it is asked to generate.
"""

import time

import pytest

from checkpoint.snapshot.manifest import distance
from tests.kits.launch_rig import PROMPT, call

pytestmark = [pytest.mark.t1]
POOLING = ("--runner", "pooling", "--convert")
KINDS = {
    "vLLM, embeddings": ("vllm", (*POOLING, "embed"), "/v1/embeddings", "embed"),
    "vLLM, classes": ("vllm", (*POOLING, "classify"), "/classify", "classify"),
    "vLLM, rewards": ("vllm", (*POOLING, "reward"), "/pooling", "pool"),
    "SGLang, embeddings": ("sglang", ("--is-embedding",), "/encode", "embed"),
}


def post(started, path, body):
    """Send a request as soon as the port is bound, and wait for its answer from a replica."""
    limit = time.monotonic() + 60
    while True:
        try:
            status, answer = call(started.port, "POST", path, body)
            break
        except ConnectionRefusedError:
            assert started.process.poll() is None and time.monotonic() < limit, started.text()[-3000:]
            time.sleep(0.01)
    assert status == 200, (answer, started.text()[-3000:])
    return answer


def ask(started, path):
    """Return the numbers of one request."""
    answer = post(started, path, {"text" if path == "/encode" else "input": PROMPT})
    if path == "/encode":
        return answer["embedding"]
    found = answer["data"][0]
    (numbers,) = [value for value in found.values() if isinstance(value, list)]
    return numbers[0] if path == "/pooling" else numbers


@pytest.mark.slow
@pytest.mark.parametrize("what", KINDS)
def test_an_engine_without_generation_is_snapshotted_and_restored(rig_of, what):
    engine, arguments, path, kind = KINDS[what]
    rig = rig_of(engine)
    with rig.running(arguments=arguments) as started:
        first = ask(started, path)
        started.wait_serving()
        assert "off:" not in started.ours()
    canary = rig.library.load(rig.name).canary
    assert canary.kind == kind and len(canary.values) == 2 and 0 < canary.tolerance < 0.2
    with rig.running(arguments=arguments) as started:
        assert distance([ask(started, path)], [first]) < 0.01
        assert started.phases() == [["mounting", "restoring", "waking", "verifying"]]
    shown = rig.cli("snapshot", "inspect", rig.name)
    assert f"{kind} 'Once upon'" in shown.stdout, shown


@pytest.mark.slow
@pytest.mark.parametrize("what", ["vLLM, embeddings", "vLLM, classes", "SGLang, embeddings"])
def test_lost_weights_differ_from_the_canary(rig_of, what):
    engine, arguments, path, _ = KINDS[what]
    rig = rig_of(engine)
    with rig.running(arguments=arguments) as started:
        ask(started, path)
        started.wait_serving()
    with rig.running("--no-snapshot", arguments=arguments, env={"POD_SPOILED": "1"}) as started:
        ask(started, path)
        assert "failed" in started.phases()[0] and started.phases()[0][-1] == "warming"
        assert "canary-differs: the restored engine answers to" in started.text()


@pytest.mark.slow
def test_an_engine_without_a_canary_serves_plainly_and_logs_it_once(rig_of):
    rig = rig_of("vllm")
    with rig.running(arguments=("--task", "transcription")) as started:
        assert post(started, "/v1/audio/transcriptions", {})["text"] == "hello"
        assert started.phases() == [["mounting", "starting", "loading", "warming"]]
        assert started.ours().count("snapshots off: no-canary: this vllm answers no generation") == 1
    assert rig.library.names() == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_without_a_tokenizer_is_asked_in_token_ids(rig_of, engine):
    rig = rig_of(engine)
    path, body = {
        "vllm": ("/v1/completions", {"prompt": [5, 6], "max_tokens": 4, "temperature": 0}),
        "sglang": ("/generate", {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}),
    }[engine]

    def tokens(started):
        answer = post(started, path, body)
        return answer["output_ids"] if engine == "sglang" else answer["choices"][0]["token_ids"]

    with rig.running(arguments=("--skip-tokenizer-init",)) as started:
        first = tokens(started)
        started.wait_serving()
    canary = rig.library.load(rig.name).canary
    assert canary.prompts == [[10, 11, 12]] and len(canary.token_ids) == 3
    with rig.running(arguments=("--skip-tokenizer-init",)) as started:
        assert tokens(started) == first
        assert started.phases()[0][1] == "restoring"


@pytest.mark.slow
def test_an_embedding_wakes_a_sleeping_engine(rig_of):
    engine, arguments, path, _ = KINDS["SGLang, embeddings"]
    rig = rig_of(engine)
    with rig.running("--sleep-after", "0.5", arguments=arguments) as started:
        first = ask(started, path)
        limit = time.monotonic() + 60
        while started.status()[0]["phase"] != "asleep":
            assert time.monotonic() < limit, started.text()[-3000:]
            time.sleep(0.05)
        assert distance([ask(started, path)], [first]) < 0.01


@pytest.mark.slow
def test_a_model_with_a_short_context_is_warmed_up_with_short_prompts(rig_of):
    rig = rig_of("vllm")
    with rig.running(arguments=("--max-model-len", "32")) as started:
        started.ask()
        started.wait_serving()
    assert rig.library.has(rig.name)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_that_fails_its_warm_up_serves_without_a_snapshot(rig_of, engine):
    rig = rig_of(engine)
    with rig.running(env={"ENGINE_DOUBLE_NO_CHAT": "1"}) as started:
        started.ask()
        started.wait_serving()
        assert "no snapshot: engine-unreachable: POST /v1/chat/completions" in started.ours(), started.ours()
        assert started.phases() == [["mounting", "starting", "loading", "warming"]]
    assert rig.library.names() == []


@pytest.mark.slow
def test_sglang_serves_before_its_own_warm_up_and_is_snapshotted_after_it(rig_of):
    rig = rig_of("sglang")
    rig.environment = {"ENGINE_DOUBLE_HEALTHY_AFTER": "3"}
    with rig.running("--no-snapshot") as started:
        first = started.ask()
        assert started.facts()["server"]["health_asked"] == 0
    with rig.running() as started:
        assert started.ask() == first
        started.wait_serving()
    with rig.running() as started:
        assert started.ask() == first
        assert started.phases() == [["mounting", "restoring", "waking", "verifying"]]
        assert started.facts()["server"]["health_asked"] == 4, "the dump waited until it was healthy"
