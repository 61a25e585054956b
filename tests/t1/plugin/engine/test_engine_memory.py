"""What an engine's process releases before a dump: the allocator's free pages to the kernel, the CUDA caching allocators' to the
driver, GPU memory and pinned host memory.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.t1]
REPO = Path(__file__).parents[4]

# Blocks too small for their own mappings; every hundredth stays allocated, so that the heap cannot simply shrink.
CHILD = """
import ctypes, sys, types, weakref
sys.path.insert(0, sys.argv[1])
from plugin.engine import memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20
size = 64 << 10
blocks = [libc.malloc(size) for _ in range(1000)]
for block in blocks:
    ctypes.memset(block, 1, size)
for index, block in enumerate(blocks):
    if index % 100:
        libc.free(block)
emptied = []
cuda = types.SimpleNamespace(is_initialized=lambda: sys.argv[2] == "yes", empty_cache=lambda: emptied.append(1))
pinned = lambda: emptied.append(2)
versions = {
    "2.4": {"_C": types.SimpleNamespace()},
    "2.5": {"_C": types.SimpleNamespace(_host_emptyCache=pinned), "accelerator": types.SimpleNamespace()},
    "2.13": {"_C": types.SimpleNamespace(), "accelerator": types.SimpleNamespace(empty_host_cache=pinned)},
}
if sys.argv[2] != "none":
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda, **versions[sys.argv[3]])
class Loop: pass
loop = Loop(); loop.loop = loop
gone = weakref.ref(loop); del loop
before = resident()
memory.trim()
print(before - resident() > 40, gone() is None, *emptied)
"""


@pytest.mark.parametrize(
    ("cuda", "version", "emptied"),
    [
        ("none", "2.13", []),
        ("no", "2.13", []),
        ("yes", "2.4", ["1"]),
        ("yes", "2.5", ["1", "2"]),
        ("yes", "2.13", ["1", "2"]),
    ],
)
def test_free_memory_is_released_and_the_gpus_only_with_a_context(cuda, version, emptied):
    out = subprocess.run(
        [sys.executable, "-c", CHILD, str(REPO), cuda, version], capture_output=True, text=True, timeout=30, check=True
    )
    assert out.stdout.split() == ["True", "True", *emptied]
