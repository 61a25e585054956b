"""Which canary an engine gets, depending on what it answers, and how its numbers are compared."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest

from checkpoint.snapshot.manifest import Canary, distance
from launchers import engine
from launchers.canary import CANARY_PROMPT, SECOND_PROMPT, numbers, of_kind, record
from launchers.client import Client
from launchers.errors import EngineDied, EngineFailed
from launchers.readiness import Probe

pytestmark = pytest.mark.t0


class Answers(Client):
    """A client with an answer for each path, or a status to refuse with (404 for other paths)."""

    def __init__(self, **paths):
        super().__init__(lambda: pytest.fail("no engine here"))
        self.paths, self.asked = {f"/{name.replace('__', '/')}": found for name, found in paths.items()}, []

    def json(self, method, path, body=None, timeout_s=30.0):
        self.asked.append(path)
        found = self.paths.get(path, 404)
        if isinstance(found, int):
            raise EngineFailed("engine-refused", f"{path} answered {found}", status=found)
        return found(body) if callable(found) else found


TOKENS = {"choices": [{"token_ids": [1]}]}


def only_ids(body):
    if not isinstance(body["prompt"], list):
        raise EngineFailed("engine-refused", "no tokenizer", status=400)
    return TOKENS


@pytest.mark.parametrize(
    ("paths", "kind", "prompts"),
    [
        ({"v1__completions": TOKENS}, "generate", [CANARY_PROMPT]),
        ({"v1__completions": only_ids}, "generate", [[10, 11, 12]]),
        ({"v1__embeddings": {"data": [{"embedding": [0.5]}]}}, "embed", [CANARY_PROMPT, SECOND_PROMPT]),
        (
            {"v1__completions": 400, "classify": {"data": [{"probs": [0.5]}]}},
            "classify",
            [CANARY_PROMPT, SECOND_PROMPT],
        ),
        ({"classify": 501, "score": {"data": [{"score": 0.5}]}}, "score", [CANARY_PROMPT, SECOND_PROMPT]),
        ({"pooling": {"data": [{"data": [[0.5], [1]]}]}}, "pool", [CANARY_PROMPT, SECOND_PROMPT]),
    ],
)
def test_vllms_canary_is_the_first_kind_it_answers(paths, kind, prompts):
    found = engine("vllm").find_canary(Answers(**paths), patient=True)
    assert found.kind == kind and found.asked == prompts


def test_an_engine_that_refuses_everything_has_no_canary():
    assert engine("vllm").find_canary(Answers(), patient=True) is None
    for odd in ({"choices": [{}]}, {"choices": []}, ["?"], None):
        assert engine("vllm").find_canary(Answers(v1__completions=odd), patient=True) is None


@pytest.mark.parametrize(("status", "later"), [(503, True), (429, True), (500, False)])
def test_temporary_refusals_are_retried_and_internal_errors_only_for_a_while(status, later):
    with pytest.raises(EngineFailed):
        engine("vllm").find_canary(Answers(v1__completions=status), patient=True)
    if later:
        with pytest.raises(EngineFailed):
            engine("vllm").find_canary(Answers(v1__completions=status))
    else:
        assert engine("vllm").find_canary(Answers(v1__completions=status)) is None


def test_an_sglang_without_generation_is_never_asked_to_generate():
    client = Answers(model_info={"is_generation": False}, encode={"embedding": [1.0]}, generate={"output_ids": [1]})
    sglang = engine("sglang")
    canary = sglang.find_canary(client)
    assert canary.kind == "embed"
    sglang.warm_up(client, canary)
    sglang.answer(client, canary)
    assert "/generate" not in client.asked
    assert (
        sglang.find_canary(Answers(generate={"output_ids": [1]})).kind == "generate"
    )  # an older SGLang without /model_info


class Starting(Answers):
    """An engine that answers, and is not healthy until its health page has been asked `unhealthy` times."""

    def __init__(self, unhealthy, **paths):
        super().__init__(**paths)
        self.unhealthy, self.pages = unhealthy, []

    def call(self, method, path, body=None, timeout_s=30.0, headers=None):
        self.pages.append(path)
        if path == "/health":
            return (503 if self.pages.count(path) <= self.unhealthy else 200), b""
        return 200, b"{}"


def probe():
    return Probe(lambda: None, lambda: "", 60.0)


GENERATES = {"model_info": {"is_generation": True}, "generate": {"output_ids": [1]}}


def test_sglang_is_ready_before_its_own_warm_up_and_vllm_is_not():
    client = Starting(9, **GENERATES)
    assert engine("sglang").wait_ready(client, probe()).kind == "generate"
    assert "/health" not in client.pages, "its answers take a second each"
    client = Starting(1, v1__completions=TOKENS)
    assert engine("vllm").wait_ready(client, probe()).kind == "generate"
    assert client.pages == ["/health", "/health"]


def test_an_sglang_that_refuses_every_canary_is_as_ready_as_it_says():
    client = Starting(1)
    assert engine("sglang").wait_ready(client, probe()) is None
    assert client.pages.count("/health") == 2


def test_waiting_for_health_ends_with_the_engine():
    with pytest.raises(EngineDied):
        engine("sglang").wait_healthy(Starting(9), Probe(lambda: 3, lambda: "", 60.0))
    with pytest.raises(EngineFailed, match="engine-start-timeout"):
        engine("sglang").wait_healthy(Starting(9), Probe(lambda: None, lambda: "", 0.0))


@pytest.mark.parametrize(("gpu", "generated", "plain"), [(False, 1, 2), (True, 8, 8)])
def test_on_a_gpu_the_canary_replays_decode_steps(gpu, generated, plain):
    """What an engine asked for `max_tokens` decodes: one token from the prefill, each further one by a captured graph."""
    choices = {"prompt_logprobs": [None, {"7": {"rank": 1}}]}
    asked = []

    def completions(body):
        asked.append(body["max_tokens"])
        return {"choices": [{"token_ids": list(range(body["max_tokens"])), **choices}]}

    found = engine("vllm").record(Answers(v1__completions=completions), gpu)
    assert found.generated == generated and found.token_ids == [7, *range(generated)] and asked == [generated]
    choices.clear()  # it tells no probabilities
    assert engine("vllm").record(Answers(v1__completions=completions), gpu).token_ids == list(range(plain))


EMBED = of_kind("embed")[0]


def embed(noise):
    """Return an engine's embeddings, with another error added each time."""
    errors = itertools.cycle(noise)
    return lambda prompt: [float(len(prompt)), 3.0 + next(errors), 5.0]


def test_numbers_are_recorded_with_their_noise():
    quiet = record(EMBED, embed([0.0]))
    assert quiet.tolerance == 0.1 and quiet.values[0] == [9.0, 3.0, 5.0]
    assert 0.1 < record(EMBED, embed([0.0, 0.0, 1.0])).tolerance < 0.2


@pytest.mark.parametrize(
    "ask", [embed([0.0, 9.0, 5.0]), lambda prompt: [1.0], lambda prompt: [0.0], lambda p: [math.nan]]
)
def test_unusable_numbers_are_no_canary(ask):
    with pytest.raises(EngineFailed) as caught:
        record(EMBED, ask)
    assert caught.value.code == "no-canary"


def test_numbers_differ_by_more_than_their_tolerance():
    canary = record(EMBED, embed([0.0]))
    assert canary.difference([[9.01, 3.0, 5.0], canary.values[1]]) == ""
    assert "embed 0.1" in canary.difference([[9.0, 3.0, 9.0], canary.values[1]])
    for wrong in ([[math.nan] * 3] * 2, [canary.values[0]], [[0.0] * 3] * 2, list(reversed(canary.values))):
        assert canary.difference(wrong)
    assert distance([[1.0]], [[1.0]]) == 0 and distance([[1.0]], [[1.0], []]) == math.inf


def test_numbers_are_found_in_nested_lists():
    assert (
        numbers([[1, 2.5], [[3]]]) == [1, 2.5, 3] and numbers(0.5) == [0.5] and len(numbers([[1.0] * 400] * 9)) == 512
    )
    with pytest.raises(EngineFailed):
        numbers("base64")


def test_a_generation_canary_is_written_in_the_older_format():
    canary = Canary("Once upon", [1, 2], 1)
    assert msgspec.json.decode(msgspec.json.encode(canary)) == {
        "prompt": "Once upon",
        "token_ids": [1, 2],
        "generated": 1,
    }
    assert (
        msgspec.json.decode(b'{"prompt": "The", "token_ids": [7], "generated": 0}', type=Canary).difference([7]) == ""
    )
    kept = record(EMBED, embed([0.0]))
    assert msgspec.json.decode(msgspec.json.encode(kept), type=Canary) == kept


def test_a_health_page_is_waited_for_as_long_as_it_generates():
    """SGLang's page generates, for 20 s at most: one that is given up goes on, and shares a step with the next question."""
    limits = []

    class Slow(Answers):
        def call(self, method, path, body=None, timeout_s=30.0, headers=None):
            limits.append((path, timeout_s))
            return 200, b""

    engine("sglang").wait_healthy(Slow(), probe())
    ((path, limit_s),) = limits
    assert path == "/health" and limit_s > 20.0
