"""What every engine's launcher does: read its command line, start it, know when it is ready, make it small, wake it.

One module an engine (launchers/vllm.py, launchers/sglang.py); `launchers.engine(name)` chooses by name. Everything here is blocking
and runs in the thread that drives one replica.
"""

from __future__ import annotations

import abc
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.compatibility.environment import OURS
from checkpoint.sandbox.sandbox import CONTROL_DIR, RUN_DIR, TMP_DIR
from checkpoint.snapshot.manifest import Canary
from launchers.client import Client
from launchers.errors import BadModel, EngineDied, EngineFailed, Usage

log = logging.getLogger("quickthaw")
INNER_PORT = 8000
"""The engine's port inside its sandbox: the same for every replica, since each has a network of its own."""
ENGINE_SITE = f"{RUN_DIR}/engine"
CANARY_PROMPT = "Once upon"
"""Few tokens, since whoever waits for a replica waits for their prefill too, which on a CPU takes as long as they are many; and a certain
answer, which another batch or processor does not round into another."""
CANARY_TOKENS, CANARY_TOKENS_ON_GPU = 1, 2
"""How many of a canary's tokens are generated, beside the choices that its prompt's prefill makes. On a CPU one, so that the check of a
restored replica is one step of its engine; a second comes out of a decode step, which on a GPU is a captured graph that must be tried."""
JOINED = "quickthaw-joined-"
"""How the identifier of a canary begins that has a request beside it: our hooks (plugin/engine/joining.py) wait for that a moment, so that
both are one step."""
RELOAD_LIMIT_S = 600.0
"""For moving or reading all of a model's weights."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")


def without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are the engine's: all but quickthaw's own."""
    return {name: value for name, value in environment.items() if not name.startswith(OURS)}


@dataclass(frozen=True)
class EngineCommand:
    """An engine's command line, taken apart: what the proxy takes over, and what passes through untouched."""

    engine: str
    arguments: tuple[str, ...]
    """The user's own arguments without host and port, and what the launcher adds to every start (SGLang's `--sleep-on-idle`)."""
    model: str
    host: str
    port: int
    api_key: str | None = None
    fixed_seed: bool = False
    admin_key: str | None = None
    """The key that the engine asks for on what controls it, where that is another (SGLang's `--admin-api-key`)."""
    root_path: str = ""
    """The prefix that the engine takes off a path before it matches it."""


@dataclass
class Probe:
    """How a start is watched: whether the engine still lives, and how long it may take."""

    died: Callable[[], int | None]
    """The engine's exit code, or None while it runs."""
    last_lines: Callable[[], str]
    limit_s: float
    began: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """Raises EngineDied or EngineFailed when there is nothing left to wait for."""
        code = self.died()
        if code is not None:
            how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
            raise EngineDied("engine-died", f"the engine {how} before it served", code, self.last_lines())
        if time.monotonic() - self.began > self.limit_s:
            raise EngineFailed(
                "engine-start-timeout",
                f"the engine did not serve within {self.limit_s:.0f} s; raise --start-timeout, or see its log",
            )


class Engine(abc.ABC):
    """One inference engine. Stateless: everything particular to a launch is passed in."""

    name: str
    default_port: int
    default_host: str
    model_flags: tuple[str, ...]
    switches: frozenset[str] = frozenset()
    """Flags that take no value, where a positional model may follow them."""
    denied_paths: frozenset[str]
    """What we control the engine with: never reachable through the proxy."""
    seed_flags: tuple[str, ...] = ()
    root_path_flags: tuple[str, ...] = ()
    # Command line

    def parse(self, arguments: Sequence[str], environment: Mapping[str, str], spin: bool = False) -> EngineCommand:
        """Take the model, host, port and key out of the engine's own arguments. Raises Usage where there is no model.

        `spin`: an idle engine may poll without a pause, where that is its own way (SGLang); else it is told to sleep.
        """
        words = list(arguments)
        if words and words[0] == "serve":
            words = words[1:]
        kept: list[str] = []
        values: dict[str, str] = {}
        takes = dict.fromkeys(self.model_flags, "model") | {
            "--host": "host",
            "--port": "port",
            "--api-key": "api_key",
            "--admin-api-key": "admin_key",
        }
        takes |= dict.fromkeys(self.seed_flags, "seed")
        takes |= dict.fromkeys(self.root_path_flags, "root_path")
        index = 0
        if words and not words[0].startswith("-"):
            values["model"] = words[0]
            kept += [self.model_flags[0], words[0]]
            index = 1
        while index < len(words):
            flag, equals, inline = words[index].partition("=")
            name = takes.get(flag.replace("_", "-") if flag.startswith("--") else flag)
            if name is None:
                kept.append(words[index])
                index += 1
                continue
            if equals:
                value, used = inline, 1
            elif index + 1 < len(words):
                value, used = words[index + 1], 2
            else:
                raise Usage("argument-without-value", f"{flag} needs a value")
            values[name] = value
            if name not in ("host", "port"):
                kept += words[index : index + used]
            index += used
        if any(word.partition("=")[0] == "--config" for word in kept):
            from checkpoint.compatibility.inputs import option

            for flag, name in takes.items():
                if name in ("api_key", "admin_key", "root_path", "seed") and name not in values:
                    written = option(kept, flag.removeprefix("--"))
                    values |= {name: written.strip("[]")} if written else {}
        if "model" not in values:
            raise Usage("no-model", f"no model given; add {self.model_flags[0]} DIR to the engine's arguments")
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
        )

    def key_from(self, environment: Mapping[str, str]) -> str | None:
        """The key that clients must send, where the environment sets one."""
        return None

    @abc.abstractmethod
    def command(self, python: str, command: EngineCommand, host: str, port: int) -> list[str]:
        """The process to start."""

    def environment(
        self, user: Mapping[str, str], command: EngineCommand, *, sandboxed: bool, site: str, cache: str
    ) -> dict[str, str]:
        """The engine's environment: the user's, what reaching into it needs, and no calls home (the sandbox has no way out).

        A variable that the user has set keeps its value, except where a snapshot would not work with it (TMPDIR). quickthaw's own
        variables do not pass: they hold its keys, and what an engine is given is in its snapshots. `site` and `cache` are empty where
        the state folder cannot be written: the engine has neither then.
        """
        env = without_ours(user)
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
            env["TMPDIR"] = TMP_DIR
            env["QUICKTHAW_CONTROL_DIR"] = CONTROL_DIR
        return env

    def defaults(self) -> dict[str, str]:
        """Variables that hold unless the user has set them."""
        return {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

    def control_arguments(self) -> tuple[str, ...]:
        """Arguments that our control of the engine needs; they open nothing to anyone else."""
        return ()

    # Its life

    def wait_ready(self, client: Client, probe: Probe, on_listening: Callable[[], None]) -> None:
        """Wait until the engine generates: a bound port is not enough. `on_listening` is called when it answers at all."""
        listening = False
        while True:
            probe.check()
            try:
                status, _ = client.call("GET", "/health", timeout_s=5.0)
            except OSError:
                status = 0
            if status and not listening:
                listening = True
                on_listening()
            if status == 200:
                break
            time.sleep(0.1)
        while True:
            try:
                self.generate(client, CANARY_PROMPT, 1, timeout_s=120.0)
                return
            except EngineFailed:
                probe.check()
                time.sleep(0.2)

    @abc.abstractmethod
    def generate(self, client: Client, prompt: str, tokens: int, timeout_s: float = 60.0) -> list[int]:
        """The token ids of a greedy generation."""

    @abc.abstractmethod
    def choices(self, client: Client, prompt: str, tokens: int, joined: bool = False) -> list[int]:
        """The ids of the tokens that the model would put after each token of the prompt but the last, then of the `tokens` that it
        generates, all greedy: as many facts about the weights as a generation of that length, in fewer steps.

        `joined`: another request is about to come, and both may be prefilled in one step. Raises EngineFailed, `engine-refused` where
        the engine was told to give no probabilities.
        """

    @abc.abstractmethod
    def warm_up(self, client: Client, command: EngineCommand) -> None:
        """Send what users send, so that the first of them meets code that has run before."""

    @abc.abstractmethod
    def shrink(self, client: Client) -> None:
        """Empty the KV cache and give its pages back; our hooks leave the bytes as `<pid>.kv` (launchers/control.py).

        The engine must be idle; EngineFailed with code `shrink-busy` where it is not.
        """

    def name_weights(self, client: Client) -> None:  # noqa: B027 - nothing to do where a canary does it
        """Where nothing is shrunk: let our hooks say where the weights lie, unless the canary has done so (launchers/control.py)."""

    @abc.abstractmethod
    def reload_weights(self, client: Client, model: str) -> None:
        """Put the weights back in place from the model directory (after a thin restore)."""

    # On a GPU. What is put away here need not pass through the images; the rest goes into host memory by the driver's own checkpoint.

    def gpu_arguments(self, command: EngineCommand, packages: Mapping[str, str]) -> tuple[str, ...]:
        """Arguments that `put_away` needs and the user has not given; none where what they need is not installed (`packages`)."""
        return ()

    def put_away(self, client: Client, command: EngineCommand, thin: bool) -> bool:
        """Release the KV cache, and with `thin` the weights, from the GPU; False where it was not started so that it can, or refuses.

        The engine generates nothing until `take_up`. Raises OSError where it does not answer.
        """
        return False

    def released(self, client: Client, path: str, body: object = None) -> bool:
        """Ask for a release; whether it was granted. What was not is carried by the driver."""
        status, data = client.call("POST", path, body, timeout_s=RELOAD_LIMIT_S)
        if status != 200:
            words = " ".join(data.decode(errors="replace").split())[:200]
            log.info("%s answered %d to %s (%s); the driver carries its GPU memory", self.name, status, path, words)
        return status == 200

    def take_up(self, client: Client, model: str, thin: bool) -> None:
        """Undo `put_away`, also in a restored engine: weights allocated and read again from `model`, then the KV cache."""
        raise EngineFailed("wake-unknown", f"{self.name} has nothing to be woken from; take the snapshot anew")

    def record(self, client: Client, gpu: bool) -> Canary:
        """What a restored replica must answer exactly."""
        tokens = CANARY_TOKENS_ON_GPU if gpu else CANARY_TOKENS
        try:
            return Canary(CANARY_PROMPT, self.choices(client, CANARY_PROMPT, tokens), tokens)
        except EngineFailed as error:
            log.info("the canary is a plain generation: %s", error)
            return Canary(CANARY_PROMPT, self.generate(client, CANARY_PROMPT, CANARY_TOKENS_ON_GPU))

    def answer(self, client: Client, canary: Canary, joined: bool = False) -> list[int]:
        """What the engine answers to a canary now; `joined` as in `choices`."""
        if canary.generated:
            return self.choices(client, canary.prompt, canary.generated, joined)
        return self.generate(client, canary.prompt, len(canary.token_ids))


def canary_id(joined: bool) -> str:
    """An identifier for a canary, as engines show it in their logs."""
    return f"{JOINED if joined else 'quickthaw-canary-'}{os.urandom(6).hex()}"


def has_flag(command: EngineCommand, *flags: str) -> bool:
    """Whether the user gave one of these flags (with `-` or `_`, with or without a value)."""
    given = {word.partition("=")[0].replace("_", "-") for word in command.arguments if word.startswith("--")}
    return not given.isdisjoint(flags)


def check_model(model: Path) -> None:
    """Raises BadModel where a directory cannot be served: each with what is missing and what to do."""
    if not model.exists():
        raise BadModel(
            "model-missing", f"there is no model directory {model}; give the path of one with config.json and weights"
        )
    if not model.is_dir():
        raise BadModel("model-not-a-directory", f"{model} is a file; give the directory that holds it")
    names = [entry.name for entry in os.scandir(model)]
    if "config.json" not in names and "params.json" not in names and not any(name.endswith(".gguf") for name in names):
        raise BadModel("model-without-config", f"{model} has no config.json; is it the right directory?")
    if not any(name.endswith(WEIGHT_SUFFIXES) for name in names):
        raise BadModel(
            "model-without-weights",
            f"{model} holds no weights ({', '.join(WEIGHT_SUFFIXES[:3])} …); was the download completed?",
        )
