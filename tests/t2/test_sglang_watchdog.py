"""SGLang's own hang watchdog after a restore: a scheduler that hangs is killed and replaced, as after a cold start."""

import http.client
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from checkpoint.sandbox.process_tree import processes
from plugin.bench import client as measure
from plugin.runtime.config import state_home
from tests.kits.engine_kit import Rig, post

pytestmark = [pytest.mark.t2, pytest.mark.timeout(600)]

# Every process of the engine hangs for good, in its main thread alone, when it is told to.
HANG = "import signal, time\nsignal.signal(signal.SIGUSR2, lambda *_: time.sleep(1e6))\n"
BODY = {"prompt": "The quick brown fox", "max_tokens": 4000, "temperature": 0, "ignore_eos": True}


def schedulers(launcher):
    """The scheduler processes below a launcher, by their number on the host."""
    found = []
    for pid in processes(launcher):
        try:
            if b"scheduler" in Path(f"/proc/{pid}/comm").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def _about_signals(log):
    text = log.read_text(errors="replace")
    words = ("SIGQUIT", "sigquit", "kill_process_tree", "watchdog", "Exception", "quickthaw:")
    return "\n".join(line[:300] for line in text.splitlines() if any(word in line for word in words))


def test_a_scheduler_that_hangs_after_a_restore_is_replaced(tmp_path):
    for name in ("compile", "criu"):
        (state_home() / name).mkdir(mode=0o700, exist_ok=True)
        (tmp_path / name).symlink_to(state_home() / name)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HANG)
    rig = Rig("sglang", tmp_path)
    # Above the slowest step of a restore that records its working set.
    arguments = [*rig.preset.arguments, "--watchdog-timeout", "15"]
    more = {
        "arguments": arguments,
        "PYTHONPATH": f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}",
        # SGLang's main process would wait 65 s for dumps before it ends the others.
        "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
    }
    with rig.running(**more):
        pass
    with rig.running(**more) as (port, _, process, command):
        assert "restoring" in str(measure.status(port))

        def ask():
            try:
                post(port, "/v1/completions", {"model": str(rig.preset.model), **BODY})
            except (OSError, http.client.HTTPException):
                pass  # its scheduler hangs

        threading.Thread(target=ask, daemon=True).start()
        (scheduler,) = schedulers(process.pid)
        time.sleep(1.0)
        os.kill(scheduler, signal.SIGUSR2)
        limit = time.monotonic() + 90
        while Path(f"/proc/{scheduler}").exists():
            assert time.monotonic() < limit, _about_signals(command.log)
            time.sleep(0.2)
        status, answer = post(
            port, "/v1/completions", {"prompt": "The", "max_tokens": 1, "model": str(rig.preset.model)}
        )
        assert status == 200, answer
        assert json.loads(answer)["choices"]
        assert "watchdog timeout" in command.log.read_text(errors="replace")
