"""A first start of vLLM begins with what vLLM alone has compiled here."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil

import pytest

from launchers import engine
from plugin.engine.own_compile_cache import COMPILED, Factors, take_over_model_infos

pytestmark = pytest.mark.t0
PLACE = "torch_compile_cache/torch_aot_compile"


def key(*factors):
    """The key as vLLM computes it (vllm/compilation/decorators.py)."""
    return hashlib.sha256(str([*factors]).encode()).hexdigest()


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """The usual cache of vLLM, with one artefact under the key of `own` and `model`; and quickthaw's, which is empty."""
    usual, ours = tmp_path / "user" / "vllm", tmp_path / "ours"
    artefact = usual / PLACE / key("own", "model")
    for name in (f"{COMPILED}/kernel.so", "rank_0_0/model"):
        (artefact / name).parent.mkdir(parents=True)
        (artefact / name).write_text(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(ours))
    monkeypatch.setenv("QUICKTHAW_TAKE_OVER_CACHE", "1")
    return usual, ours / PLACE


def add_model(extra=()):
    factors = Factors(["own"], extra)
    factors.append("model")
    assert str(factors) == str(["own", *extra, "model"]), "vLLM hashes this text"


def files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_the_whole_artefact_is_taken_over_under_the_same_key(caches):
    usual, ours = caches
    add_model()
    assert files(ours) == [f"{key('own', 'model')}/{name}" for name in (f"{COMPILED}/kernel.so", "rank_0_0/model")]
    (ours / key("own", "model") / "rank_0_0/model").write_text("compiled anew")
    add_model()
    assert (ours / key("own", "model") / "rank_0_0/model").read_text() == "compiled anew", "what is there stays"


def test_an_artefact_for_an_unknown_processor_stays_behind(caches):
    _, ours = caches
    add_model(("sse2", 2))
    assert files(ours) == [f"{key('own', 'sse2', 2, 'model')}/{COMPILED}/kernel.so"]


def test_without_an_artefact_nothing_is_made(caches):
    usual, ours = caches
    Factors(["other"]).append("model")
    assert not ours.exists()
    assert files(usual) == [
        f"{PLACE}/{key('own', 'model')}/{name}" for name in (f"{COMPILED}/kernel.so", "rank_0_0/model")
    ]


def test_a_copy_that_fails_leaves_nothing_and_is_reported(caches, monkeypatch, capfd):
    _, ours = caches

    def full(source, target, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    add_model()
    assert list(ours.iterdir()) == []
    assert "No space left" in capfd.readouterr().err


def test_what_a_killed_copy_left_is_removed_and_what_is_being_copied_stays(caches):
    usual, ours = caches
    (usual / "modelinfos").mkdir()
    (usual / "modelinfos/llama.json").write_text("{}")
    for folder in (ours, ours.parents[1] / "modelinfos"):
        for name in ("killed", "living"):
            (folder / f".quickthaw-copy-{name}").mkdir(parents=True)
            (folder / f".quickthaw-copy-{name}" / "half").write_text("")
    living = [
        os.open(folder / ".quickthaw-copy-living", os.O_RDONLY) for folder in (ours, ours.parents[1] / "modelinfos")
    ]
    for fd in living:
        fcntl.flock(fd, fcntl.LOCK_EX)
    add_model()
    take_over_model_infos()
    for fd in living:
        os.close(fd)
    assert sorted(entry.name for entry in ours.iterdir()) == [".quickthaw-copy-living", key("own", "model")]
    assert files(ours.parents[1] / "modelinfos") == [".quickthaw-copy-living/half", "llama.json"]


def test_another_rank_may_be_first(caches, monkeypatch, capfd):
    _, ours = caches

    rename = os.rename

    def other_rank(new, target):
        shutil.copytree(new, target)
        rename(new, target)

    monkeypatch.setattr(os, "rename", other_rank)
    add_model()
    assert [entry.name for entry in ours.iterdir()] == [key("own", "model")]
    assert capfd.readouterr().err == ""


def test_what_is_known_of_model_classes_is_taken_over_once(caches):
    usual, ours = caches
    (usual / "modelinfos").mkdir()
    (usual / "modelinfos/llama.json").write_text("{}")
    (usual / "modelinfos/.half.tmp").write_text("")
    known = ours.parents[1] / "modelinfos"
    for content in ("{}", "newer"):
        take_over_model_infos()
        assert files(known) == ["llama.json"] and (known / "llama.json").read_text() == content
        (known / "llama.json").write_text("newer")


def test_where_vllm_never_ran_alone_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "ours"))
    monkeypatch.setenv("QUICKTHAW_TAKE_OVER_CACHE", "1")
    take_over_model_infos()
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_reported(caches, monkeypatch, capfd):
    usual, ours = caches
    (usual / "modelinfos").mkdir()
    (usual / "modelinfos/llama.json").write_text("{}")
    ours.parents[1].write_text("a file in the folder's place")
    take_over_model_infos()
    assert "not used: [Errno 20]" in capfd.readouterr().err


def test_a_full_disk_leaves_no_half_file(caches, monkeypatch, capfd):
    usual, ours = caches
    (usual / "modelinfos").mkdir()
    (usual / "modelinfos/llama.json").write_text("{}")

    def full(source, target):
        with open(target, "w") as file:
            file.write("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    take_over_model_infos()
    assert files(ours.parents[1]) == []
    assert "quickthaw: own-cache-unused: " in capfd.readouterr().err


def test_a_folder_that_the_user_chose_stays_as_it_is(caches, monkeypatch):
    usual, ours = caches
    (usual / "modelinfos").mkdir()
    (usual / "modelinfos/llama.json").write_text("{}")
    monkeypatch.delenv("QUICKTHAW_TAKE_OVER_CACHE")
    take_over_model_infos()
    add_model()
    assert not ours.parents[1].exists()
    command = engine("vllm").parse(["--model", "m"], {})
    for user, taken in (({}, True), ({"VLLM_CACHE_ROOT": "/mine"}, False)):
        env = engine("vllm").environment(user, command, sandboxed=True, site="", cache="/cache")
        assert ("QUICKTHAW_TAKE_OVER_CACHE" in env) is taken
