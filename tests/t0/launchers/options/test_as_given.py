"""Command lines that run as given, because quickthaw's one port or sandbox has no place for what they start."""

import json
import os
import sys
from pathlib import Path

import pytest

import launchers
from launchers.command_words import as_one_command
from launchers.given_options import given_options
from launchers.options.as_given import option_names
from tests.t0.checkpoint.compatibility.test_facts import venv

pytestmark = pytest.mark.t0


def why(engine, words, environment=None):
    return launchers.engine(engine).why_as_given(words.split(), environment or {})


@pytest.mark.parametrize(
    "words",
    [
        "M --headless",
        "--headl M",
        "M --grpc",
        "M --omni",
        "M --grpc-port 1",
        "M --api-server-count 4",
        "M --api_server_count=4",
        "M -asc 2",
        "M --api-server-count 0",
        "M --data-parallel-size 2",
        "M -dp 2",
        "M --data-parallel-rank 0",
        "M --data-parallel-start-rank 1",
        "M -dph",
        "M --data-parallel-external-lb",
        "M --data-parallel-multi-port-external-lb",
        "M --data-parallel-address 10.0.0.1",
        "M --data-parallel-backend ray",
        "M --distributed-executor-backend ray",
        "M --nnodes 2 --node-rank 0",
        "M -n 2",
        "M --node-rank 1",
        "M --enable-elastic-ep",
        'M --kv-transfer-config {"kv_connector":"NixlConnector","kv_role":"kv_both"}',
        "M --kv-transfer-config.kv_connector LMCacheConnectorV1",
        'M --kv-transfer-config {"kv_connector":"SomethingNew"}',
        'M --ec-transfer-config {"ec_connector":"MooncakeECConnector"}',
        "M --kv-offloading-backend lmcache",
        'M --kv-events-config {"enable_kv_cache_events":true,"publisher":"zmq"}',
        "M --kv-events-config.enable_kv_cache_events true",
        'M --weight-transfer-config {"backend":"nccl"}',
    ],
)
def test_a_vllm_that_is_more_than_one_http_server_runs_as_given(words):
    found = why("vllm", words)
    assert found and "\n" not in found and len(found) < 100
    assert found.startswith("--")


@pytest.mark.parametrize(
    "words",
    [
        "M --smg-grpc-mode",
        "M --grpc_mode",
        "M --encoder-only",
        "M --grpc-port 1",
        "M --enable-http2",
        "M --use-ray",
        "M --nnodes 2 --node-rank 0 --dist-init-addr 10.0.0.1:5000",
        "M --nnodes=2",
        "M --node-rank 1",
        "M --dist-init-addr 10.0.0.1:5000",
        "M --nccl-init-addr node0:5000",
        "M --dist-init-addr [fd00::1]:5000",
        "M --disaggregation-mode prefill",
        "M --decoupled-spec-role drafter",
        "M --language-only --encoder-urls http://e:1",
        "M --enable-lmcache",
        "M --enable-flexkv",
        "M --hicache-storage-backend mooncake",
        "M --radix-cache-backend mine",
        "M --elastic-ep-backend nixl",
        "M --weight-cache-mode client",
        'M --kv-events-config {"publisher":"zmq","topic":"kv-events"}',
        "M --load-publish-endpoint auto",
        "M --gated-launch-port 1",
        "M --modelexpress-config {}",
        "M --checkpoint-engine-wait-weights-before-ready",
    ],
)
def test_an_sglang_that_is_more_than_one_http_server_runs_as_given(words):
    found = why("sglang", words)
    assert found.startswith("--") and "\n" not in found and len(found) < 100


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("vllm", "M --port 1"),
        ("vllm", "M --api-server-count 1"),
        ("vllm", "M --data-parallel-size 1 --data-parallel-address 127.0.0.1 --nnodes 1 --node-rank 0"),
        ("vllm", "M --distributed-executor-backend mp --data-parallel-backend mp"),
        ("vllm", "M --distributed-executor-backend my.Executor"),
        ("vllm", 'M --kv-transfer-config {"kv_connector":"OffloadingConnector","kv_role":"kv_both"}'),
        ("vllm", 'M --kv-events-config {"enable_kv_cache_events":false}'),
        ("vllm", 'M --kv-events-config {"enable_kv_cache_events":true,"publisher":"null"}'),
        ("vllm", "M --enable-elastic-ep --no-enable-elastic-ep"),
        ("vllm", "M --kv-offloading-size 4"),
        ("vllm", "M --api-server-count x"),
        ("vllm", "M -- --headless"),
        ("sglang", "M --dp-size 2 --tp 2"),
        ("sglang", "M --nnodes 1 --node-rank 0 --dist-init-addr 127.0.0.1:5000"),
        ("sglang", "M --dist-init-addr [::1]:5000"),
        ("sglang", "M --disaggregation-mode null"),
        ("sglang", "M --hicache-storage-backend file"),
        ("sglang", 'M --kv-events-config {"publisher":"null"}'),
        ("sglang", "M --tokenizer-worker-num 2"),
    ],
)
def test_what_stays_on_one_port_of_one_host_does_not(engine, words):
    assert why(engine, words) == ""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("--enable-elastic-ep", "--no-enable-elastic-ep"),
        ("--data-parallel-external-lb", "--no-data-parallel-external-lb"),
        ("-dph", "--no-data-parallel-hybrid-lb"),
        ("--data_parallel_hybrid_lb", "--no-data-parallel-hybrid-lb"),
        ("-dp 2", "--data-parallel-size 1"),
        ("--data-parallel-size=2", "-dp 1"),
        ("--nnodes 2", "-n 1"),
    ],
)
def test_the_last_of_two_opposites_counts(first, second):
    assert why("vllm", f"M {first} {second}") == ""
    assert why("vllm", f"M {second} {first}")
    assert why("vllm", f"M {first} --port 1 {second} --seed 1 {first}")


def test_the_command_line_overrides_an_opposite_in_the_file_of_options(tmp_path):
    file = tmp_path / "engine.yaml"
    file.write_text("enable-elastic-ep: true\ntrust-remote-code: true\n")
    assert why("vllm", f"M --config {file}")
    assert why("vllm", f"M --no-enable-elastic-ep --config {file}") == ""
    given = given_options(["--no-trust-remote-code", "--config", str(file)])
    assert "trust-remote-code" not in given and "no-trust-remote-code" in given


def test_several_connectors_stay_here_if_all_of_them_do():
    def several(*kinds):
        inner = [{"kv_connector": kind} for kind in kinds]
        given = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": inner}}
        return launchers.engine("vllm").why_as_given(["--kv-transfer-config", json.dumps(given)], {})

    assert several("OffloadingConnector", "ExampleConnector") == ""
    assert "NixlConnector" in several("OffloadingConnector", "NixlConnector")
    assert "MultiConnector" in several()


@pytest.mark.parametrize(
    ("engine", "line"),
    [("vllm", "headless: true"), ("vllm", "api_server_count: 2"), ("sglang", "nnodes: 2"), ("sglang", "grpc-port: 1")],
)
def test_the_file_of_options_counts_too(engine, line, tmp_path):
    file = tmp_path / "engine.yaml"
    file.write_text(f"port: 1\n{line}\n")
    assert why(engine, f"M --config {file}")
    file.write_text("port: 1\nheadless: false\nnnodes: 1\n")
    assert not why(engine, f"M --config {file}")


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_every_option_of_the_rules_is_one_of_the_tested_release(name):
    known = launchers.engine(name).options
    assert {f"--{option}" for option in option_names(name)} - {
        "--omni"
    } <= known.switches | known.single | known.several


def test_variables_count_too():
    assert why("vllm", "M", {"VLLM_USE_RUST_FRONTEND": "1"})
    assert not why("vllm", "M", {"VLLM_USE_RUST_FRONTEND": "0"})
    assert why("sglang", "M", {"SGLANG_GRPC_PORT": "40000"})


def test_the_name_of_an_engine_becomes_the_command_that_starts_it(tmp_path):
    python = os.path.abspath(sys.executable)
    assert as_one_command(["/opt/vllm", "serve", "M"], python) == ("/opt/vllm", "serve", "M")
    assert as_one_command(["vllm", "serve", "M"], python) == ("vllm", "serve", "M")
    module = (python, "-m", "vllm.entrypoints.openai.api_server", "--model", "M")
    assert as_one_command(["vllm", "--model", "M"], python) == module
    assert as_one_command(["sglang", "M"], python) == (python, "-m", "sglang.launch_server", "M")
    venv(tmp_path / "venv", {"vllm": "0.32"})
    python = str(tmp_path / "venv/bin/python")
    assert list(Path(tmp_path).glob("venv/lib/*/site-packages/vllm-*.dist-info"))
    assert as_one_command(["vllm", "M"], python) == (python, "-m", "vllm.entrypoints.cli.main", "serve", "M")
