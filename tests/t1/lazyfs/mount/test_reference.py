"""The mount compared with the plain directory: random reads by several processes, and the libraries that read weights."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.api import import_directory
from lazyfs.mount import kernel
from plugin.runtime.config import state_home
from tests.kits.lazyfs.rig import LIMIT_S, ROOT, Rig, write_model

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]
FILES = ("model.safetensors", "config.json", "sub/tokenizer.json", "link", "empty")


@pytest.fixture(scope="module")
def imported(module_folder):
    model = write_model(module_folder / "model", [5 << 20, 1000, 4 << 20, 70_001])
    return module_folder, model, import_directory(model)


@pytest.fixture(
    scope="module",
    params=[
        "raw",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("raw-not-native", "pyfuse3")),
        "streaming",
    ],
)
def pair(request, imported):
    """Return a mount with an empty cache, and three readers."""
    folder, model, digest = imported
    rig = Rig(folder)
    options = {
        "raw": {"transport": "raw"},
        "raw-not-native": {"transport": "raw", "native": "off"},
        "pyfuse3": {"transport": "pyfuse3"},
        "streaming": {"cache_limit": 1, "memory_mb": 64},
    }[request.param]
    handle = rig.mount(
        digest,
        f"mnt-{request.param}",
        use_origin=False,
        cache_dir=folder / f"c-{request.param}",
        background_mb_s=0.0,
        **options,
    )
    readers = [rig.reader() for _ in range(3)]
    yield model, handle, readers
    rig.close()


def operation(sizes):
    files = st.sampled_from(FILES)
    places = st.integers(0, max(sizes) + (2 << 20))
    lengths = st.one_of(st.integers(0, 200), st.integers(0, 3 << 20))
    return st.tuples(st.integers(0, 2), st.sampled_from(["pread", "mmap", "reopen"]), files, places, lengths)


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_random_reads_equal_the_plain_directory(pair, data):
    check_operations(pair, data.draw(st.lists(operation([9 << 20]), min_size=1, max_size=12)))


def check_operations(pair, operations):
    model, handle, readers = pair
    is_open = set()
    plain = {name: (model / name).read_bytes() for name in FILES}
    for who, kind, name, place, length in operations:
        reader, want = readers[who], plain[name]
        if (who, name) not in is_open:
            assert reader.ask("open", name, str(handle.mountpoint / name)) is True
            is_open.add((who, name))
        if kind == "reopen":
            assert reader.ask("close", name) is True
            is_open.discard((who, name))
        elif kind == "pread" or not want:
            assert reader.ask("pread", name, place, length) == want[place : place + length].hex()
        else:
            place %= len(want)
            assert reader.ask("mmap", name, place, length) == want[place : place + length].hex()
    for who, name in is_open:
        assert readers[who].ask("close", name) is True


@pytest.mark.slow
def test_many_random_reads(pair):
    """QUICKTHAW_READS of them (1,000). The seed is printed, so that a failure can be repeated."""
    seed = int(os.environ.get("QUICKTHAW_SEED", "5"))
    print("seed", seed)
    rng = random.Random(seed)
    operations = [
        (
            rng.randrange(3),
            rng.choice(["pread", "pread", "mmap", "mmap", "reopen"]),
            rng.choice(FILES),
            rng.randrange(10 << 20),
            rng.choice([1, 4096, 100_000, 1 << 20]),
        )
        for _ in range(int(os.environ.get("QUICKTHAW_READS", "1000")))
    ]
    check_operations(pair, operations)


@pytest.mark.slow
def test_safetensors_reads_the_mount(imported, tmp_path):
    folder, _, _ = imported
    rig = Rig(tmp_path)
    try:
        script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from pathlib import Path
from safetensors import safe_open
from safetensors.numpy import save_file
model = Path({str(tmp_path / "st")!r})
if sys.argv[1] == "make":
    model.mkdir()
    rng = np.random.default_rng(1)
    save_file({{f"w{{i}}": rng.standard_normal((700, 900), dtype=np.float32) for i in range(6)}}, model / "m.safetensors")
else:
    with safe_open(model / "m.safetensors", "np") as a, safe_open(sys.argv[1] + "/m.safetensors", "np") as b:
        assert list(a.keys()) == list(b.keys()) and len(list(a.keys())) == 6
        for name in b.keys():
            assert np.array_equal(a.get_tensor(name), b.get_tensor(name))
            assert np.array_equal(a.get_slice(name)[3:9, 5], b.get_slice(name)[3:9, 5])
    print("equal")
"""
        subprocess.run([sys.executable, "-c", script, "make"], check=True, timeout=LIMIT_S)
        handle = rig.mount(import_directory(tmp_path / "st"), use_origin=False, cache_dir=folder / "c-st")
        done = subprocess.run(
            [sys.executable, "-c", script, str(handle.mountpoint)], capture_output=True, text=True, timeout=LIMIT_S
        )
        assert done.stdout == "equal\n", done.stderr
    finally:
        rig.close()


def torch_python() -> Path | None:
    """Return an interpreter with torch: an engine's, as `make setup` installs them (the project's own has none)."""
    found = [state_home() / "venvs" / engine / "bin" / "python" for engine in ("vllm", "sglang")]
    return next((path for path in found if path.exists()), None)


TORCH = torch_python()
TORCH_SCRIPT = """
import sys, torch
from safetensors.torch import save_file, safe_open
how, plain, where = sys.argv[1:]
if how == "make":
    torch.manual_seed(1)
    tensors = {f"w{i}": torch.randn(900, 700).to(torch.bfloat16) for i in range(8)}
    torch.save(tensors, plain + "/model.pt"); save_file(tensors, plain + "/model.safetensors")
else:
    a = torch.load(plain + "/model.pt", weights_only=True)
    b = torch.load(where + "/model.pt", mmap=True, weights_only=True)
    assert len(a) == 8 and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert where in open("/proc/self/maps").read()
    with safe_open(where + "/model.safetensors", "pt") as f:
        assert all(torch.equal(a[k], f.get_tensor(k)) for k in reversed(list(a)))
        assert torch.equal(f.get_slice("w3")[5:9, 7:], a["w3"][5:9, 7:])
    print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(TORCH is None, reason="needs an engine's interpreter with torch (make setup)")
@pytest.mark.parametrize("options", [{"native": "off"}, {"transport": "pyfuse3"}, {}], ids=["raw", "pyfuse3", "native"])
def test_torch_maps_the_mount(imported, tmp_path, options):
    """torch.load(mmap=True) and safetensors into torch tensors, equal to the plain directory's."""
    plain, rig = tmp_path / "torch", Rig(tmp_path)
    plain.mkdir()

    def run(how: str, where: Path) -> str:
        command = [str(TORCH), "-c", TORCH_SCRIPT, how, str(plain), str(where)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        run("make", plain)
        cold = rig.mount(import_directory(plain), use_origin=False, cache_dir=tmp_path / "c", **options)
        assert run("check", cold.mountpoint) == "equal\n"
        assert run("check", cold.mountpoint) == "equal\n"
        if not options:
            assert cold.status()["counters"]["native_opens"] > 0
    finally:
        rig.close()


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
@pytest.mark.slow
def test_fio_verifies(imported, tmp_path):
    """fio writes a file whose every block carries its own checksum, and verifies it through the mount."""
    rig = Rig(tmp_path)
    (tmp_path / "fio").mkdir()
    common = ["--name=v", "--filename=data", "--size=24m", "--bs=64k", "--verify=crc32c", "--output-format=terse"]

    def fio(folder: Path, *more: str) -> None:
        done = subprocess.run(["fio", *common, *more], cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0 and "verify:" not in done.stderr, done.stderr[-500:]

    try:
        fio(tmp_path / "fio", "--rw=write", "--do_verify=0")
        handle = rig.mount(import_directory(tmp_path / "fio"), use_origin=False, cache_dir=tmp_path / "c")
        for engine, pattern in (("psync", "randread"), ("mmap", "read")):
            more = ["--readonly", f"--rw={pattern}", f"--ioengine={engine}", "--verify_only=0", "--invalidate=0"]
            fio(handle.mountpoint, *more, "--numjobs=2")
    finally:
        rig.close()
