"""For the tests on a real GPU: the reason to skip them, and a process that computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

GPU_PYTHON = os.environ.get("QUICKTHAW_GPU_PYTHON", sys.executable)
"""An interpreter with a CUDA build of torch (and, for the engine's test, the engine)."""

# One line in, one line out: `step` replays a captured graph and answers a digest of the result; `sleep` keeps the GPU busy for about
# 20 s and answers at once; `hold N` allocates N MiB.
_PROGRAM = """
import sys, torch
torch.manual_seed(7)
weights = torch.randn(4096, 4096, device="cuda", dtype=torch.float32)
x = torch.randn(64, 4096, device="cuda")
y = torch.empty_like(x)
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    for _ in range(3):
        y.copy_(torch.tanh(x @ weights))
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y.copy_(torch.tanh(x @ weights))
    x.add_(y, alpha=0.01)
held = []
print("ready", flush=True)
for line in sys.stdin:
    word, *rest = line.split()
    if word == "step":
        graph.replay()
        torch.cuda.synchronize()
        print(y.double().sum().item().hex(), flush=True)
    elif word == "sleep":
        for _ in range(20):
            torch.cuda._sleep(1_500_000_000)
        print("sleeping", flush=True)
    elif word == "hold":
        held.append(torch.empty(int(rest[0]) << 20, dtype=torch.uint8, device="cuda").fill_(1))
        torch.cuda.synchronize()
        print("held", flush=True)
"""


def check_torch_weights(python: str | Path, folder: Path, device: str) -> None:
    """Assert that weights lost on a device come back byte by byte, by an interpreter with torch and safetensors.

    Fused, padded, tied, transposed (as cutlass takes 8-bit weights), and one that is in no file.
    """
    program = Path(__file__).parents[2] / "programs" / "torch_weights.py"
    done = subprocess.run([python, program, folder, device], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["filled"] and not found["answer"]["failed"], found
    assert found["same"].keys() >= {"qkv", "down", "embed", "transposed", "computed"}, found
    assert all(found["same"].values()), found
    assert found["own"] == 77 * 4, "only what was computed is in the snapshot"


def skip_reason() -> str:
    """Return why no test can run on a GPU here, or ""."""
    if not Path("/dev/nvidiactl").exists():
        return "no NVIDIA device on this host (/dev/nvidiactl is missing)"
    try:
        import pynvml  # noqa: F401
        from cuda.bindings import driver  # noqa: F401
    except ImportError as error:
        return f"pip install 'quickthaw[cuda]' first: {error}"
    return ""


def torch_skip_reason() -> str:
    """Return why no PyTorch process can start on the GPU, or ""."""
    probe = [GPU_PYTHON, "-c", "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 3)"]
    code = subprocess.run(probe, capture_output=True, timeout=120, check=False).returncode
    return "" if code == 0 else f"{GPU_PYTHON} has no PyTorch that sees the GPU; set QUICKTHAW_GPU_PYTHON"


class Torch:
    """A PyTorch process on the GPU that answers line by line."""

    def __init__(self) -> None:
        argv = [GPU_PYTHON, "-c", _PROGRAM]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert self._line() == "ready"

    @property
    def pid(self) -> int:
        return self.process.pid

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        return self._line()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(60)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
