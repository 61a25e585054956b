"""What is in a real engine's snapshot and in its compile cache, and what a damaged one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from checkpoint.snapshot.manifest import dump
from checkpoint.store.archive import open_chunks
from checkpoint.store.cache_archive import pull_cache
from plugin.runtime.config import state_home
from tests.kits.engine_kit import NAME, REPO, Rig, answer_at_rest, own_lines, phases

pytestmark = [pytest.mark.t2, pytest.mark.timeout(1200)]


def weights_in(rig, snapshot):
    """Bytes of weights in a snapshot's images."""
    from checkpoint.inspect.contents import inspect

    found = inspect(rig.library.path(snapshot.name), weights=snapshot.weight_areas)
    return sum(process.kinds["weights"].bytes for process in found.processes if "weights" in process.kinds)


def packs(engine):
    """Whether the engine keeps its linear layers packed for oneDNN, whose bfloat16 needs AVX-512, instead of as parameters."""
    return engine == "vllm" and "avx512bw" in Path("/proc/cpuinfo").read_text().split()


def test_weights_are_told_apart_in_the_images(rig):
    weights = weights_in(rig, rig.library.load(NAME))
    # SmolLM2 in bf16 has 269 MB; the output layer, which is tied, has 57 MB of them and may be packed once more.
    assert 260e6 < weights < (400e6 if packs(rig.engine) else 300e6)


@pytest.mark.engine("sglang")  # benchmarks/ measure both; a cold start takes a minute
def test_the_image_without_the_kv_cache_is_smaller_by_at_least_its_size(rig):
    small = rig.library.load(NAME)
    with rig.running("--no-restore", "--no-trim", "--snapshot-name", "naive") as (_, answer, _, _):
        assert answer.text == rig.cold_text
    naive = rig.library.load("naive")
    rig.library.remove("naive")
    assert naive.kv_cache_bytes == 0
    assert naive.image_bytes - small.image_bytes >= small.kv_cache_bytes * 0.99


def test_a_thin_snapshot_carries_no_weights_and_answers_the_same(rig):
    """The weights come from the ring, byte by byte those that the engine held; the layout is found in the real model's file."""
    try:
        with rig.running("--weights", "excluded", "--snapshot-name", "thin") as (_, answer, _, command):
            assert answer.text == rig.cold_text
            assert "engine's own reload" not in command.log.read_text(), own_lines(command.log.read_text())
        full, thin = rig.library.load(NAME), rig.library.load("thin")
        assert thin.weights == "excluded"
        # Weights smaller than a megabyte, those that share a page with something else, and those that are packed stay. What
        # else is in an image differs by tens of megabytes from one start to the next.
        assert weights_in(rig, full) - weights_in(rig, thin) > (30e6 if packs(rig.engine) else 150e6)
        for _ in range(2):
            with rig.running("--weights", "excluded", "--snapshot-name", "thin", limit_s=120.0) as (
                port,
                answer,
                _,
                command,
            ):
                assert answer.text == rig.cold_text
                text = own_lines(command.log.read_text())
                assert "GB taken in" in text and "itself" not in text, text
                print(text)
                assert phases(port) == [["mounting", "restoring", "waking", "verifying"]]
    finally:
        if rig.library.has("thin"):
            rig.library.remove("thin")  # the tests after this one have the rig's own snapshot alone


def test_a_damaged_snapshot_is_refused_by_name_and_serves_nothing(rig):
    images = rig.library.path(NAME) / "images"
    largest = max(images.glob("pages-*.img"), key=lambda path: path.stat().st_size)
    with open(largest, "r+b") as file:
        file.seek(1 << 20)
        byte = file.read(1)
        file.seek(1 << 20)
        file.write(bytes([byte[0] ^ 255]))
    try:
        port, command = rig.command(NAME, words=("restore",))
        process = command.start()
        assert process.wait(120) == 1
        text = command.log.read_text()
        assert "file-digest-differs" in text and largest.name in text
    finally:
        with open(largest, "r+b") as file:
            file.seek(1 << 20)
            file.write(byte)
    rig.library.clear_failures(NAME)
    assert rig.watch.gone() == set()


@pytest.mark.engine("sglang")  # the same code for both engines, and a cold start of a minute
def test_a_wrong_canary_goes_the_cold_way_under_the_same_held_request(rig):
    manifest = rig.library.path(NAME) / "manifest.json"
    good = manifest.read_bytes()
    # A manifest that is whole and says something else: only the engine itself can tell.
    found = rig.library.load(NAME)
    wrong = [*found.canary.token_ids[:-1], found.canary.token_ids[-1] + 1]
    manifest.write_bytes(
        dump(msgspec.structs.replace(found, canary=msgspec.structs.replace(found.canary, token_ids=wrong)))
    )
    try:
        with rig.running("--no-snapshot") as (port, answer, _, command):
            assert answer.text and answer_at_rest(rig, port) == rig.cold_text
            assert phases(port)[0] == [
                "mounting",
                "restoring",
                "waking",
                "verifying",
                "failed",
                "mounting",
                "starting",
                "loading",
                "warming",
            ]
            assert "canary-differs" in command.log.read_text()
    finally:
        manifest.write_bytes(good)
        rig.library.clear_failures(NAME)


def test_the_snapshot_commands_tell_the_truth(rig):
    env = {**os.environ, "QUICKTHAW_HOME": str(rig.home)}

    def cli(*words):
        return subprocess.run(
            [sys.executable, "-m", "plugin", *words], env=env, cwd=REPO, capture_output=True, text=True, timeout=120
        )

    rows = json.loads(cli("snapshot", "ls", "--json").stdout)
    assert [row["name"] for row in rows] == [NAME]
    found = json.loads(cli("snapshot", "inspect", NAME, "--check", "--contents", "--json").stdout)
    assert found["mismatches"] == []
    assert found["contents"]["total"]["bytes"] == pytest.approx(found["image_bytes"], rel=0.02)
    assert cli("snapshot", "verify", NAME).returncode == 0


def test_the_compiled_code_was_kept_and_comes_back_elsewhere(rig, tmp_path):
    """What the cold start left in the snapshot store, beside the snapshot."""
    names = [p.name for p in (rig.home / "kept").rglob(f"compile-{rig.engine}-*")]
    if rig.engine == "sglang" and not names:
        return  # on a CPU with the native attention SGLang compiles nothing
    assert len(set(names)) == 1, names
    folder = tmp_path / "compile"
    assert pull_cache(names[0], open_chunks(str(rig.home / "kept")), folder) > 0
    have = {str(p.relative_to(folder)): p.stat() for p in folder.rglob("*") if p.is_file()}
    original = state_home() / "compile" / rig.engine
    for name, info in have.items():
        there = (original / name).stat()
        assert (info.st_size, info.st_mtime_ns) == (there.st_size, there.st_mtime_ns), name
    if rig.engine == "vllm":
        assert any("torch_aot_compile" in name for name in have), sorted(have)[:20]


@pytest.mark.engine("vllm")  # on a CPU with the native attention SGLang compiles nothing
def test_a_pulled_cache_under_another_home_spares_the_compilation(rig, tmp_path):
    """A host that has never compiled: vLLM loads its own AOT artefact instead of tracing and compiling the model."""
    other = Rig(rig.engine, tmp_path / "another home")
    other.arguments = rig.arguments  # the same launch, its tokenizer too
    (other.home / "criu").symlink_to(state_home() / "criu")
    store = ("--snapshot-store", str(rig.home / "kept"), "--no-restore", "--no-snapshot")
    with other.running(*store) as (_, answer, _, command):
        text = command.log.read_text(errors="replace")
        assert answer.text == rig.cold_text
    assert "files from" in text and "Directly load AOT compilation" in text
    assert "Compiling model again" not in text and "saved AOT compiled function" not in text
