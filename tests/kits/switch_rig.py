"""Several models of one host behind `quickthaw proxy --config`, each a snapshot of the engine double."""

import contextlib
import re
import subprocess
import sys
import time

from launchers.bare import free_port
from tests.kits.launch_rig import PROMPT, REPO, Started, call, model

NAMES = ("red", "blue")


def take_all(rig, names=NAMES, **env):
    """Take a snapshot of each name, all of different weights; return each one's answer."""
    answers = {}
    for seed, name in enumerate(names, 1):
        folder = model(rig.folder / f"model-{name}", seed)
        started = rig.start("--snapshot-name", name, "--grace", "0.1", model=folder, env=env)
        answers[name] = started.ask()
        started.wait_serving()
        assert started.stop() in (0, 137, 143), started.text()[-3000:]
    assert len({tuple(answer) for answer in answers.values()}) == len(names)
    return answers


class Switch(Started):
    """A running proxy of these models."""

    def ask_of(self, name, prompt=PROMPT):
        """Return the token ids of a completion by one model."""
        return self.complete(prompt, model=name)["choices"][0]["token_ids"]

    def pools(self):
        status, body = call(self.port, "GET", "/-/status")
        assert status == 200, body
        return {pool["name"]: pool for pool in body["pools"]}

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
def switching(rig, *options, names=NAMES, settings="max_awake: 1\nmin_awake: 0", more="", **env):
    """Run the proxy of all models; `settings` of the file, `more` for each model. Nothing of it may be left at the end."""
    config = rig.folder / "models.yaml"
    models = "".join(f"  {name}: {{snapshot: {name}{more}}}\n" for name in names)
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
    # The double's server, whose worker was killed, says so; lines of the log may come between its own.
    others = re.sub(r'^(\{"time"|quickthaw:).*\n', "", started.text(), flags=re.MULTILINE)
    blocks = [block[:3000] for block in others.split("Traceback")[1:]]
    assert [
        block for block in blocks if not re.search("engine_double|socketserver|processing of request from", block)
    ] == []
    assert "defect" not in started.text(), started.text()[-6000:]
    assert rig.watch.gone() == set()
