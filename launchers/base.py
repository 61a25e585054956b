"""Base class of all engine launchers: parse the command line, start, wait until ready, trim, offload and reload.

One module per engine (launchers/vllm.py, launchers/sglang.py); `launchers.engine(name)` selects one. All calls block and
run in the thread that drives one replica.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec

from checkpoint.compatibility.environment import OURS
from checkpoint.sandbox.sandbox import CONTROL_DIR, RUN_DIR, TMP_DIR
from checkpoint.snapshot.manifest import GENERATE, Answer, Canary, Prompt
from launchers import canary as canaries
from launchers.canary import CANARY_TOKENS, CANARY_TOKENS_ON_GPU, PLAIN_TOKENS
from launchers.client import Client
from launchers.errors import EngineFailed, Usage
from launchers.given_options import first, given_options, is_option
from launchers.options.as_given import why_as_given
from launchers.options.front import BLANKED, SSL_FILES, TAKEN_OVER
from launchers.options.known import KnownOptions
from launchers.options.reload import quantized
from launchers.readiness import PATIENCE_S, Probe, healthy, wait_until

if TYPE_CHECKING:
    from checkpoint.compatibility.engine import EngineFacts
    from launchers.options.tls import Tls

log = logging.getLogger("quickthaw")
INNER_PORT = 8000
"""The engine's port inside its sandbox: the same for every replica, since each has its own network."""
ENGINE_SITE = f"{RUN_DIR}/engine"
RELOAD_LIMIT_S = 600.0
"""Time limit for moving or reading all of a model's weights."""


def without_own_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the engine's variables: all except quickthaw's own."""
    return {name: value for name, value in environment.items() if not name.startswith(OURS)}


@dataclass(frozen=True)
class EngineCommand:
    """A parsed engine command line: the values that the proxy takes over, and the arguments passed through unchanged."""

    engine: str
    arguments: tuple[str, ...]
    """The user's arguments without host and port, plus what the launcher adds to every start (SGLang's `--sleep-on-idle`)."""
    model: str
    host: str
    port: int
    api_key: str | None = None
    fixed_seed: bool = False
    admin_key: str | None = None
    """The key that the engine requires for its control endpoints, if different (SGLang's `--admin-api-key`)."""
    root_path: str = ""
    """The prefix that the engine removes from a path before matching it."""
    shutdown_timeout_s: float = 0.0
    """How long the engine finishes its requests after SIGTERM (vLLM's `--shutdown-timeout`)."""
    uds: str = ""
    """Path of the UNIX socket to listen on, in place of host and port (vLLM's `--uds`)."""
    tls: Tls | None = None


class Engine(abc.ABC):
    """One inference engine. Stateless: all data of a launch is passed in."""

    name: str
    default_port: int
    default_host: str
    model_flags: tuple[str, ...]
    offload_flag: str
    """The flag that `offload` needs."""
    options: KnownOptions
    """The options of the tested release."""
    model_after_options: bool = False
    """Whether a positional model may follow options; otherwise it comes first."""
    denied_paths: frozenset[str]
    """Control endpoints, which the proxy never forwards to."""
    seed_flags: tuple[str, ...] = ()
    root_path_flags: tuple[str, ...] = ()
    front_flags: Mapping[str, str] = MappingProxyType({})
    """Options by which it listens, beside host and port (launchers/options/front.py), with the names of their values."""

    # Command line

    def why_as_given(self, arguments: Sequence[str], environment: Mapping[str, str], python: str = "") -> str:
        """Return why a command line of this engine runs as given, in a few words, or "" (launchers/options/as_given.py)."""
        words = self.options.expanded(arguments, python)
        return why_as_given(self.name, given_options(words[: (*words, "--").index("--")]), environment)

    def parse(
        self, arguments: Sequence[str], environment: Mapping[str, str], spin: bool = False, python: str = ""
    ) -> EngineCommand:
        """Parse the engine's own arguments: model, host, port, UNIX socket, TLS, keys, seed, root path.

        `spin`: keep SGLang's busy polling when idle; otherwise --sleep-on-idle is added. `python`: the engine's interpreter,
        whose installation has a say in what an abbreviated option means. Raises Usage (no-model, bad-port,
        argument-without-value).
        """
        words = list(arguments)
        if words and words[0] == "serve":
            words = words[1:]
        words = self.options.expanded(words, python)
        kept: list[str] = []
        values: dict[str, str] = {}
        takes = dict.fromkeys(self.model_flags, "model") | {
            "--host": "host",
            "--port": "port",
            "--api-key": "api_key",
            "--admin-api-key": "admin_key",
            "--shutdown-timeout": "shutdown_timeout",
        }
        takes |= dict.fromkeys(self.seed_flags, "seed")
        takes |= dict.fromkeys(self.root_path_flags, "root_path") | dict(self.front_flags)
        positional: list[str] = []
        index = 0
        while index < len(words):
            if words[index] == "--":
                positional += words[index + 1 :]
                break
            if not is_option(words[index]):
                if not index or self.model_after_options:
                    positional.append(words[index])
                else:
                    kept.append(words[index])
                index += 1
                continue
            flag, equals, inline = words[index].partition("=")
            flag = flag.replace("_", "-") if flag.startswith("--") else flag
            name = takes.get(flag)
            used = 1 if equals else 1 + self._values_of(flag, words[index + 1 :], 1 if name else 0)
            if name and self.options.count(flag) == 0:
                values[name] = "" if flag.startswith("--no-") else flag
            elif name:
                if used == 1 and not equals:
                    raise Usage("argument-without-value", f"{flag} needs a value")
                values[name] = inline if equals else first(words[index + 1 : index + used])
            if name == "model":  # SGLang's two names of this option mean the same
                kept += [self.model_flags[0], values[name]]
            elif name not in TAKEN_OVER:
                kept += words[index : index + used]
            index += used
        if positional:
            values.setdefault("model", positional[0])
            kept = [self.model_flags[0], *positional, *kept]
        if any(word.partition("=")[0] == "--config" for word in kept):
            written = given_options(kept)
            for flag, name in takes.items():
                found = written.get(flag.removeprefix("--"))
                if found is None or name in values:
                    continue
                if value := first(found) or flag * (self.options.count(flag) == 0):
                    values[name] = value
                    kept += [f"{flag}="] * (name in BLANKED)
        if "model" not in values and (default := self.default_model(python)):
            values["model"] = default
            kept = [self.model_flags[0], default, *kept]
        if "model" not in values:
            raise Usage("no-model", f"no model given; add {self.model_flags[0]} MODEL to the engine's arguments")
        try:
            port = int(values.get("port", self.default_port))
            if not 0 <= port < 65536:
                raise ValueError
        except ValueError:
            raise Usage("bad-port", f"--port must be a number from 0 to 65535, not {values['port']!r}") from None
        return EngineCommand(
            self.name,
            tuple(kept),
            values["model"],
            values.get("host", self.default_host),
            port,
            values.get("api_key") or self.key_from(environment),
            "seed" in values,
            values.get("admin_key"),
            values.get("root_path", ""),
            shutdown_timeout(values.get("shutdown_timeout", "")),
            values.get("uds", ""),
            _tls(values),
        )

    def _values_of(self, option: str, following: Sequence[str], least: int) -> int:
        """Return how many of the `following` words are values of an option, of which it takes at least `least`."""
        count = self.options.count(option)
        if count is not None:
            return min(count, len(following))
        ends = (at for at, word in enumerate(following) if at >= least and is_option(word))
        return next(ends, len(following))

    def default_model(self, python: str) -> str | None:
        """Return the model that the engine installed for this interpreter serves when none is named, if there is one."""
        return None

    def key_from(self, environment: Mapping[str, str]) -> str | None:
        """Return the API key that clients must send if the environment sets one, else None."""
        return None

    @abc.abstractmethod
    def command(self, python: str, command: EngineCommand, host: str, port: int) -> list[str]:
        """Return the command line of the engine process."""

    def environment(
        self, user: Mapping[str, str], command: EngineCommand, *, sandboxed: bool, site: str, cache: str
    ) -> dict[str, str]:
        """Return the engine's environment: the user's variables plus the variables that our hooks need.

        Telemetry is disabled. A variable set by the user keeps its value, unless a sandbox would not work with it: it has
        no outside network, so hub models come from the cache, and it has its own folders for temporary files and metrics.
        quickthaw's own variables are not passed on: they hold its keys, and a snapshot contains the engine's environment.
        `site` and `cache` are empty if the state folder cannot be written; the engine then runs without them.
        """
        env = without_own_variables(user)
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        for name, value in self.defaults().items():
            env.setdefault(name, value)
        if site:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [site, user.get("PYTHONPATH", "")]))
        env["PYTHONUNBUFFERED"] = "1"
        if command.fixed_seed:
            env["QUICKTHAW_FIXED_SEED"] = "1"
        if cache:
            env.setdefault("VLLM_CACHE_ROOT", f"{cache}/vllm")
            env.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{cache}/inductor")
            env.setdefault("TRITON_CACHE_DIR", f"{cache}/triton")
            env.setdefault("FLASHINFER_WORKSPACE_BASE", f"{cache}/flashinfer")
        if sandboxed:
            env |= {"TMPDIR": TMP_DIR, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
            env["QUICKTHAW_CONTROL_DIR"] = CONTROL_DIR
            if "PROMETHEUS_MULTIPROC_DIR" in env:  # its files are mapped for writing, which no dump takes from the host
                env["PROMETHEUS_MULTIPROC_DIR"] = TMP_DIR
        return env

    def defaults(self) -> dict[str, str]:
        """Return the default variables, which the user's variables override."""
        return {"DO_NOT_TRACK": "1"}

    def control_arguments(self) -> tuple[str, ...]:
        """Return the arguments that our control of the engine needs; they give no other client access."""
        return ()

    def hub_arguments(self, command: EngineCommand, user: Mapping[str, str]) -> tuple[str, ...]:
        """Return the arguments with which a sandboxed engine serves a hub model as it does with the `user`'s environment."""
        return ()

    # Start, generation, trim, reload

    def wait_ready(self, client: Client, probe: Probe) -> Canary | None:
        """Wait until the engine answers a canary; return that, without its answer. A bound port is not enough.

        Returns None if the engine is healthy and refuses every canary that we know: it is as ready as it says.
        Raises EngineDied or EngineFailed.
        """
        for ready in self.ready_signs():
            wait_until(partial(ready, client), probe)
            if canary := self._wait_for_canary(client, probe):
                return canary
        return None

    def ready_signs(self) -> tuple[Callable[[Client], bool], ...]:
        """Return the signs, in the order of their appearance, from each of which on the engine may answer a canary.

        The last one is its own health, which decides where it refuses every canary.
        """
        return (healthy,)

    def wait_healthy(self, client: Client, probe: Probe) -> None:
        """Wait until the engine calls itself healthy, its own warm-up included. Raises EngineDied or EngineFailed."""
        wait_until(lambda: healthy(client), probe)

    def _wait_for_canary(self, client: Client, probe: Probe) -> Canary | None:
        began = time.monotonic()
        while True:
            try:
                return self.find_canary(client, patient=time.monotonic() - began < PATIENCE_S)
            except EngineFailed:
                probe.check()
                time.sleep(0.2)

    def find_canary(self, client: Client, patient: bool = False) -> Canary | None:
        """Return the first canary that the engine answers, without its answer, or None if it refuses all of them.

        `patient`: as in `launchers.canary.refuses`. Raises EngineFailed if the engine may answer later.
        """
        for kind in self.kinds(client):
            for canary in canaries.of_kind(kind):
                try:
                    self.try_canary(client, canary)
                except EngineFailed as error:
                    if not canaries.refuses(error, patient):
                        raise
                    log.debug("%s is no canary of this engine: %s", canary, error)
                else:
                    return canary
        return None

    def try_canary(self, client: Client, canary: Canary, timeout_s: float = 120.0) -> None:
        """Ask for the first of a canary's answers, whatever it is. Raises EngineFailed if there is none."""
        if canary.kind == GENERATE:
            self.generate(client, canary.asked[0], 1, timeout_s)
        else:
            self.numbers(client, canary.kind, canary.asked[0], timeout_s)

    @abc.abstractmethod
    def kinds(self, client: Client) -> tuple[str, ...]:
        """Return the kinds of canary that may be tried with this engine, the best first. Raises EngineFailed."""

    @abc.abstractmethod
    def generate(self, client: Client, prompt: Prompt, tokens: int, timeout_s: float = 60.0) -> list[int]:
        """Return the token ids of a greedy generation."""

    @abc.abstractmethod
    def numbers(self, client: Client, kind: str, prompt: Prompt, timeout_s: float = 60.0) -> list[float]:
        """Return the numbers (an embedding, logits, scores) that the engine computes of a prompt. Raises EngineFailed."""

    @abc.abstractmethod
    def greedy_tokens(self, client: Client, prompt: Prompt, tokens: int, joined: bool = False) -> list[int]:
        """Return the greedy next-token id after each prompt token but the last, then the ids of `tokens` generated tokens.

        This checks as many facts about the weights as a generation of that length, in fewer steps. `joined`: another
        request is about to come, and one step may prefill both. Raises EngineFailed (engine-refused) if the engine is
        configured to return no probabilities.
        """

    def warm_up(self, client: Client, canary: Canary) -> None:
        """Send typical requests of the canary's kind, so that the first user's request runs code that has run before.

        Raises EngineFailed if the engine does not answer; one that it refuses is skipped.
        """
        ids = isinstance(canary.asked[0], list)
        for words in (4, 64):
            prompt: Prompt = [10, 11, 12, 13] * (words // 4) if ids else "one two three four " * (words // 4)
            with tolerate_refusal():  # too long for some models
                if canary.kind == GENERATE:
                    self.generate(client, prompt, 4)
                else:
                    self.numbers(client, canary.kind, prompt)
        if canary.kind == GENERATE:
            self.warm_up_chats(client)

    @abc.abstractmethod
    def warm_up_chats(self, client: Client) -> None:
        """Send streamed chats, if the model has a template, and what else clients of an engine that generates send.

        Raises EngineFailed if the engine does not answer.
        """

    @abc.abstractmethod
    def trim(self, client: Client) -> None:
        """Empty the KV cache and release its pages; our hooks record the number of bytes in `<pid>.kv` (launchers/control.py).

        The engine must be idle. Raises EngineFailed (trim-busy) otherwise.
        """

    def drop_cache(self, client: Client) -> None:
        """Empty the KV cache and release its pages, for standby; nothing else need be prepared as for a snapshot.

        The engine must be idle. Raises EngineFailed (trim-busy) otherwise.
        """
        self.trim(client)

    def name_weights(self, client: Client) -> None:  # noqa: B027 - nothing to do if the canary does it
        """Have our hooks record the weights' addresses (launchers/control.py).

        Called if nothing is trimmed. A no-op for engines whose canary records them.
        """

    def unsafe_reload(self, command: EngineCommand, folder: Path | None, installed: EngineFacts) -> str:
        """Return why this engine's own reload of weights that a GPU has lost may leave some out, in one line, or "".

        `command` is the engine's whole command line, `folder` its model. Quantized layers keep what they made of the
        weights in tensors that no reload writes, at addresses that captured graphs contain.
        """
        found = quantized(command.arguments, folder)
        return f"{found}: kernels keep what they computed of quantized weights" if found else ""

    @abc.abstractmethod
    def reload_weights(self, client: Client, model: str) -> None:
        """Reload the weights from the model directory (after restoring a snapshot with excluded weights)."""

    # GPU: memory offloaded here is not in the images; the driver's own checkpoint moves the rest into host memory.

    def gpu_arguments(
        self, command: EngineCommand, installed: EngineFacts, environment: Mapping[str, str]
    ) -> tuple[str, ...]:
        """Return the arguments that `offload` needs and the user has not given.

        Returns none if the installation lacks a required package, or could not start with them in this environment.
        """
        return ()

    def offload(self, client: Client, command: EngineCommand, excluded: bool) -> bool:
        """Offload: release the KV cache from GPU memory, and the weights too if the snapshot excludes them (`excluded`).

        Return False if the engine was started without support for it, or refuses. The engine generates nothing until
        `reload`. Raises EngineFailed, or OSError if it does not answer.
        """
        return False

    def return_memory(self, client: Client) -> None:  # noqa: B027 - most engines keep none
        """Have the idle engine return host memory that it kept for GPU memory offloaded before. Raises EngineFailed."""

    def request_release(self, client: Client, path: str, body: object = None) -> bool:
        """Request a release of GPU memory; return whether the engine granted it.

        Otherwise the driver's checkpoint carries the memory.
        """
        status, data = client.call("POST", path, body, timeout_s=RELOAD_LIMIT_S)
        if status != 200:
            words = " ".join(data.decode(errors="replace").split())[:200]
            log.info("%s answered %d to %s (%s); the driver carries its GPU memory", self.name, status, path, words)
        return status == 200

    def reload(self, client: Client, model: str, excluded: bool) -> None:
        """Reload after `offload`, also in a restored engine: allocate the weights, read them from `model`, then the KV cache.

        Raises EngineFailed.
        """
        raise EngineFailed(
            "wake-unknown", f"{self.name} cannot reload what this snapshot offloaded; take the snapshot again"
        )

    def record(self, client: Client, gpu: bool, canary: Canary = canaries.GENERATION) -> Canary:
        """Return the canary with the engine's answer, which a restored replica must give.

        Raises EngineFailed, with no-canary if the answers would show nothing.
        """
        if canary.kind != GENERATE:
            return canaries.record(canary, lambda prompt: self.numbers(client, canary.kind, prompt))
        tokens, prompt = CANARY_TOKENS_ON_GPU if gpu else CANARY_TOKENS, canary.asked[0]
        try:
            return msgspec.structs.replace(
                canary, token_ids=self.greedy_tokens(client, prompt, tokens), generated=tokens
            )
        except EngineFailed as error:
            log.info("the canary is a plain generation: %s", error)
            plain = CANARY_TOKENS_ON_GPU if gpu else PLAIN_TOKENS
            return msgspec.structs.replace(canary, token_ids=self.generate(client, prompt, plain))

    def answer(self, client: Client, canary: Canary, joined: bool = False) -> Answer:
        """Return the engine's current answer to a canary; `joined` as in `choices`. Raises EngineFailed."""
        if canary.kind != GENERATE:
            first, *more = canary.asked
            found = [self.numbers(client, canary.kind, first)]
            quiet = replace(client, sent=None) if client.sent else client
            return found + [self.numbers(quiet, canary.kind, prompt) for prompt in more]
        if canary.generated:
            return self.greedy_tokens(client, canary.asked[0], canary.generated, joined)
        return self.generate(client, canary.asked[0], len(canary.token_ids))


@contextlib.contextmanager
def tolerate_refusal() -> Iterator[None]:
    """Continue after a request that the engine answers with an error, which another request need not get."""
    try:
        yield
    except EngineFailed as error:
        if not error.status:
            raise
        log.debug("not part of the warm-up: %s", error)


def _tls(values: Mapping[str, str]) -> Tls | None:
    if not SSL_FILES & values.keys():
        return None
    from launchers.options.tls import Tls  # takes 1 ms, which a launch without TLS need not wait for

    return Tls.of(values)


def shutdown_timeout(value: str) -> float:
    """Return the seconds of vLLM's `--shutdown-timeout`; 0 for what the engine itself will refuse."""
    try:
        return max(0.0, float(int(value)))
    except (ValueError, OverflowError):
        return 0.0


def expandable_segments(environment: Mapping[str, str]) -> bool:
    """Return whether PyTorch's allocator maps its memory in expandable segments, by the first variable that is set."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    settings = next((value for name in names if (value := environment.get(name))), "")
    return "expandable_segments:true" in settings.replace(" ", "").lower()


def has_flag(command: EngineCommand, *flags: str) -> bool:
    """Return whether the user gave one of these flags (with `-` or `_`, with or without a value)."""
    given = {word.partition("=")[0].replace("_", "-") for word in command.arguments if word.startswith("--")}
    return not given.isdisjoint(flags)
