"""Real engines in real containers: the snapshot, taken without a seccomp filter, is restored under the profile of deploy/container."""

import sys

import pytest

from plugin.bench import client as measure
from plugin.runtime.config import state_home
from tests.kits.container_kit import LEAST, Podman, skeleton
from tests.kits.engine_kit import COLD_LIMIT_S, REPO, Rig, own_lines, phases, share_state

pytestmark = [pytest.mark.t2, pytest.mark.timeout(600)]

PROFILE = REPO / "deploy" / "container" / "seccomp.json"
CONFINED = [*(word for word in LEAST if "seccomp" not in word), f"--security-opt=seccomp={PROFILE}"]


@pytest.fixture
def podman():
    made = Podman()
    yield made
    made.close()


# vLLM passed it, too (2026-11-30); it takes two minutes, and what the filter must allow is CRIU's and the page server's, not the engine's.
@pytest.mark.parametrize("engine", ["sglang"])
def test_an_engine_restores_under_the_seccomp_profile(podman, tmp_path, engine):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    share_state(home)
    rig, root = Rig(engine, home), skeleton(tmp_path / "root")
    shown = dict.fromkeys((state_home(), home), "") | dict.fromkeys((REPO, sys.base_prefix, "/usr"), ":ro")

    def run(options):
        """Start the engine in a container; return its answer, the phases of its start and our lines of the log."""
        port, command = rig.command()
        env = (f"--env={name}={value}" for name, value in command.environment.items() if "\n" not in value)
        volumes = (f"--volume={path}:{path}{mode}" for path, mode in shown.items())
        command.argv = podman.run_argv(
            "--network=host", f"--workdir={REPO}", *env, *volumes, *options, "--rootfs", root, *command.argv
        )
        process = command.start()
        try:
            answer = measure.waiting_client(port, str(rig.preset.model), command.began, COLD_LIMIT_S, process)
            first = phases(port)[0]
        except BaseException as error:
            error.add_note(command.log.read_text(errors="replace")[-6000:])
            raise
        finally:
            code = command.stop()
        assert code in (0, 143), command.log.read_text(errors="replace")[-3000:]
        return answer.text, first, own_lines(command.log.read_text(errors="replace"))

    text, first, ours = run(LEAST)
    assert "starting" in first and rig.library.names(), ours
    for _ in range(2):  # recording the working set, and with it
        restored, first, ours = run(CONFINED)
        assert restored == text and first[:2] == ["mounting", "restoring"], ours
        assert "failed" not in first and "new snapshots off: " in ours, ours
    assert rig.watch.gone() == set()
