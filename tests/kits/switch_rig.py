"""Two models of one host behind `quickthaw proxy --config`, each a snapshot of the engine double."""

import contextlib
import subprocess
import sys
import time

from launchers.bare import free_port
from tests.kits.launch_rig import PROMPT, REPO, Started, call, model

NAMES = ("red", "blue")


def take_both(rig, **env):
    """Take the snapshots `red` and `blue`, of different weights; return each one's answer."""
    answers = {}
    for seed, name in enumerate(NAMES, 1):
        folder = model(rig.folder / f"model-{name}", seed)
        started = rig.start("--snapshot-name", name, "--grace", "0.1", model=folder, env=env)
        answers[name] = started.ask()
        started.wait_serving()
        assert started.stop() in (0, 137, 143), started.text()[-3000:]
    assert answers["red"] != answers["blue"]
    return answers


class Switch(Started):
    """A running proxy of both models."""

    def ask_of(self, name, prompt=PROMPT):
        """Return the token ids of a completion by one model."""
        return self.complete(prompt, model=name)["choices"][0]["token_ids"]

    def pools(self):
        return {pool["name"]: pool for pool in call(self.port, "GET", "/-/status")[1]["pools"]}

    def phase(self, name):
        return self.pools()[name]["replicas"][0]["phase"]

    def wait_phase(self, name, phase, limit_s=30.0):
        limit = time.monotonic() + limit_s
        while self.phase(name) != phase:
            assert time.monotonic() < limit, (self.phase(name), self.text()[-3000:])
            time.sleep(0.02)

    def act(self, name, action):
        return call(self.port, "POST", f"/-/models/{name}/{action}")


@contextlib.contextmanager
def switching(rig, *options, settings="max_awake: 1\nmin_awake: 0", more="", **env):
    """Run the proxy of both models; `settings` of the file, `more` for each model. Nothing of it may be left at the end."""
    config = rig.folder / "models.yaml"
    models = "".join(f"  {name}: {{snapshot: {name}{more}}}\n" for name in NAMES)
    config.write_text(f"{settings}\nmodels:\n{models}")
    port, log = free_port(), rig.folder / "proxy.log"
    argv = [sys.executable, "-m", "plugin", "proxy", "--config", str(config), "--listen", f"127.0.0.1:{port}"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*argv, *options], env=rig.env(**env), cwd=REPO, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    started = Switch(port, process, log)
    try:
        started.wait_for("listening on")
        yield started
    except BaseException as error:
        error.add_note(f"the proxy ended with {process.poll()}, and said:\n{started.text()[-6000:]}")
        raise
    finally:
        started.stop()
    assert "Traceback" not in started.text(), started.text()[-6000:]
    assert rig.watch.gone() == set()
