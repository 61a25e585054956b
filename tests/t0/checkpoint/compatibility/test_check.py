"""Each relevant change is refused with its code; irrelevant changes are not refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.compatibility.check import CurrentIdentity, Identity, Mismatch, check, check_host, refuse
from checkpoint.compatibility.engine import EngineFacts
from checkpoint.compatibility.environment import KEPT, RENEWED, RENEWED_PREFIXES, RENEWED_SUFFIXES
from checkpoint.compatibility.gpu import Gpu
from checkpoint.compatibility.host import HostFacts
from checkpoint.compatibility.launch_options import IRRELEVANT_ARGUMENTS
from checkpoint.errors import Incompatible, Integrity

pytestmark = pytest.mark.t0

H100 = Gpu(name="NVIDIA H100 80GB HBM3", memory=85_520_809_984, uuid="GPU-aaaa")
HOST = HostFacts(
    kernel="6.8.0-45-generic",
    machine="x86_64",
    page_size=4096,
    cpu_model="AMD EPYC 9654",
    cpu_flags=("avx", "avx2", "avx512_bf16", "avx512f", "constant_tsc", "fma", "smep", "sse2"),
    cpus=16,
    criu="4.2.1",
    gpus=(H100,),
    driver="580.159.03",
)
ENGINE = EngineFacts(
    name="vllm",
    version="vllm 0.32.0",
    build="b" * 32,
    interpreter="/opt/vllm/bin/python",
    python="3.11.7",
    python_build="a7516ae8",
    libc="glibc 2.36 93ac61ec",
    packages={"torch": "2.13.0+cpu", "numpy": "2.3.5", "triton": "3.9.0"},
)
HERE = CurrentIdentity(
    host=HOST,
    engine=ENGINE,
    arguments={"--max-model-len": (("4096",),), "--model": (("{model}",),)},
    environment={"OMP_NUM_THREADS": "8", "VLLM_USE_V1": "1"},
    sketch="5" * 32,
    model="d" * 64,
    weights="included",
    secret_names=("HF_TOKEN", "VLLM_API_KEY"),
    secrets={"VLLM_API_KEY": "correct horse battery staple"},
)
RECORDED = HERE.record(salt="5a" * 16)


def codes(now: CurrentIdentity, recorded: Identity = RECORDED) -> list[str]:
    return [m.code for m in check(recorded, now)]


def host(**changes: object) -> CurrentIdentity:
    return replace(HERE, host=msgspec.structs.replace(HOST, **changes))


def engine(**changes: object) -> CurrentIdentity:
    return replace(HERE, engine=msgspec.structs.replace(ENGINE, **changes))


def test_the_same_launch_on_the_same_host_has_no_mismatch() -> None:
    assert check(RECORDED, HERE) == ()
    refuse(check(RECORDED, HERE))


RELEVANT = {
    "kernel older": (host(kernel="6.7.12"), "kernel-older"),
    "kernel major older": (host(kernel="5.19.0"), "kernel-older"),
    "kernel beyond the range": (host(kernel="8.0.1"), "kernel-newer"),
    "kernel without a number": (host(kernel="mystery"), "kernel-unknown"),
    "machine": (host(machine="aarch64"), "machine-differs"),
    "page size": (host(page_size=65536), "page-size-differs"),
    "a CPU feature": (
        host(cpu_flags=tuple(f for f in HOST.cpu_flags if f != "avx512_bf16")),
        "cpu-features-missing: avx512_bf16",
    ),
    "two CPU features": (host(cpu_flags=("avx", "avx2", "fma", "sse2")), "cpu-features-missing: avx512_bf16 avx512f"),
    "CRIU older": (host(criu="4.2"), "criu-older"),
    "CRIU missing": (host(criu=""), "criu-older"),
    "a GPU fewer": (host(gpus=()), "gpu-count-differs"),
    "a GPU more": (host(gpus=(H100, H100)), "gpu-count-differs"),
    "another GPU": (host(gpus=(msgspec.structs.replace(H100, name="NVIDIA A100"),)), "gpu-model-differs"),
    "less GPU memory": (host(gpus=(msgspec.structs.replace(H100, memory=H100.memory // 2),)), "gpu-memory-smaller"),
    "driver older": (host(driver="570.10"), "driver-older"),
    "driver newer": (host(driver="590.1"), "driver-newer"),
    "engine": (engine(name="sglang"), "engine-differs"),
    "engine version": (engine(version="vllm 0.33.0"), "engine-version-differs"),
    "engine build": (engine(build="c" * 32), "engine-build-differs"),
    "interpreter": (engine(interpreter="/usr/bin/python3"), "interpreter-differs"),
    "Python version": (engine(python="3.12.1"), "interpreter-differs"),
    "Python build": (engine(python_build="0000"), "interpreter-differs"),
    "libc": (engine(libc="glibc 2.36 ffff"), "libc-differs"),
    "dependency": (engine(packages={**ENGINE.packages, "torch": "2.14.1"}), "dependency-differs: torch"),
    "dependency gone": (engine(packages={"torch": "2.13.0+cpu", "numpy": "2.3.5"}), "dependency-differs: triton"),
    "dependency added": (engine(packages={**ENGINE.packages, "plugin": "1"}), "dependency-differs: plugin"),
    "argument": (
        replace(HERE, arguments={**HERE.arguments, "--max-model-len": (("8192",),)}),
        "arguments-differ: --max-model-len",
    ),
    "argument gone": (replace(HERE, arguments={"--model": (("{model}",),)}), "arguments-differ: --max-model-len"),
    "argument added": (replace(HERE, arguments={**HERE.arguments, "": (("x",),)}), "arguments-differ: positional"),
    "environment": (
        replace(HERE, environment={**HERE.environment, "OMP_NUM_THREADS": "4"}),
        "environment-differs: OMP_NUM_THREADS",
    ),
    "environment gone": (replace(HERE, environment={"OMP_NUM_THREADS": "8"}), "environment-differs: VLLM_USE_V1"),
    "secret": (replace(HERE, secrets={"VLLM_API_KEY": "another"}), "secret-differs: VLLM_API_KEY"),
    "secret gone": (replace(HERE, secrets={}), "secret-differs: VLLM_API_KEY"),
    "secret added": (replace(HERE, secrets={**HERE.secrets, "--hf-token": "t"}), "secret-differs: --hf-token"),
    "model": (replace(HERE, model="e" * 64), "model-differs"),
    "weights": (replace(HERE, weights="excluded"), "weights-differ"),
    "format": (replace(HERE, format=0), "format-newer"),
}


@pytest.mark.parametrize("what", RELEVANT)
def test_each_relevant_change_is_refused_by_its_code_alone(what: str) -> None:
    now, code = RELEVANT[what]
    assert codes(now) == [code]
    with pytest.raises(Incompatible) as caught:
        refuse(check(RECORDED, now))
    assert caught.value.code == code
    assert caught.value.reasons == (code,)
    assert "\n" not in str(caught.value)


IRRELEVANT = {
    "kernel newer": host(kernel="6.18.3"),
    "kernel a major newer": host(kernel="7.2.0-rc1"),
    "kernel patch level older": host(kernel="6.8.0-11-cloud"),
    "CPU flags of the kernel": host(cpu_flags=tuple(f for f in HOST.cpu_flags if f not in ("smep", "constant_tsc"))),
    "CPU features more": host(cpu_flags=(*HOST.cpu_flags, "amx_tile")),
    "CPU model": host(cpu_model="AMD EPYC 9754"),
    "number of CPUs": host(cpus=4),
    "CRIU newer": host(criu="4.10"),
    "GPU's UUID": host(gpus=(msgspec.structs.replace(H100, uuid="GPU-bbbb"),)),
    "more GPU memory": host(gpus=(msgspec.structs.replace(H100, memory=H100.memory * 2),)),
    "a secret that does not matter": replace(HERE, secret_names=("HF_TOKEN", "OTHER_TOKEN")),
    "a renewed variable": replace(HERE, renewed={"HOSTNAME": "pod-8"}),
}


@pytest.mark.parametrize("what", IRRELEVANT)
def test_no_irrelevant_change_is_refused(what: str) -> None:
    assert codes(IRRELEVANT[what]) == []
    assert IRRELEVANT[what].key == HERE.key


KEYED = [
    "engine",
    "engine version",
    "engine build",
    "interpreter",
    "Python version",
    "argument",
    "argument gone",
    "argument added",
]
KEYED += ["environment", "environment gone", "secret", "secret gone", "secret added", "weights"]


@pytest.mark.parametrize("what", KEYED)
def test_selecting_fields_change_the_key(what: str) -> None:
    assert RELEVANT[what][0].key != HERE.key


def test_a_models_sketch_selects_and_its_digest_is_compared() -> None:
    assert replace(HERE, sketch="6" * 32).key != HERE.key
    assert codes(replace(HERE, sketch="6" * 32)) == []


def test_a_host_that_cannot_restore_has_the_same_key() -> None:
    for what in RELEVANT.keys() - set(KEYED) - {"Python build", "libc"}:
        assert RELEVANT[what][0].key == HERE.key, what


def test_the_key_is_stable_across_versions_of_this_code() -> None:
    # Raise the number in CurrentIdentity.key when its coverage changes. Snapshots with earlier keys are then not found.
    assert re.fullmatch(r"[0-9a-f]{24}", HERE.key)
    assert HERE.key == "794f94c0edbab5b0bfe00d88"


def test_a_compile_cache_is_shared_if_nothing_in_compiled_code_differs() -> None:
    assert re.fullmatch(r"compile-vllm-[0-9a-f]{16}", HERE.compile_cache)
    for same in ("model", "weights", "secret", "kernel older"):
        assert RELEVANT[same][0].compile_cache == HERE.compile_cache
    for other in (
        "engine build",
        "dependency",
        "a CPU feature",
        "another GPU",
        "driver newer",
        "machine",
        "Python version",
        "Python build",
        "libc",
        "argument",
        "argument added",
        "environment",
    ):
        assert RELEVANT[other][0].compile_cache != HERE.compile_cache, other
    lora = replace(HERE, arguments={**HERE.arguments, "--enable-lora": ((),)})
    assert lora.compile_cache != HERE.compile_cache
    assert IRRELEVANT["number of CPUs"].compile_cache != HERE.compile_cache
    assert IRRELEVANT["GPU's UUID"].compile_cache == HERE.compile_cache


def test_several_reasons_are_all_named() -> None:
    now = replace(host(kernel="5.1", page_size=16384), model="")
    with pytest.raises(Incompatible) as caught:
        refuse(check(RECORDED, now))
    assert caught.value.reasons == ("page-size-differs", "kernel-older", "model-differs")
    assert "; kernel-older: " in str(caught.value) and "; model-differs: " in str(caught.value)


def test_a_format_that_is_too_old_is_refused() -> None:
    assert codes(HERE, msgspec.structs.replace(RECORDED, format=0)) == ["format-too-old"]


def test_the_host_alone_can_be_checked() -> None:
    assert check_host(RECORDED, HOST) == ()
    assert [m.code for m in check_host(RECORDED, RELEVANT["driver older"][0].host)] == ["driver-older"]


def test_no_secret_is_in_the_record_or_any_message() -> None:
    text = json.dumps(RECORDED.encode()) + repr(HERE) + repr(RECORDED) + HERE.key
    assert "correct horse" not in text
    assert "VLLM_API_KEY" in text
    assert HERE.record().salt != HERE.record().salt
    assert HERE.record().secrets != HERE.record().secrets
    assert all(
        "correct" not in str(m) and "another" not in m.message.replace("another one", "")
        for m in check(RECORDED, RELEVANT["secret"][0])
    )


def test_a_record_round_trips_through_json() -> None:
    assert Identity.decode(json.loads(json.dumps(RECORDED.encode()))) == RECORDED


@pytest.mark.parametrize("damage", [{"format": "one"}, {"surprise": 1}, {"host": None}])
def test_a_damaged_record_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(Integrity) as caught:
        Identity.decode({**RECORDED.encode(), **damage})
    assert caught.value.code == "identity-garbled"


names = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ_", min_size=1, max_size=12)
values = st.text(min_size=0, max_size=20)
environments = st.dictionaries(names.map(lambda n: f"VLLM_{n}"), values, max_size=6)


@pytest.mark.slow
@settings(deadline=None)
@given(environments, environments)
def test_environments_match_exactly_when_equal(then: dict[str, str], now: dict[str, str]) -> None:
    before, after = replace(HERE, environment=then), replace(HERE, environment=now)
    found = check(before.record(), after)
    expected = {f"environment-differs: {n}" for n in then.keys() | now.keys() if then.get(n) != now.get(n)}
    assert {m.code for m in found} == expected
    assert (before.key == after.key) == (then == now)
    assert all(isinstance(m, Mismatch) and "\n" not in m.message for m in found)


@settings(deadline=None)
@given(st.tuples(st.integers(1, 9), st.integers(0, 30)), st.tuples(st.integers(1, 9), st.integers(0, 30)))
def test_the_kernel_policy_is_the_stated_range(then: tuple[int, int], now: tuple[int, int]) -> None:
    recorded = host(kernel=f"{then[0]}.{then[1]}.0").record()
    allowed = then <= now and now[0] <= then[0] + 1
    assert (check_host(recorded, host(kernel=f"{now[0]}.{now[1]}.7-x").host) == ()) == allowed


@settings(deadline=None)
@given(st.sets(st.sampled_from(HOST.cpu_flags)), st.sets(st.sampled_from(HOST.cpu_flags)))
def test_cpu_features_need_only_be_a_superset(then: set[str], now: set[str]) -> None:
    missing = then - now - {"constant_tsc", "smep"}
    found = check_host(host(cpu_flags=tuple(sorted(then))).record(), host(cpu_flags=tuple(sorted(now))).host)
    assert [m.code for m in found] == ([f"cpu-features-missing: {' '.join(sorted(missing))}"] if missing else [])


DOCUMENT = (Path(__file__).parents[4] / "docs/identity.md").read_text()


def test_every_code_is_documented_and_every_documented_code_exists() -> None:
    # The last two concern folders of this host, which checkpoint.cli and plugin.runtime.replica check.
    emitted = {code.partition(":")[0] for _, code in RELEVANT.values()}
    emitted |= {"format-too-old", "model-path-missing", "working-folder-missing"}
    documented = {
        word.partition(":")[0]
        for row in re.findall(r"^\| (`.*?`) \|", DOCUMENT, re.M)
        for word in re.findall(r"`([^`]+)`", row)
    }
    assert documented == emitted


def test_irrelevant_names_are_documented() -> None:
    for flags in IRRELEVANT_ARGUMENTS.values():
        assert [flag for flag in flags if f"`--{flag}`" not in DOCUMENT] == []
    assert [name for name in (*KEPT, *RENEWED) if f"`{name}`" not in DOCUMENT] == []
    assert [prefix for prefix in RENEWED_PREFIXES if f"`{prefix}*`" not in DOCUMENT] == []
    assert [suffix for suffix in RENEWED_SUFFIXES if f"`*{suffix}`" not in DOCUMENT] == []
