"""NVML is shut down inside the engine as often as it was initialised, so that no device file is open in a dump."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.t1]
REPO = Path(__file__).parents[4]

# Counts as NVML does: the device is open from the first initialisation to the last shutdown; an extra one is an error.
LIBRARY = r"""
#include <fcntl.h>
#include <unistd.h>
static int count, fd = -1;
int nvmlInit_v2(void) { if (!count++) fd = open("/dev/full", O_RDWR); return 0; }
int nvmlShutdown(void) { if (!count) return 1; if (!--count) { close(fd); fd = -1; } return 0; }
"""

CHILD = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from plugin.engine import memory
def open_devices():
    return sum(os.readlink(f"/proc/self/fd/{n}") == "/dev/full" for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}"))
memory.close_nvml()  # not loaded: nothing to do
if sys.argv[2] != "0":
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    for _ in range(int(sys.argv[2])):
        nvml.nvmlInit_v2()
before = open_devices()
memory.close_nvml()
after = open_devices()
if sys.argv[2] != "0":
    nvml.nvmlInit_v2()  # whoever asks again opens it again
print(before, after, open_devices())
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(LIBRARY)
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", folder / "nvml.c"], check=True, timeout=60
    )
    return folder


@pytest.mark.parametrize(("times", "expected"), [(0, "0 0 0"), (1, "1 0 1"), (6, "1 0 1")])
def test_every_initialisation_is_undone(library, times, expected):
    out = subprocess.run(
        [sys.executable, "-c", CHILD, str(REPO), str(times)],
        env={"LD_LIBRARY_PATH": str(library), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert out.stdout.strip() == expected
