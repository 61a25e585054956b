"""Which launches lose weights in their engine's own reload, by options and by the model's configuration."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import launchers
from checkpoint.compatibility.engine import EngineFacts
from launchers.options.reload import draft_weights, model_config, quantized

pytestmark = pytest.mark.t0
EAGLE = json.dumps({"method": "eagle3", "model": "/draft", "num_speculative_tokens": 3})
NGRAM = json.dumps({"method": "ngram", "num_speculative_tokens": 3})


@pytest.mark.parametrize(
    ("words", "config", "found"),
    [
        ([], {}, ""),
        (["--quantization", "fp8"], {}, "--quantization fp8"),
        (["-q=awq"], {}, "--q awq"),
        (["--quantization", "none"], {}, ""),
        ([], {"quantization_config": {"quant_method": "gptq"}}, "the model's quantization_config"),
        ([], {"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "the model's quantization_config"),
        ([], {"compression_config": {"format": "pack"}}, "the model's compression_config"),
        ([], {"quantization_config": None, "text_config": None}, ""),
    ],
)
def test_quantized_weights_are_seen(tmp_path, words, config, found):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantized(words, tmp_path) == found


def test_a_file_of_a_quantizer_is_seen(tmp_path):
    assert quantized([], tmp_path) == "" and quantized([], None) == ""
    (tmp_path / "hf_quant_config.json").write_text("{}")
    assert quantized([], tmp_path) == "the model's hf_quant_config.json"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], ""),
        (["--speculative-config", EAGLE], "--speculative-config"),
        (["-sc", EAGLE], "--sc"),
        (["--speculative-config", '{"model": "/draft"}'], "--speculative-config"),
        (["--speculative-config.method", "mtp"], "--speculative-config.method"),
        (["--speculative-config.method=suffix"], ""),
        (["--speculative-config", NGRAM], ""),
        (["--speculative-algorithm", "EAGLE"], "--speculative-algorithm"),
        (["--speculative-algorithm", "NGRAM"], ""),
        (["--speculative-draft-model-path", "/draft"], "--speculative-draft-model-path"),
        (["--spec-trace-dir", "/tmp"], ""),
        (["--speculative-config", "not json"], "--speculative-config"),
    ],
)
def test_draft_models_are_seen(words, found):
    assert draft_weights(words, None) == found


def test_a_model_that_names_its_draft_is_seen(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"speculators_config": {"algorithm": "eagle3"}}))
    assert draft_weights([], tmp_path) == "the model's speculators_config"
    for text in ("[]", "{", "null"):
        (tmp_path / "config.json").write_text(text)
        assert model_config(tmp_path) == {}


def facts(engine, version):
    return EngineFacts(engine, f"{engine} {version}", "", "", "", "", "", {"torch_memory_saver": "0.0.10"})


@pytest.mark.parametrize(
    ("engine", "version", "words", "config", "why"),
    [
        ("vllm", "0.32.0", [], {}, ""),
        ("vllm", "0.32.0", ["--quantization", "fp8"], {}, "--quantization fp8: kernels"),
        ("vllm", "0.32.0", ["--speculative-config", EAGLE], {}, ""),
        ("vllm", "0.32.0", ["--speculative-config", NGRAM], {}, ""),
        ("vllm", "0.31.2", ["--speculative-config", EAGLE], {}, "--speculative-config: this vLLM reloads no weights"),
        ("vllm", "0.32.0", [], {"speculators_config": {}, "kv_lora_rank": 512}, ""),
        ("vllm", "0.32.0", [], {"speculators_config": {"a": 1}}, "speculators_config: this vLLM"),
        ("vllm", "0.24.1", [], {"kv_lora_rank": 512}, "latent attention"),
        ("vllm", "0.32.0", [], {"vision_config": {}}, "a model of images"),
        (
            *("vllm", "0.32.0"),
            ["--sleep-preserve-parameter-names", "embed", "--speculative-config", EAGLE],
            {},
            "this vLLM reloads no weights of a draft model",
        ),
        ("sglang", "0.5.23", ["--speculative-algorithm", "NEXTN"], {}, ""),
        (
            *("sglang", "0.5.23"),
            ["--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", "/draft"],
            {},
            "from the model's own folder",
        ),
        ("sglang", "0.5.23", [], {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: kernels"),
    ],
)
def test_a_reload_that_leaves_weights_out_is_named(tmp_path, engine, version, words, config, why):
    (tmp_path / "config.json").write_text(json.dumps(config))
    launcher, installed = launchers.engine(engine), facts(engine, version)
    command = launcher.parse(["--model", str(tmp_path), *words], {})
    extra = launcher.gpu_arguments(command, installed, {})
    found = launcher.unsafe_reload(replace(command, arguments=(*command.arguments, *extra)), tmp_path, installed)
    assert (why in found) if why else found == ""
    assert "\n" not in found


def test_a_draft_model_is_kept_where_vllm_can():
    vllm = launchers.engine("vllm")
    kept = ("--sleep-preserve-parameter-names", "draft.*")

    def more(*words, version="0.32.0"):
        return vllm.gpu_arguments(vllm.parse(["--model", "/m", *words], {}), facts("vllm", version), {})

    assert more("--speculative-config", EAGLE) == ("--enable-sleep-mode", *kept)
    assert more("--enable-sleep-mode", "--speculative-config", EAGLE) == kept
    assert more("--no-enable-sleep-mode", "--speculative-config", EAGLE) == ()
    assert more("--speculative-config", NGRAM) == more() == ("--enable-sleep-mode",)
    assert more("--speculative-config", EAGLE, version="0.31.0") == ("--enable-sleep-mode",)
    assert more(*kept, "--speculative-config", EAGLE) == ("--enable-sleep-mode",)
