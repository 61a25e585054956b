"""Run the user's commands of `--watch`: one applies a plan's delta, one reports the held instances.

Both run in a shell in their own process group, which is killed on timeout, so that a timed-out command starts no further
instances.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capacity.errors import CapacityError

APPLY_LIMIT_S = 600.0
OBSERVE_LIMIT_S = 60.0
TERM_LIMIT_S = 5.0
"""Seconds that an interrupted command has to exit after SIGTERM."""
POLL_S = 0.2
MOST_INSTANCES = 10_000_000


@dataclass(frozen=True)
class Applied:
    """Result of an apply command, in instances per pool.

    `held`: instances that the command reports as held now. `error`: why it did not do everything.
    """

    granted: dict[str, int]
    stopped: dict[str, int]
    held: dict[str, int]
    error: CapacityError | None = None


def apply(
    starts: Mapping[str, int],
    stops: Mapping[str, int],
    command: str,
    limit: float = APPLY_LIMIT_S,
    stop: threading.Event | None = None,
) -> Applied:
    """Run `command` with the delta as JSON on its standard input, starts first.

    The command may print JSON lines, each `{"granted": {pool: started}, "stopped": {pool: stopped}, "held": {pool: held
    now}}`, with any of the three keys. A later line replaces an earlier one, so a command that prints progress and then
    fails is not asked for the same again. A command that succeeds without output did everything; one that fails did what it
    printed.
    """
    delta = [{"action": "start", "pool": pool, "count": n} for pool, n in starts.items()]
    delta += [{"action": "stop", "pool": pool, "count": n} for pool, n in stops.items()]
    code, out, last = _run(command, json.dumps({"delta": delta}), limit, stop)
    failure = _failure("apply", code, last, limit, stop)
    said, problem = _answers(out)
    problems = [problem] if problem else []
    counts: dict[str, dict[str, int]] = {}
    for word, asked in (("granted", starts), ("stopped", stops)):
        if word not in said:
            # Stops need no answer of their own if the command answered at all and succeeded.
            counts[word] = dict(asked) if failure is None and not problem and (word == "stopped" or not said) else {}
            continue
        counts[word], wrong = _within(word, said[word], asked, complete=failure is None)
        problems += wrong
    held, wrong = _held(said.get("held", {}))
    problems += wrong
    if failure is None and problems:
        failure = CapacityError(
            "apply-answer", f"the apply command must print the granted instances as JSON: {problems[0]}"
        )
    return Applied(counts["granted"], counts["stopped"], held, failure)


def observe(command: str, limit: float = OBSERVE_LIMIT_S, stop: threading.Event | None = None) -> dict[str, int]:
    """Run `command` and return the held instances that it prints as `{"held": {pool: instances}}`.

    Raises CapacityError if it fails, times out or prints anything else.
    """
    code, out, last = _run(command, "", limit, stop)
    failure = _failure("observe", code, last, limit, stop)
    if failure is not None:
        raise failure
    said, problem = _answers(out)
    held, wrong = _held(said.get("held"))
    if problem or wrong:
        raise CapacityError(
            "observe-answer", f"the observe command must print the held instances as JSON: {problem or wrong[0]}"
        )
    return held


def _run(command: str, text: str, limit: float, stop: threading.Event | None) -> tuple[int | None, str, str]:
    """Run a command in a process group of its own, and wait until it and all that hold its output have ended.

    Returns its exit code (None: interrupted by the limit or by `stop`), its standard output, and the last line of its standard
    error. Raises CapacityError (no-process) if it cannot be started.
    """
    try:
        process = subprocess.Popen(
            command,
            shell=True,  # the user's own command, as in a shell
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except (OSError, ValueError) as bad:
        raise CapacityError("no-process", f"{command[:80]!r} cannot be started: {bad}") from bad
    try:
        out, err = _communicate(process, text, limit, stop)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        code = None
        _signal(process.pid, signal.SIGTERM)
        try:
            out, err = process.communicate(timeout=TERM_LIMIT_S)
        except subprocess.TimeoutExpired:
            _signal(process.pid, signal.SIGKILL)
            out, err = _drain(process)
    except BaseException:
        _signal(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return code, out, (err.strip().splitlines() or [""])[-1]


def _communicate(
    process: subprocess.Popen[str], text: str, limit: float, stop: threading.Event | None
) -> tuple[str, str]:
    """Call `communicate`; also raise TimeoutExpired soon after `stop` is set."""
    deadline, given = time.monotonic() + limit, text or None
    while True:
        try:
            return process.communicate(given, timeout=max(0.0, min(POLL_S, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            given = None  # the first call has already accepted the input
            if time.monotonic() >= deadline or (stop is not None and stop.is_set()):
                raise


def _drain(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Read what a killed command has written, without waiting for a descendant that left its process group."""
    try:
        return process.communicate(timeout=TERM_LIMIT_S)
    except subprocess.TimeoutExpired as held_open:
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        out, err = ((text or b"").decode(errors="replace") for text in (held_open.output, held_open.stderr))
        return out, err


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _failure(
    which: str, code: int | None, last: str, limit: float, stop: threading.Event | None
) -> CapacityError | None:
    if code is None:
        if stop is not None and stop.is_set():
            return CapacityError(f"{which}-interrupted", f"the {which} command was ended because the plan is stopping")
        return CapacityError(f"{which}-timeout", f"the {which} command took over {limit:g} s and was ended")
    if code:
        return CapacityError(f"{which}-failed", f"the {which} command exited with {code}: {last}")
    return None


def _answers(out: str) -> tuple[dict[str, Any], str]:
    """Merge the keys of all JSON lines, later lines first; also return the error of a malformed line, if any.

    A single JSON document over several lines is accepted too.
    """
    said: dict[str, Any] = {}
    try:
        documents = [json.loads(out)] if out.strip() else []
    except RecursionError:
        return said, "nested too deeply"
    except ValueError:
        documents = []
        for line in filter(None, map(str.strip, out.splitlines())):
            try:
                documents.append(json.loads(line))
            except ValueError:
                return said, f"not JSON: {line[:80]!r}"
            if isinstance(documents[-1], dict):
                said |= documents[-1]
    for document in documents:
        if not isinstance(document, dict) or not document.keys() & {"granted", "stopped", "held"}:
            return said, f"expected granted, stopped or held, found {json.dumps(document)[:80]}"
        said |= document
    return said, ""


def _within(word: str, said: object, asked: Mapping[str, int], *, complete: bool) -> tuple[dict[str, int], list[str]]:
    """Return the counts of known pools, capped at the requested counts, and all errors.

    `complete`: each requested pool must be named.
    """
    if not isinstance(said, dict):
        return {}, [f"{word} is not a mapping of pools to counts"]
    counts: dict[str, int] = {}
    wrong: list[str] = []
    for pool, count in said.items():
        if pool not in asked:
            wrong.append(f"{word} names {pool!r}, which was not requested")
        elif type(count) is not int or count < 0:
            wrong.append(f"{word} of {pool} is {count!r}, not a count")
        else:
            counts[pool] = min(count, asked[pool])
            if count > asked[pool]:
                wrong.append(f"{word} of {pool} is {count} of {asked[pool]} asked")
    if complete:
        wrong += [f"{word} omits {pool}, of which {asked[pool]} were requested" for pool in asked if pool not in said]
    return counts, wrong


def _held(said: object) -> tuple[dict[str, int], list[str]]:
    if not isinstance(said, dict):
        return {}, ["held is not a mapping of pools to counts"]
    wrong = [
        f"held of {pool} is {n!r}, not a count"
        for pool, n in said.items()
        if type(n) is not int or not 0 <= n <= MOST_INSTANCES
    ]
    return ({} if wrong else dict(said)), wrong
