"""What a rehearsed engine is asked: a short and a long prompt, chats as streams, what it was started for, and a full batch.

The pages that these touch are a snapshot's working set. A batch touches pages that no single request does, and the
requests that wait for a restore come as one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from checkpoint.snapshot.manifest import GENERATE, Canary, Prompt
from launchers.base import tolerate_refusal
from launchers.client import Client
from launchers.errors import EngineFailed

if TYPE_CHECKING:
    from launchers.base import Engine

BATCH = 64
"""Requests at the same time; engines queue those beyond their own limit."""
TOKENS, BATCH_TOKENS, LONG_WORDS = 8, 8, 200
ADAPTERS = 4
"""How many LoRA adapters are tried."""
PATIENCE_S = 600.0
"""Maximum seconds for one request: at the lowest priority, beside a busy engine, all take long."""
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


class PatientClient(Client):
    """A client of an engine that has the lowest priority, and may be paused within a request."""

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        timeout_s: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """See Client; the limit is PATIENCE_S at least."""
        return super().call(method, path, body, max(timeout_s, PATIENCE_S), headers)


def first(engine: Engine, client: Client, canary: Canary) -> list[str]:
    """Send the requests of which any may be a user's first, which end the first part of a working set; return their names.

    A short one, and where the engine generates, chats as streams. Raises EngineFailed if the engine does not answer.
    """
    done = ["short"]
    _ask(engine, client, canary, "Water boils at one hundred", TOKENS)
    if canary.kind == GENERATE:
        with tolerate_refusal():
            engine.warm_up_chats(client)
            done.append("streamed")
    return done


def typical(engine: Engine, client: Client, canary: Canary, arguments: Mapping[str, Any]) -> list[str]:
    """Send the other typical requests and return their names. `arguments`: the engine's options, by name.

    Raises EngineFailed if the engine does not answer; what it refuses is left out.
    """
    done = []

    def step(name: str, send: Callable[[], object]) -> None:
        with tolerate_refusal():
            send()
            done.append(name)

    step("long", lambda: _ask(engine, client, canary, _prompt(canary, LONG_WORDS, 0), TOKENS))
    if canary.kind == GENERATE:
        if any("tool" in name for name in arguments):
            step("tools", lambda: _chat_with_tools(client))
        for adapter in _adapters(client) if any("lora" in name for name in arguments) else ():
            step(f"adapter {adapter}", partial(_complete, client, adapter))
    step(f"batch of {BATCH}", lambda: _batch(engine, client, canary))
    return done


def _prompt(canary: Canary, words: int, number: int) -> Prompt:
    """Return a prompt that shares no prefix with one of another number."""
    if isinstance(canary.asked[0], list):
        return [20 + number, *[10, 11, 12, 13] * (words // 4)]
    return f"{number} is a number, and " + "one two three four " * (words // 4)


def _ask(engine: Engine, client: Client, canary: Canary, prompt: Prompt, tokens: int) -> None:
    if isinstance(canary.asked[0], list) and isinstance(prompt, str):
        prompt = _prompt(canary, 4, 0)
    if canary.kind == GENERATE:
        engine.generate(client, prompt, tokens, PATIENCE_S)
    else:
        engine.numbers(client, canary.kind, prompt, PATIENCE_S)


def _batch(engine: Engine, client: Client, canary: Canary) -> None:
    """Send BATCH requests at the same time. Raises EngineFailed if one gets no answer, or all are refused."""

    def one(number: int) -> None:
        _ask(engine, client, canary, _prompt(canary, 12, number + 1), BATCH_TOKENS)

    pool = ThreadPoolExecutor(BATCH, thread_name_prefix="batch")
    asked: list[Future[None]] = []
    try:
        with contextlib.suppress(RuntimeError):  # this host has no more threads: a smaller batch
            for number in range(BATCH):
                asked.append(pool.submit(one, number))
        refused = [error for future in asked if (error := future.exception())]
    finally:
        # After a signal nobody waits for the answers: they end with the engine.
        pool.shutdown(wait=False, cancel_futures=True)
    for error in refused:
        if not isinstance(error, EngineFailed) or not error.status:
            raise error
    if refused and len(refused) == len(asked):
        raise refused[0]


def _chat_with_tools(client: Client) -> None:
    body = {"messages": [{"role": "user", "content": "How is the weather in Oslo?"}], "tools": [TOOL]}
    client.ok("POST", "/v1/chat/completions", body | {"model": _models(client)[0], "max_tokens": TOKENS}, PATIENCE_S)


def _complete(client: Client, model: str) -> None:
    client.ok("POST", "/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 2}, PATIENCE_S)


def _models(client: Client) -> list[str]:
    found = client.json("GET", "/v1/models", timeout_s=PATIENCE_S)
    try:
        return [str(model["id"]) for model in found["data"]]
    except (LookupError, TypeError) as error:
        raise EngineFailed("engine-garbled", "the engine's list of models is not one; see the engine's log") from error


def _adapters(client: Client) -> list[str]:
    return _models(client)[1 : 1 + ADAPTERS]
