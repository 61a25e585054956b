"""The steps of `benchmarks/gpu.py run`, in the order in which a time-out costs least. Each writes down what it measured at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import launchers
from benchmarks.gpu_figures import ALONE, RESTORED, Figures, NotHere
from benchmarks.switching import act
from checkpoint.snapshot.library import Library
from plugin.bench import client as measure
from plugin.bench.cli import Bench
from plugin.runtime.home import state_home

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = "gpu"
ARGUMENTS = {
    "vllm": ("--gpu-memory-utilization", "0.5", "--max-model-len", "4096"),
    # What its carried kernels are (benchmarks/gpu_prepare.py): FlashAttention 3 for SGLang alone is larger than what may travel.
    "sglang": (
        *("--mem-fraction-static", "0.5", "--context-length", "4096"),
        *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
    ),
}
ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "PYTHONUNBUFFERED": "1"}
TOKENS = 16


@dataclass
class GpuBench(Bench):
    """Commands that end with this script however it ends, and that may run on the driver's double."""

    program: tuple[str, ...] = ("-m", "plugin.launch")

    def command(self, kind: str, port: int, run: str) -> measure.Command:
        """Return the command of a kind; the kernel sends it SIGTERM when this process dies."""
        found = super().command(kind, port, run)
        words = [*found.argv]
        if words[1:3] == ["-m", "plugin.launch"]:
            words[1:3] = self.program
        if shutil.which("setpriv"):
            words = ["setpriv", "--pdeathsig", "TERM", *words]
        return measure.Command(words, {**found.environment, **ENVIRONMENT}, found.log, found.cwd)


@dataclass
class Run:
    """One engine on one machine: where its interpreter and model are, and how often each way is measured."""

    engine: str
    bench: GpuBench
    figures: Figures
    work: Path
    restores: int = 4
    alones: int = 2
    wakes: int = 3
    on_double: bool = False

    @property
    def model(self) -> str:
        """Return the model's folder, which is its name in requests."""
        return str(self.bench.preset.model)

    def limit_s(self) -> float:
        """Return how long a start may take: what is left, less the time to write and stop."""
        return max(5.0, min(self.bench.limit_s, self.figures.left_s - 5.0))

    def start(
        self, kind: str, run: str, port: int, *more: str, **environment: str
    ) -> tuple[measure.Command, measure.FirstToken]:
        """Start a command and wait for the first answer; on a failure it is stopped, and the end of its log is in the error."""
        command = self.bench.command(kind, port, run)
        command = measure.Command(
            [*command.argv, *more], {**command.environment, **environment}, command.log, command.cwd
        )
        try:
            process = command.start()
            return command, measure.waiting_client(port, self.model, command.began, self.limit_s(), process)
        except measure.MeasureError as error:
            command.stop()
            raise measure.MeasureError(
                f"{error}; its log ends: {command.log.read_text(errors='replace')[-600:]}"
            ) from error
        except BaseException:
            command.stop()
            raise

    # The steps

    def probe(self) -> None:
        """Write down what this machine is."""
        facts: dict[str, Any] = {
            "engine": self.engine,
            "cores": len(os.sched_getaffinity(0)),
            "kernel": os.uname().release,
        }
        facts["memory GiB"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1)
        code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in ('torch', '{self.engine}')}}))"
        for name, argv in (
            (
                "gpu",
                [
                    "nvidia-smi",
                    "--query-gpu=name,driver_version,memory.total,pcie.link.gen.current",
                    "--format=csv,noheader",
                ],
            ),
            ("versions", [str(self.bench.preset.python), "-c", code]),
        ):
            try:
                facts[name] = subprocess.run(
                    argv, capture_output=True, text=True, timeout=60, check=True
                ).stdout.strip()
            except (OSError, subprocess.SubprocessError) as error:
                facts[name] = f"not known: {error}"
        self.figures.know(**facts)

    def rates(self) -> None:
        """Measure how fast the weights' ring fills, and how fast a device takes from it, beside a plain pinned copy (GB/s)."""
        argv = [str(self.bench.preset.python), "benchmarks/weight_ring.py", self.model, "--json", "--runs", "3"]
        if not self.on_double:
            argv += ["--device", "cuda"]
        python = sys.executable if self.on_double else argv[0]  # the double's interpreter has no quickthaw beside it
        done = subprocess.run(
            [python, *argv[1:]], cwd=ROOT, capture_output=True, text=True, timeout=self.limit_s(), check=False
        )
        if done.returncode:
            raise measure.MeasureError(f"weight_ring.py: {(done.stdout + done.stderr)[-600:]}")
        self.figures.know(**{f"ring {part}": rates for part, rates in json.loads(done.stdout.splitlines()[-1]).items()})

    def first(self) -> None:
        """Start cold behind quickthaw until the snapshot is taken, then measure wakes from standby in that replica."""
        port = measure.service_port()
        command, answer = self.start(RESTORED, "first", port)
        try:
            self.figures.add("first start through quickthaw", answer.first_s, answer.text)
            limit = time.monotonic() + self.limit_s()
            while (replica := self._replica(port))["phase"] != "serving":
                if time.monotonic() > limit or command.process is None or command.process.poll() is not None:
                    raise measure.MeasureError(f"no snapshot: the replica is {replica['phase']}")
                time.sleep(0.05)
            self._say_snapshot(command)
            self._wakes(port, answer.text, "from standby")
        finally:
            command.stop()

    def restored(self) -> None:
        """Measure restores; the first one, which saves a plan, in a row of its own."""
        for number in range(self.restores + 1):
            port = measure.service_port()
            command, answer = self.start(RESTORED, f"restored-{number}", port)
            try:
                replica = self._replica(port)
                if "restoring" not in [span["phase"] for span in replica["timeline"]]:
                    raise measure.MeasureError(
                        f"it started cold; its log ends: {command.log.read_text(errors='replace')[-600:]}"
                    )
                row = RESTORED if number else f"{RESTORED}, the first time"
                self.figures.add(row, answer.first_s, answer.text, _phases(replica))
                if number == self.restores:
                    self._wakes(port, answer.text, "from standby, after a restore")
            finally:
                command.stop()

    def alone(self) -> None:
        """Measure the engine alone; its first start fills its own compile caches and has a row of its own."""
        for number in range(self.alones + 1):
            command, answer = self.start("alone", f"alone-{number}", measure.free_port())
            command.stop()
            self.figures.add(ALONE if number else "alone, compile cache cold", answer.first_s, answer.text)

    def own_sleep(self) -> None:
        """Measure the engine's own sleep mode on the same model: from the call that wakes it to the first token."""
        port = measure.free_port()
        command, answer = self.start(
            "alone", "own-sleep", port, launchers.engine(self.engine).offload_flag, VLLM_SERVER_DEV_MODE="1"
        )
        try:
            for row, sleep, wake in self._ways_of_sleep(port):
                for _ in range(self.wakes):
                    self._wait_idle(port)
                    sleep()
                    began = time.monotonic()
                    wake()
                    woken = measure.stream_completion(port, self.model, began, TOKENS, self.limit_s())
                    self.figures.add(row, woken.first_s, woken.text)
            assert answer.text
        finally:
            command.stop()

    def own_snapshot(self) -> None:
        """Say whether this release of vLLM has its own `vllm snapshot`, and why it is not measured."""
        if self.engine != "vllm":
            raise NotHere("SGLang has no snapshots of its own")
        code = "import importlib.util as u, sys; sys.exit(0 if u.find_spec('vllm') and u.find_spec('vllm.snapshot') else 3)"
        if subprocess.run([str(self.bench.preset.python), "-c", code], timeout=120, check=False).returncode:
            raise NotHere(
                "this vLLM has no `vllm snapshot`; releases that have it need a newer PyTorch than this machine's"
            )
        raise NotHere("`vllm snapshot` takes models by their hub name only, and there is no network")

    # Parts of steps

    def _replica(self, port: int) -> dict[str, Any]:
        found: dict[str, Any] = measure.status(port)["pools"][0]["replicas"][0]
        return found

    def _say_snapshot(self, command: measure.Command) -> None:
        if SNAPSHOT not in Library(state_home()).names():
            raise measure.MeasureError(f"no snapshot; the log ends: {command.log.read_text(errors='replace')[-600:]}")
        snapshot = Library(state_home()).load(SNAPSHOT)
        about: dict[str, Any] = {"images GB": round(snapshot.image_bytes / 1e9, 3), "weights": snapshot.weights}
        about["processes with a context"] = snapshot.gpu.processes
        self.figures.know(snapshot=about | {span.phase: span.took_s for span in snapshot.timeline})

    def _wakes(self, port: int, expected: str, row: str) -> None:
        for _ in range(self.wakes):
            act(port, "default", "standby")
            woken = measure.stream_completion(port, self.model, time.monotonic(), TOKENS, self.limit_s())
            if woken.text != expected:
                raise measure.MeasureError(f"another answer out of standby: {woken.text!r}, not {expected!r}")
            self.figures.add(row, woken.first_s, woken.text, _phases(self._replica(port)))

    def _wait_idle(self, port: int) -> None:
        """Wait until SGLang counts itself idle, some time after its last answer: a release before ends its scheduler."""
        limit = time.monotonic() + 10.0
        while self.engine == "sglang":
            connection = HTTPConnection("127.0.0.1", port, timeout=10.0)
            connection.request("POST", "/flush_cache")
            status = connection.getresponse().status
            connection.close()
            if status == 200:
                return
            if time.monotonic() > limit:
                raise measure.MeasureError(f"SGLang is not idle 10 s after its answer: /flush_cache {status}")
            time.sleep(0.05)

    def _ways_of_sleep(self, port: int) -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
        """Return (row, sleep, wake) of the engine's own ways, as its documentation has them."""

        def post(path: str, body: dict[str, Any] | None = None) -> None:
            connection = HTTPConnection("127.0.0.1", port, timeout=self.limit_s())
            connection.request("POST", path, json.dumps(body or {}), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
            connection.close()
            if answer.status != 200:
                raise measure.MeasureError(f"{path}: {answer.status} {text[:300]}")

        def wake_from_2() -> None:
            post("/wake_up?tags=weights")
            post("/collective_rpc", {"method": "reload_weights"})
            post("/wake_up?tags=kv_cache")

        def resume_all() -> None:
            post("/resume_memory_occupation", {"tags": ["weights"]})
            post("/update_weights_from_disk", {"model_path": self.model})
            post("/resume_memory_occupation", {"tags": ["kv_cache"]})

        if self.engine == "vllm":
            return [
                ("vLLM's sleep level 1, awake", lambda: post("/sleep?level=1"), lambda: post("/wake_up")),
                ("vLLM's sleep level 2, awake", lambda: post("/sleep?level=2"), wake_from_2),
            ]
        release = "/release_memory_occupation"
        cache = {"tags": ["kv_cache"]}
        return [
            (
                "SGLang's release of the KV cache, awake",
                lambda: post(release, cache),
                lambda: post("/resume_memory_occupation", cache),
            ),
            ("SGLang's release of all, awake", lambda: post(release, {"tags": ["kv_cache", "weights"]}), resume_all),
        ]


def _phases(replica: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of each phase of a start, and of what was done beside them."""
    return {span["phase"]: span["took_s"] for span in replica["timeline"]} | {
        f"({one['name']})": one["took_s"] for one in replica.get("work", ())
    }


def steps(run: Run) -> None:
    """Run every step; the estimates are of an H200 and 7.4 billion parameters, in seconds."""
    scale = 0.02 if run.on_double else 1.0
    for name, do, estimate_s in (
        ("probe", run.probe, 0.0),
        ("first start, snapshot, standby", run.first, 120.0),
        ("restores", run.restored, 60.0),
        ("ring and pinned copy", run.rates, 30.0),
        ("the engine alone", run.alone, 100.0),
        ("the engine's own sleep mode", run.own_sleep, 60.0),
        ("the engine's own snapshot", run.own_snapshot, 0.0),
    ):
        run.figures.attempt(name, do, estimate_s * scale)
