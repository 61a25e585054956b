"""What makes a launch have a way out of its sandbox, and which ports of this host it then reaches."""

import json

import pytest

from launchers.given_options import given_options
from launchers.options.egress import host_ports, uses_hub, why_egress

pytestmark = pytest.mark.t0


def why(engine, words="", model=None, **environment):
    return why_egress(engine, given_options(words.split()), environment, model)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("vllm", "--otlp-traces-endpoint http://c:4317"),
        ("vllm", "--tool-server h:1"),
        ("vllm", "--allowed-media-domains a b"),
        ("sglang", "--enable-trace"),
        ("sglang", "--tool_server demo"),
    ],
)
def test_options_that_need_the_network(engine, words):
    assert why(engine, words).startswith("--")


def test_what_needs_none():
    assert why("vllm", "--port 1") == why("sglang", "--otlp-service-name x") == ""
    assert why("vllm", VLLM_ALLOW_RUNTIME_LORA_UPDATING="0") == ""


def test_adapters_from_the_hub():
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in why("vllm", VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")
    assert uses_hub({"VLLM_LORA_RESOLVER_HF_REPO_LIST": "a/b"}) and not uses_hub({})


@pytest.mark.parametrize(
    ("config", "fetches"),
    [
        ({"vision_config": {}}, True),
        ({"audio_config": {}}, True),
        ({"thinker_config": {"text_config": {}}}, True),
        ({"image_token_id": 7}, True),
        ({"mm_vision_tower": "x"}, True),
        ({"architectures": ["Llama"], "hidden_size": 1, "vocab_size": 2}, False),
        ({"description": "vision_config"}, False),
    ],
)
def test_a_model_that_takes_urls(config, fetches, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert bool(why("vllm", model=tmp_path)) == fetches
    assert why("vllm", "--language-model-only", model=tmp_path) == ""
    (tmp_path / "config.json").unlink()
    assert why("sglang", model=tmp_path) == ""


@pytest.mark.parametrize(
    ("engine", "words", "environment", "ports"),
    [
        ("vllm", "--otlp-traces-endpoint http://localhost:4317", {}, (4317,)),
        ("vllm", "--otlp-traces-endpoint 127.0.0.1:4318", {}, (4318,)),
        ("vllm", "--otlp-traces-endpoint http://collector:4317", {}, ()),
        ("vllm", "--otlp-traces-endpoint http://10.127.0.1:4317", {}, ()),
        ("vllm", "--tool-server localhost:7,127.0.0.1:8,other:9", {}, (7, 8)),
        ("vllm", "", {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://localhost:1"}, (1,)),
        ("vllm", "", {"HTTPS_PROXY": "http://user:pw@127.0.0.1:3128", "http_proxy": "http://proxy:3128"}, (3128,)),
        ("sglang", "--enable-trace", {}, (4317,)),
        ("sglang", "--enable-trace --otlp-traces-endpoint c:1", {}, ()),
        ("vllm", "--otlp-traces-endpoint localhost:99999", {}, ()),
    ],
)
def test_ports_of_this_host(engine, words, environment, ports):
    assert host_ports(engine, given_options(words.split()), environment) == ports
