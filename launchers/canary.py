"""What an engine is asked to show that it works, by what it can do: before a dump, and after each restore.

An engine that generates repeats greedy tokens exactly. One that does not gives numbers (an embedding, logits, scores), which
are compared to within their own noise. They are asked of two prompts, so that an engine that answers the same to everything,
as with empty weights, is noticed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import msgspec

from checkpoint.snapshot.manifest import GENERATE, Canary, Prompt, distance
from launchers.errors import EngineFailed

CANARY_PROMPT = "Once upon"
"""Prompt of the canary.

Short, because a replica's readiness waits for its prefill, whose time on a CPU grows with its length; and with an answer so
likely that another batch or processor does not round it to another token.
"""
SECOND_PROMPT = "The capital of France is"
CANARY_IDS, SECOND_IDS = [10, 11, 12], [13, 14, 15, 16]
"""The same in tokens that every vocabulary has, for an engine without a tokenizer."""
CANARY_TOKENS, CANARY_TOKENS_ON_GPU = 1, 8
"""Number of canary tokens generated, besides the choices that the prompt's prefill yields.

One on a CPU, so that the check of a restored replica is one engine step. On a GPU each further token is a decode step,
the replay of a captured graph: the first one may be right by chance, or by what the prefill left in its buffers; a later
one reads what earlier replays wrote to the KV cache.
"""
PLAIN_TOKENS = 2
"""The same of a plain generation on a CPU, by an engine that tells no choices."""
JOINED = "quickthaw-joined-"
"""Prefix of the id of a canary sent together with a request: our hooks (plugin/engine/joining.py) wait briefly for that
request, so that one engine step serves both.
"""
EMBED, CLASSIFY, SCORE, POOL = "embed", "classify", "score", "pool"
"""Kinds of canary beside GENERATE."""
GENERATION = Canary(CANARY_PROMPT, [])
TIMES = 3
"""How often numbers are asked for, to know their noise."""
LEAST_TOLERANCE, NOISE_MARGIN = 0.1, 4
"""Tolerance of numbers: at least this, and this many times the noise that was measured.

SGLang on a CPU without AMX was seen to give 0.03 in bfloat16 for a prompt that had run beside another.
"""
MOST_NUMBERS = 512
"""Numbers that are kept of one answer."""
PASSING = (408, 425, 429, 502, 503, 504)
"""HTTP statuses that say nothing about the next answer."""


def canary_id(joined: bool) -> str:
    """Return a new request id for a canary, as engines show it in their logs."""
    return f"{JOINED if joined else 'quickthaw-canary-'}{os.urandom(6).hex()}"


def of_kind(kind: str) -> tuple[Canary, ...]:
    """Return the canaries of a kind, without answers: in text, then in token ids."""
    if kind == GENERATE:
        return GENERATION, Canary("", [], prompts=[CANARY_IDS])
    return tuple(
        Canary("", [], kind=kind, prompts=[*prompts])
        for prompts in ((CANARY_PROMPT, SECOND_PROMPT), (CANARY_IDS, SECOND_IDS))
    )


def refuses(error: EngineFailed, patient: bool) -> bool:
    """Return whether an engine that is healthy will go on to refuse such a request.

    `patient`: what may pass (an internal error, an answer that is not understood) does not count yet.
    """
    if error.code in ("engine-unreachable", "engine-stalled") or error.status in PASSING:
        return False
    lasting = 400 <= error.status < 500 or error.status == 501 or error.code.startswith("engine-no-")
    return lasting or not patient


def numbers(found: object) -> list[float]:
    """Return the first MOST_NUMBERS numbers in nested lists. Raises EngineFailed (engine-no-numbers) if there are none."""
    flat: list[float] = []

    def add(value: object) -> None:
        if isinstance(value, list):
            for one in value:
                if len(flat) < MOST_NUMBERS:
                    add(one)
        elif isinstance(value, int | float):
            flat.append(float(value))

    add(found)
    if not flat:
        raise EngineFailed("engine-no-numbers", "the engine answered without the numbers that it was asked for")
    return flat


def record(canary: Canary, ask: Callable[[Prompt], list[float]]) -> Canary:
    """Return the canary with the engine's numbers, and the tolerance that their noise asks for.

    Raises EngineFailed (no-canary) if they would show nothing: they vary too much, or are the same for every prompt.
    """
    rounds = [[ask(prompt) for prompt in canary.prompts] for _ in range(TIMES)]
    values = rounds[0]
    noise = [distance(again, values) for again in rounds[1:]]
    tolerance = max(LEAST_TOLERANCE, NOISE_MARGIN * max(noise))
    apart = distance(values[:1], values[1:])
    if any(map(math.isnan, noise)) or not apart > 2 * tolerance:
        raise EngineFailed(
            "no-canary",
            f"the engine's answers to {canary.kind} do not tell one prompt from another "
            f"({apart:.2g} apart, {max(noise):.2g} noise), so they would not show a damaged restore",
        )
    return msgspec.structs.replace(canary, values=values, tolerance=tolerance)
