"""The rows of docs/compatibility.md: command lines and environments, and what follows. tests/t2/test_dropin.py runs each with the real engine.

tests/kits/dropin_page.py makes the page; a test keeps it equal to the file.
"""

import json
import re
from dataclasses import dataclass, field

RESTORED = "restored"
"""Served from the snapshot that an earlier start of the same meaning took, with the same answer."""
PLAIN = "plain"
"""Served without a snapshot; a line says why."""
ITS_OWN = "its own snapshot"
"""Means something else to the engine: the snapshot is refused with a code, and a cold start takes another one."""
AS_GIVEN = "as given"
"""The command itself runs in the place of quickthaw; a line says why."""


def _name(engine: str, what: str) -> str:
    words = re.findall(r"[\w=]+", what)
    return f"{engine}-{'-'.join(words)}"


@dataclass(frozen=True)
class Row:
    """One command line or environment of one engine.

    `words` follow `quickthaw launch` and its `options`; `before` is a shell script in front of it, in which "$@" is the command. `code`: what
    quickthaw's lines must contain. The test fills in {model}, {tokenizer}, {script}, {python}, {port}, {folder} (an empty one) and {link}.
    """

    engine: str
    what: str
    words: tuple[str, ...]
    outcome: str = RESTORED
    code: str = ""
    options: tuple[str, ...] = ()
    before: str = ""
    environment: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The row's name as a test parameter."""
        return _name(self.engine, self.what)


@dataclass(frozen=True)
class Feature:
    """A request to an engine with many options at once; cold and restored it must be answered alike.

    `expected`: a pattern that the answer's JSON must contain.
    """

    engine: str
    what: str
    path: str
    body: dict[str, object] | None
    expected: str = ""
    key: bool = True
    status: int = 200

    @property
    def name(self) -> str:
        """The row's name as a test parameter."""
        return _name(self.engine, self.what)


# Command lines that mean the same to the engine

_VLLM_REST = ("--tokenizer", "{tokenizer}", "--max-logprobs", "20")
VLLM = ("vllm", "--model", "{model}", *_VLLM_REST)
_VLLM_TEXT = "--tokenizer {tokenizer} --max-logprobs 20 --port {port}"
_CPU = ("--device", "cpu", "--attention-backend", "torch_native", "--max-total-tokens", "16384")
_SGLANG_REST = (*_CPU, "--tokenizer-path", "{tokenizer}")
SGLANG = ("sglang", "--model-path", "{model}", *_SGLANG_REST)
_SGLANG_TEXT = " ".join((*_SGLANG_REST, "--port", "{port}"))

SPELLINGS = (
    Row("vllm", "the engine's name and its arguments", VLLM),
    Row("vllm", "= instead of a space", ("vllm", "--model={model}", "--tokenizer={tokenizer}", "--max-logprobs=20")),
    Row(
        "vllm",
        "underscores",
        ("vllm", "--model", "{model}", "--tokenizer", "{tokenizer}", "--max_logprobs", "20"),
    ),
    Row(
        "vllm",
        "an abbreviated option",
        ("vllm", "--model", "{model}", "--tokenizer", "{tokenizer}", "--max-logp", "20"),
    ),
    Row("vllm", "another order", ("vllm", "--max-logprobs", "20", "--tokenizer", "{tokenizer}", "--model", "{model}")),
    Row("vllm", "the command vllm serve", ("--", "{script}", "serve", "{model}", *_VLLM_REST)),
    Row("vllm", "flags before the positional model", ("--", "{script}", "serve", *_VLLM_REST, "{model}")),
    Row(
        "vllm",
        "python -m, the server's module",
        ("--", "{python}", "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", *_VLLM_REST),
    ),
    Row(
        "vllm",
        "python -m, the command's module",
        ("--", "{python}", "-m", "vllm.entrypoints.cli.main", "serve", "{model}", *_VLLM_REST),
    ),
    Row("vllm", "sh -c", ("--", "sh", "-c", f"exec {{script}} serve {{model}} {_VLLM_TEXT}")),
    Row(
        "vllm",
        "bash -c with an assignment, quotes and a continued line",
        ("--", "bash", "-c", f"VLLM_CPU_KVCACHE_SPACE=1 '{{script}}' serve \\\n \"{{model}}\" {_VLLM_TEXT}"),
    ),
    Row("vllm", "env in front", ("--", "env", "VLLM_CPU_KVCACHE_SPACE=1", "{script}", "serve", "{model}", *_VLLM_REST)),
    Row("vllm", "another log level of the server", (*VLLM, "--uvicorn-log-level", "warning")),
    Row("vllm", "every address", (*VLLM, "--host", "0.0.0.0")),
    Row("sglang", "the engine's name and its arguments", SGLANG),
    Row(
        "sglang",
        "= instead of a space",
        ("sglang", "--model-path={model}", *_CPU, "--tokenizer-path={tokenizer}"),
    ),
    Row("sglang", "--model for --model-path", ("sglang", "--model", "{model}", *_SGLANG_REST)),
    Row(
        "sglang",
        "abbreviated options",
        ("sglang", "--model-p", "{model}", *_CPU[:4], "--max-total", "16384", "--tokenizer-pa", "{tokenizer}"),
    ),
    Row("sglang", "another order", ("sglang", *_SGLANG_REST, "--model-path", "{model}")),
    Row("sglang", "the command sglang serve", ("--", "{script}", "serve", "--model-path", "{model}", *_SGLANG_REST)),
    Row(
        "sglang",
        "python -m, the server's module",
        ("--", "{python}", "-m", "sglang.launch_server", "--model-path", "{model}", *_SGLANG_REST),
    ),
    Row(
        "sglang",
        "sh -c",
        ("--", "sh", "-c", f"exec {{python}} -m sglang.launch_server --model-path {{model}} {_SGLANG_TEXT}"),
    ),
    Row(
        "sglang",
        "bash -c with an assignment, quotes and a continued line",
        (
            "--",
            "bash",
            "-c",
            f"SGLANG_USE_CPU_ENGINE=1 '{{script}}' serve \\\n --model-path \"{{model}}\" {_SGLANG_TEXT}",
        ),
    ),
    Row(
        "sglang",
        "env in front",
        ("--", "env", "SGLANG_USE_CPU_ENGINE=1", "{script}", "serve", "--model-path", "{model}", *_SGLANG_REST),
    ),
    Row("sglang", "another log level", (*SGLANG, "--log-level", "warning")),
    Row("sglang", "every address", (*SGLANG, "--host", "0.0.0.0")),
)
_BASE = {"vllm": VLLM, "sglang": SGLANG}
_SERVICES = {
    "vllm": {"VLLM_SERVICE_HOST": "10.0.0.7", "VLLM_SERVICE_PORT": "8000", "VLLM_PORT": "tcp://10.0.0.7:8000"},
    "sglang": {
        "SGLANG_SERVICE_HOST": "10.0.0.7",
        "SGLANG_PORT": "tcp://10.0.0.7:30000",
        "SGLANG_SERVICE_PORT": "30000",
    },
}

# Environments in which the snapshot serves

SURROUNDINGS = tuple(
    row
    for engine, words in _BASE.items()
    for row in (
        Row(engine, "variables of a Kubernetes service of the engine's name", words, environment=_SERVICES[engine]),
        Row(
            engine,
            "another pod: name, address, renewed token",
            words,
            environment={"HOSTNAME": "pod-7", "POD_IP": "10.9.8.7", "HF_TOKEN": "hf_renewed"},
        ),
        Row(
            engine,
            "TMPDIR and PROMETHEUS_MULTIPROC_DIR of the user",
            words,
            environment={"TMPDIR": "{folder}", "PROMETHEUS_MULTIPROC_DIR": "{folder}"},
        ),
        Row(engine, "no standard input", words, before='exec "$@" <&-'),
        Row(engine, "umask 077", words, before='umask 077; exec "$@"'),
        Row(engine, "1,024 open files", words, before='ulimit -n 1024; exec "$@"'),
        Row(engine, "lower priority", words, before='exec nice -n 5 "$@"'),
        Row(engine, "no-new-privileges", words, before='exec setpriv --no-new-privs "$@"'),
        Row(
            engine,
            "without /dev/fuse",
            words,
            before="""exec unshare -m sh -c 'mount --bind /dev/null /dev/fuse && exec "$@"' sh "$@\"""",
        ),
        Row(
            engine,
            "without /dev/net/tun",
            words,
            before="""exec unshare -m sh -c '[ ! -e /dev/net/tun ] || mount --bind /dev/null /dev/net/tun; exec "$@"' sh "$@\"""",
        ),
        Row(
            engine,
            "a read-only root file system",
            words,
            before="""exec unshare -m sh -c 'mount --bind {home} {home} && mount -o remount,bind,ro / && exec "$@"' sh "$@\"""",
        ),
        Row(engine, "JSON logs", words, options=("--log-format", "json")),
        Row(engine, "two replicas", words, options=("--replicas", "2")),
    )
)

# What means something else to the engine

DIFFERENT = tuple(
    row
    for engine, words in _BASE.items()
    for row in (
        Row(
            engine,
            "a variable of its libraries",
            words,
            ITS_OWN,
            "environment-differs: OMP_NUM_THREADS",
            environment={"OMP_NUM_THREADS": "1"},
        ),
        Row(
            engine,
            "an unknown variable",
            words,
            ITS_OWN,
            "environment-differs: MY_PLUGIN_MODE",
            environment={"MY_PLUGIN_MODE": "2"},
        ),
        Row(engine, "a time zone", words, ITS_OWN, "environment-differs: TZ", environment={"TZ": "Asia/Tokyo"}),
        Row(
            engine,
            "the model by another path, which is the name that clients use",
            tuple(w.replace("{model}", "{link}") for w in words),
            ITS_OWN,
            "arguments-differ",
        ),
        Row(engine, "another data type", (*words, "--dtype", "float32"), ITS_OWN, "arguments-differ: --dtype"),
        Row(
            engine,
            "a served name",
            (*words, "--served-model-name", "mine"),
            ITS_OWN,
            "arguments-differ: --served-model-name",
        ),
        Row(engine, "an API key", (*words, "--api-key", "mine"), ITS_OWN, "secret-differs: --api-key"),
        Row(
            engine,
            "a seed",
            (*words, {"vllm": "--seed", "sglang": "--random-seed"}[engine], "7"),
            ITS_OWN,
            "arguments-differ",
        ),
    )
)

# Plain: what no snapshot can serve here, or ever

_NO_CAPABILITY = 'exec setpriv --bounding-set -{0} --inh-caps -{0} "$@"'
PLAINLY = (
    Row("sglang", "without CRIU", SGLANG, PLAIN, "criu-missing", environment={"QUICKTHAW_CRIU": "/nowhere/criu"}),
    Row(
        "sglang",
        "without CAP_SYS_ADMIN",
        SGLANG,
        PLAIN,
        "snapshots off: missing CAP_SYS_ADMIN",
        before=_NO_CAPABILITY.format("sys_admin"),
    ),
    Row(
        "sglang",
        "without CAP_NET_ADMIN",
        SGLANG,
        PLAIN,
        "snapshots off: missing CAP_NET_ADMIN",
        before=_NO_CAPABILITY.format("net_admin"),
    ),
    Row(
        "sglang",
        "as uid 2000, a read-only root file system",
        SGLANG,
        PLAIN,
        "snapshots off: missing CAP_SYS_ADMIN",
        before="""exec unshare -m sh -c 'mount --bind {folder} {folder} && mount -o remount,bind,ro / && """
        """exec setpriv --reuid 2000 --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search "$@"' sh "$@\"""",
        environment={"HOME": "{folder}", "TMPDIR": "{folder}", "QUICKTHAW_HOME": ""},
    ),
    Row(
        "sglang",
        "in a user namespace",
        SGLANG,
        PLAIN,
        "the host's user namespace",
        before='exec unshare --user --map-root-user "$@"',
    ),
    Row(
        "sglang",
        "a shell script of more than one command",
        (
            "--",
            "sh",
            "-c",
            f"true && exec {{python}} -m sglang.launch_server --model-path {{model}} {_SGLANG_TEXT}",
        ),
        AS_GIVEN,
        "run-as-given",
    ),
)


@dataclass(frozen=True)
class Command:
    """A command that starts no server: its output must contain `expected`, and its exit code be 0."""

    engine: str
    what: str
    words: tuple[str, ...]
    expected: str

    @property
    def name(self) -> str:
        """The row's name as a test parameter."""
        return _name(self.engine, self.what)


COMMANDS = (
    Command("vllm", "the engine's version", ("vllm", "--version"), "vllm "),
    Command("sglang", "the engine's version", ("sglang", "--version"), "sglang "),
    Command("sglang", "the engine's help", ("--", "{python}", "-m", "sglang.launch_server", "--help"), "--model-path"),
    Command("vllm", "another program", ("--", "{python}", "-c", "print('no engine')"), "no engine"),
)

# Options of the engines, many in one start

ADAPTER, SERVED = "small-adapter", "front-name"
_CHAT = {"messages": [{"role": "user", "content": "Name a colour of the sky."}], "max_tokens": 24, "temperature": 0}
_TEXT = {"prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "maximum": 99999999}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
        },
    },
}


def _features(engine: str) -> tuple[Feature, ...]:
    pattern = {"vllm": {"structured_outputs": {"regex": "[0-9]{4}"}}, "sglang": {"regex": "[0-9]{4}"}}[engine]
    schema = {"vllm": {"structured_outputs": {"json": _SCHEMA}}, "sglang": {"json_schema": json.dumps(_SCHEMA)}}[engine]
    return (
        Feature(engine, "--served-model-name", "/v1/models", None, SERVED),
        Feature(engine, "a completion", "/v1/completions", _TEXT | {"model": SERVED}, '"text": "[^"]+'),
        Feature(engine, "--api-key: no key", "/v1/completions", _TEXT | {"model": SERVED}, key=False, status=401),
        # The template of the test makes 16 tokens of this chat, and 21 with a tool; the model's own makes 37.
        Feature(engine, "--chat-template", "/v1/chat/completions", _CHAT | {"model": SERVED}, r'"prompt_tokens": 16\b'),
        Feature(
            engine,
            "--tool-call-parser, a named tool",
            "/v1/chat/completions",
            _CHAT
            | {
                "model": SERVED,
                "tools": [_TOOL],
                "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
                "chat_template_kwargs": {"enable_thinking": False},
                "max_tokens": 48,
            },
            "get_weather",
        ),
        Feature(
            engine,
            "--tool-call-parser, the model's choice",
            "/v1/chat/completions",
            _CHAT | {"model": SERVED, "tools": [_TOOL], "tool_choice": "auto"},
            r'"prompt_tokens": 21\b',
        ),
        Feature(
            engine,
            "--reasoning-parser",
            "/v1/chat/completions",
            _CHAT | {"model": SERVED, "messages": [{"role": "user", "content": "Think: <think>"}]},
            '"reasoning(_content)?": "[^"]+',
        ),
        Feature(
            engine,
            "structured output, a JSON schema",
            "/v1/completions",
            _TEXT | {"model": SERVED, "max_tokens": 64} | schema,
            "people",
        ),
        Feature(
            engine,
            "structured output, a pattern",
            "/v1/completions",
            _TEXT | {"model": SERVED} | pattern,
            '"text": "[0-9]{4}"',
        ),
        Feature(
            engine, "log probabilities", "/v1/completions", _TEXT | {"model": SERVED, "logprobs": 3}, "top_logprobs"
        ),
        Feature(
            engine,
            "a stop string",
            "/v1/completions",
            _TEXT | {"model": SERVED, "stop": ["."], "max_tokens": 64},
            '"(stop_reason|matched_stop)": "[.]"',
        ),
        Feature(engine, "tokens of a text", "/tokenize", {"model": SERVED, "prompt": "Hello, world"}, "tokens"),
    )


# SGLang's adapters need pinned memory, which PyTorch has only with an NVIDIA driver: SGLang alone does not serve them on a CPU.
_ADAPTER = Feature("vllm", "a LoRA adapter", "/v1/completions", _TEXT | {"model": ADAPTER}, '"text": "[^"]+')
FEATURES = (*_features("vllm"), _ADAPTER, *_features("sglang"))

EMBEDDING = {"sglang": ("--is-embedding",), "vllm": ("--runner", "pooling", "--convert", "embed", "--enforce-eager")}
"""Options with which each engine embeds; tests/t2/test_engine_tasks.py."""

# Other doors than a port without TLS, and a way out: each a cold start of its own and a restore

DOORS = (
    Row(
        "sglang",
        "TLS, made-up weights",
        (*SGLANG, "--load-format", "dummy", "--ssl-certfile", "{certificate}", "--ssl-keyfile", "{key}"),
    ),
    Row(
        "vllm",
        "a Unix socket, traces to a collector",
        (*VLLM, "--enforce-eager", "--uds", "{socket}", "--otlp-traces-endpoint", "{collector}"),
        environment={"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
    ),
)
