"""Launcher for SGLang: `python -m sglang.launch_server`, controlled through SGLang's own endpoints.

The proxy does not forward these endpoints. Tested with sglang 0.5.23 (CPU, `--device cpu --attention-backend torch_native`,
SGLANG_USE_CPU_ENGINE=1).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.snapshot.manifest import GENERATE, Prompt
from launchers.base import RELOAD_LIMIT_S, Engine, EngineCommand, expandable_segments, has_flag, tolerate_refusal
from launchers.canary import EMBED, canary_id, numbers, refuses
from launchers.client import Client
from launchers.errors import EngineFailed
from launchers.given_options import config_words, given_options, last
from launchers.options.front import SSL
from launchers.options.known import SGLANG
from launchers.options.reload import draft_weights
from launchers.readiness import status_of

if TYPE_CHECKING:
    from checkpoint.compatibility.engine import EngineFacts

log = logging.getLogger("quickthaw")
SLEEP_ON_IDLE = "--sleep-on-idle"
WORKS_WHILE_IDLE = (
    "--config",
    "--enable-dp-attention",
    "--pp-size",
    "--pipeline-parallel-size",
    "--disaggregation-mode",
    "--enable-hierarchical-cache",
    "--enable-lmcache",
    "--enable-pdmux",
)
"""With these flags an idle scheduler still serves the work of other processes (or a config file decides, which is not read
here): a scheduler that wakes once per second would delay them.
"""

_MEMORY_SAVER = {"torch_memory_saver", "torch-memory-saver"}
_INSTALL = "pip install torch-memory-saver, beside SGLang"
_SSL = ("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-keyfile-password", "--enable-ssl-refresh")


class Sglang(Engine):
    """Launcher for SGLang's HTTP server."""

    name = "sglang"
    default_port = 30000
    default_host = "127.0.0.1"
    model_flags = ("--model-path", "--model")
    offload_flag = "--enable-memory-saver"
    options = SGLANG
    seed_flags = ("--random-seed",)
    root_path_flags = ("--fastapi-root-path",)
    front_flags = {flag: SSL[flag] for flag in _SSL}
    denied_paths = frozenset(
        {
            "/flush_cache",
            "/clear_hicache_storage_backend",
            "/update_weights_from_disk",
            "/update_weights_from_tensor",
            "/update_weights_from_distributed",
            "/update_weights_from_ipc",
            "/begin_weight_update",
            "/end_weight_update",
            "/update_weight_version",
            "/weights_checker",
            "/init_weights_send_group_for_remote_instance",
            "/send_weights_to_remote_instance",
            "/init_weights_update_group",
            "/destroy_weights_update_group",
            "/release_memory_occupation",
            "/resume_memory_occupation",
            "/pause_generation",
            "/continue_generation",
            "/set_internal_state",
            "/slow_down",
            "/pd_role_switch",
            "/freeze_gc",
            "/configure_logging",
            "/start_profile",
            "/stop_profile",
            "/hicache/storage-backend",
            "/dumper",
            "/set_trace_level",
            "/start_expert_distribution_record",
            "/stop_expert_distribution_record",
            "/dump_expert_distribution_record",
            "/scale_elastic_ep",
            "/add_external_corpus",
            "/remove_external_corpus",
            "/load_lora_adapter_from_tensors",  # pickled tensors
        }
    )

    def why_as_given(self, arguments: Sequence[str], environment: Mapping[str, str], python: str = "") -> str:
        """As for every engine. A file of options cannot be overruled where it refreshes certificates that quickthaw takes over."""
        file = last(given_options(arguments), "config")
        if file and "enable-ssl-refresh" in given_options(config_words(Path(file))):
            return f"enable-ssl-refresh stands in {file}, not on the command line"
        return super().why_as_given(arguments, environment, python)

    def parse(
        self, arguments: Sequence[str], environment: Mapping[str, str], spin: bool = False, python: str = ""
    ) -> EngineCommand:
        """Parse as for every engine; unless `spin`, add --sleep-on-idle.

        An idle scheduler then waits for its sockets. SGLang's default, busy polling, takes a whole core of the host per
        idle replica, away from replicas that restore or serve. The flag becomes part of the arguments, and so of the
        snapshot's identity.
        """
        command = super().parse(arguments, environment, spin, python)
        if spin or has_flag(command, SLEEP_ON_IDLE, *WORKS_WHILE_IDLE):
            return command
        return replace(command, arguments=(*command.arguments, SLEEP_ON_IDLE))

    def command(self, python: str, command: EngineCommand, host: str, port: int) -> list[str]:
        """Use the module form, which exists in every release."""
        return [python, "-m", "sglang.launch_server", *command.arguments, f"--host={host}", f"--port={port}"]

    def ready_signs(self) -> tuple[Callable[[Client], bool], ...]:
        """SGLang serves as soon as it listens: its scheduler has started by then.

        Its health page is a sign that comes over two seconds later: SGLang sleeps one second before its own warm-up, which
        must end before the page answers, and each answer takes one more second. Alone, it does not make clients wait for that.
        """
        return (listens, *super().ready_signs())

    def kinds(self, client: Client) -> tuple[str, ...]:
        """Ask SGLang whether its model generates: a generation by one that does not may end its scheduler."""
        for path in ("/model_info", "/get_model_info"):
            try:
                about = client.json("GET", path)
            except EngineFailed as error:
                if not refuses(error, patient=False):
                    raise
                continue
            return (EMBED,) if about.get("is_generation") is False else (GENERATE,)
        return (GENERATE,)

    def numbers(self, client: Client, kind: str, prompt: Prompt, timeout_s: float = 60.0) -> list[float]:
        """Use SGLang's native endpoint, which serves embeddings, rewards and logits alike."""
        answer = client.json("POST", "/encode", {**_input(prompt), "rid": canary_id(False)}, timeout_s)
        try:
            return numbers(answer["embedding"])
        except (LookupError, TypeError) as error:
            raise EngineFailed("engine-no-numbers", "/encode answered without an embedding") from error

    def generate(self, client: Client, prompt: Prompt, tokens: int, timeout_s: float = 60.0) -> list[int]:
        """Use SGLang's native endpoint, which reports the sampled ids."""
        sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body = {**_input(prompt), "sampling_params": sampling}
        answer = client.json("POST", "/generate", body, timeout_s)
        ids = answer.get("output_ids")
        if not ids:
            raise EngineFailed(
                "engine-no-token-ids", "this SGLang reports no output ids; quickthaw needs sglang >= 0.5"
            )
        return [int(i) for i in ids]

    def greedy_tokens(self, client: Client, prompt: Prompt, tokens: int, joined: bool = False) -> list[int]:
        """Take the most likely token at each position from the native endpoint's log probabilities."""
        body = {
            **_input(prompt),
            "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 1,
            "rid": canary_id(joined),
        }
        answer = client.json("POST", "/generate", body, 60.0)
        try:
            places = answer["meta_info"]["input_top_logprobs"]
            return [int(place[0][1]) for place in places if place] + [int(i) for i in answer["output_ids"]]
        except (LookupError, TypeError, ValueError) as error:
            raise EngineFailed(
                "engine-no-token-ids", "this SGLang reports no log probabilities for a prompt"
            ) from error

    def warm_up_chats(self, client: Client) -> None:
        """Send streamed chats, if the model has a template, and an OpenAI completion."""
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "stream": True, "temperature": 0.7}
        for _ in range(2):
            with tolerate_refusal():  # 400 without a chat template
                client.ok("POST", "/v1/chat/completions", body | {"model": "default"}, timeout_s=60.0)
        with tolerate_refusal():
            completion = {"model": "default", "prompt": "Hello", "max_tokens": 2}
            client.ok("POST", "/v1/completions", completion, timeout_s=60.0)

    def trim(self, client: Client) -> None:
        """Flush the radix cache; our hook then drops the pool's pages (plugin/engine/sglang_hooks.py).

        Raises EngineFailed (control-refused, trim-busy).
        """
        status, _ = client.admin().call("POST", "/flush_cache", timeout_s=60.0)
        if status in (401, 403):
            raise EngineFailed(
                "control-refused",
                "SGLang asks for a key on /flush_cache; give --admin-api-key or --api-key on the command line",
            )
        if status != 200:
            raise EngineFailed("trim-busy", "SGLang did not flush its cache; a request is still running")

    def reload_weights(self, client: Client, model: str) -> None:
        """Use SGLang's own reload, from `model`, unless a ring has the weights (plugin/engine/weights.py).

        Raises EngineFailed (reload-failed).
        """
        answer = client.admin().json(
            "POST", "/update_weights_from_disk", {"model_path": model}, timeout_s=RELOAD_LIMIT_S
        )
        if not answer.get("success"):
            raise EngineFailed("reload-failed", "SGLang did not reload its weights", str(answer.get("message")))

    def gpu_arguments(
        self, command: EngineCommand, installed: EngineFacts, environment: Mapping[str, str]
    ) -> tuple[str, ...]:
        """Enable the memory saver where SGLang starts with it: its package is there, and no expandable segments."""
        there = _MEMORY_SAVER & installed.packages.keys()
        if has_flag(command, self.offload_flag):
            if not there:
                log.warning(
                    "memory-saver-missing: SGLang ends at --enable-memory-saver without its package; %s", _INSTALL
                )
            return ()
        if not there:
            log.warning(
                "memory-saver-missing: the driver carries weights and KV cache in every snapshot, slowly; %s", _INSTALL
            )
            return ()
        if expandable_segments(environment):
            log.info("no --enable-memory-saver with expandable_segments:True; the driver carries the GPU memory")
            return ()
        return (self.offload_flag,)

    def unsafe_reload(self, command: EngineCommand, folder: Path | None, installed: EngineFacts) -> str:
        """As for every engine. SGLang's reload reads the target's path for a draft model, too (weight_updater.py)."""
        drafts = draft_weights(command.arguments, folder)
        if drafts and last(given_options(command.arguments), "speculative-draft-model-path") not in ("", command.model):
            return f"{drafts}: SGLang reloads a draft model from the model's own folder"
        return super().unsafe_reload(command, folder, installed)

    def offload(self, client: Client, command: EngineCommand, excluded: bool) -> bool:
        """Release the KV cache, and the weights too if the snapshot excludes them (`excluded`).

        Without the memory saver SGLang would answer but release nothing.
        """
        if not has_flag(command, self.offload_flag):
            return False
        tags = ["kv_cache", "weights"] if excluded else ["kv_cache"]
        return self.request_release(client.admin(), "/release_memory_occupation", {"tags": tags})

    def reload(self, client: Client, model: str, excluded: bool) -> None:
        """Resume each tag exactly once: resuming memory that is not released kills SGLang's scheduler."""
        if excluded:
            self._resume(client, "weights")
            self.reload_weights(client, model)
        self._resume(client, "kv_cache")

    def _resume(self, client: Client, tag: str) -> None:
        client.admin().ok("POST", "/resume_memory_occupation", {"tags": [tag]}, timeout_s=RELOAD_LIMIT_S)


def listens(client: Client) -> bool:
    """Return whether SGLang's HTTP server answers, whatever that is."""
    return status_of(client, "/model_info") != 0


def _input(prompt: Prompt) -> dict[str, Prompt]:
    """Return a prompt as SGLang's native endpoints take it."""
    return {"text" if isinstance(prompt, str) else "input_ids": prompt}
