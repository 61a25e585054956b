"""Command lines and environments that mean the same launch, and those that mean another."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.compatibility.launch_options import (
    IRRELEVANT_ARGUMENTS,
    looks_secret,
    normalised_arguments,
    secret_names,
)

pytestmark = pytest.mark.t0

LINE = ["--model", "/m", "--max-model-len", "4096", "--enforce-eager", "--lora-modules", "a=1", "b=2"]


@pytest.mark.parametrize(
    "same",
    [
        ["--enforce-eager", "--lora-modules", "a=1", "b=2", "--max-model-len", "4096", "--model", "/m"],
        ["--model=/m", "--max_model_len=4096", "--enforce_eager", "--lora-modules", "a=1", "b=2"],
        [*LINE, "--port", "9000", "--host=0.0.0.0", "--uvicorn-log-level", "debug", "--disable-uvicorn-access-log"],
        ["--disable_uvicorn_access_log", *LINE, "--port=1"],
    ],
)
def test_equivalent_command_lines_are_one_launch(same: list[str]) -> None:
    assert normalised_arguments("vllm", same) == normalised_arguments("vllm", LINE)


@pytest.mark.parametrize(
    "other",
    [
        [*LINE, "--enable-log-requests"],
        [*LINE, "--seed", "1"],
        ["/m", "--max-model-len", "4096", "--enforce-eager", "--lora-modules", "a=1", "b=2"],
        [
            "--model",
            "/m",
            "--max-model-len",
            "4096",
            "--enforce-eager",
            "--lora-modules",
            "a=1",
            "--lora-modules",
            "b=2",
        ],
        ["--model", "/m", "--max-model-len", "4096", "--enforce-eager", "--lora-modules", "b=2", "a=1"],
        ["--model", "/m", "--max-model-len", "40960", "--enforce-eager", "--lora-modules", "a=1", "b=2"],
        ["--model", "/n", "--max-model-len", "4096", "--enforce-eager", "--lora-modules", "a=1", "b=2"],
    ],
)
def test_different_options_are_another_launch(other: list[str]) -> None:
    assert normalised_arguments("vllm", other) != normalised_arguments("vllm", LINE)


def test_words_after_an_irrelevant_switch_are_kept() -> None:
    assert normalised_arguments("vllm", ["--disable-uvicorn-access-log", "/m"]) == {"": (("/m",),)}
    assert normalised_arguments("sglang", ["--show-time-cost", "--tp", "2", "--log-level", "error"]) == {
        "--tp": (("2",),)
    }


def test_a_value_may_look_like_a_negative_number() -> None:
    assert normalised_arguments("vllm", ["--seed", "-1", "--x"]) == {"--seed": (("-1",),), "--x": ((),)}


def test_words_after_two_dashes_are_positional() -> None:
    assert normalised_arguments("vllm", ["--a", "--", "--port", "1"]) == {"": (("--port", "1"),), "--a": ((),)}


def test_a_final_flag_without_its_value_is_accepted() -> None:
    assert normalised_arguments("vllm", ["--port"]) == {}


def test_a_model_with_a_served_name_counts_by_digest_only() -> None:
    named = ["--served-model-name", "chat"]
    here = normalised_arguments("vllm", ["--model", "/models/one", *named], ["/models/one"])
    there = normalised_arguments("vllm", ["--model", "/srv/m", "--served_model_name=chat"], ["/srv/m"])
    assert here == there == {"--model": (("{model}",),), "--served-model-name": (("chat",),)}


def test_without_a_served_name_the_models_path_counts() -> None:
    assert normalised_arguments("vllm", ["--model", "/srv/m"], ["/srv/m"]) == {"--model": (("/srv/m",),)}


def test_a_file_counts_by_its_content(tmp_path: Path) -> None:
    one, two = tmp_path / "chat.jinja", tmp_path / "elsewhere"
    one.write_text("{{ messages }}")
    two.write_text("{{ messages }}")
    before = normalised_arguments("vllm", ["--chat-template", str(one)])
    assert normalised_arguments("vllm", ["--chat-template", str(two)]) == before
    one.write_text("{{ messages }}!")
    assert normalised_arguments("vllm", ["--chat-template", str(one)]) != before


def test_a_value_too_long_for_a_path_is_a_value() -> None:
    value = '{"a/b": "' + "x" * 5000 + '"}'
    assert normalised_arguments("vllm", ["--speculative-config", value]) == {"--speculative-config": ((value,),)}


def test_of_an_unknown_engine_only_the_proxys_options_are_removed() -> None:
    assert normalised_arguments("other", ["--port", "1", "--log-level", "x"]) == {"--log-level": (("x",),)}


flags = st.sampled_from(["--alpha", "--beta", "--gamma-delta", "-O3"])
groups = st.lists(
    st.tuples(flags, st.lists(st.sampled_from(["1", "x", "y=z", "-2"]), max_size=2)),
    max_size=5,
    unique_by=lambda g: g[0],
)


@settings(deadline=None)
@given(groups, st.randoms())
def test_the_order_of_flags_does_not_matter(line: list[tuple[str, list[str]]], random: object) -> None:
    shuffled = list(line)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    flat = [[w for flag, words in groups for w in (flag, *words)] for groups in (line, shuffled)]
    assert normalised_arguments("vllm", flat[0]) == normalised_arguments("vllm", flat[1])


@pytest.mark.parametrize("engine", IRRELEVANT_ARGUMENTS)
def test_irrelevant_arguments_are_removed_at_any_position(engine: str) -> None:
    base = ["--alpha", "1", "--beta"]
    for name, takes in IRRELEVANT_ARGUMENTS[engine].items():
        extra = [f"--{name}", *["value"] * takes]
        for line in ([*extra, *base], [*base, *extra], [*base[:2], *extra, *base[2:]]):
            assert normalised_arguments(engine, line) == normalised_arguments(engine, base), line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "hf_x"),
        ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI"),
        ("VLLM_API_KEY", "let-me-in"),
        ("--api-key", "let-me-in"),
        ("--api-k", "let-me-in"),
        ("DATABASE_URL", "postgres://u:hunter2@db/x"),
        ("INNOCENT", "sk-abcdefghijklmnopqrstuvwx"),
        ("X", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln"),
        ("PEM", "-----BEGIN RSA PRIVATE KEY-----\nMII"),
    ],
)
def test_secrets_are_recognised_by_name_or_form(name: str, value: str) -> None:
    assert looks_secret(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false"),
        ("--max-num-batched-tokens", "2048"),
        ("--tokenizer", "/m"),
        ("PWD", "/root"),
        ("VLLM_HTTP", "http://host:80/x"),
        ("--return-token-ids", "true"),
        ("HF_TOKEN", ""),
        ("--kv-cache-dtype", "auto"),
        ("--seed", "1"),
    ],
)
def test_plain_values_are_no_secrets(name: str, value: str) -> None:
    assert not looks_secret(name, value)


def test_names_of_secrets_without_values() -> None:
    assert secret_names({"B_TOKEN": "abc", "A_PASSWORD": "abc", "HOME": "/"}) == ("A_PASSWORD", "B_TOKEN")
