"""Images built by deploy/container/Containerfile from a base that has nothing of its own: its /usr is this host's, in builds and in containers.

The base's engines are the doubles. `Images` builds them; `wheels` makes what `make image` finds in dist/.
"""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

from tests.kits.apt_kit import packages_of_criu
from tests.kits.container_kit import Podman, skeleton
from tests.kits.launch_rig import REPO, Started, stopped_at_the_end

IMAGE = "localhost/engine"
ENGINES = Path("/opt/engines")
"""Where the doubles' environment lies in a container."""
BASE_PATH = f"{ENGINES}/bin:{sys.base_prefix}/bin:/usr/bin:/bin"


_SCRIPT = f"""#!{ENGINES}/bin/python
import runpy, sys
if sys.argv[1:2] != ["serve"]:
    sys.exit("the engine's own script: " + " ".join(sys.argv[1:]))
del sys.argv[1]
runpy.run_module("MODULE", run_name="__main__", alter_sys=True)
"""
"""Of the doubles' `vllm` and `sglang`."""
_MODULES = {"vllm": "vllm.entrypoints.openai.api_server", "sglang": "sglang.launch_server"}


def run(*words, limit_s=200, **more):
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=limit_s, check=False, **more
    )
    assert done.returncode == 0, (words, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout


def wheels(folder):
    """Fill `folder`/dist with both wheels and all that they need; return `folder`, which is then a build's context."""
    packages_of_criu(folder / "debs")
    run(sys.executable, REPO / "setup" / "wheels.py", folder / "dist", "--from", folder / "debs")
    (wheel,) = (folder / "dist").glob("quickthaw-*.whl")
    needed = f"quickthaw[kubernetes,keda] @ file://{wheel}"
    run(sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "-d", folder / "dist", needed)
    shutil.rmtree(folder / "debs")
    shutil.copytree(REPO / "deploy", folder / "deploy")
    return folder


class Images(Podman):
    """podman with images in a folder of its own; `double` is the interpreter of the doubles' environment."""

    def __init__(self, double):
        super().__init__()
        self._engines = self._short / "engines"
        shutil.copytree(Path(double).parents[1], self._engines, symlinks=True)
        (self._engines / "bin" / "python3").symlink_to("python")
        for name, module in _MODULES.items():
            (self._engines / "bin" / name).write_text(_SCRIPT.replace("MODULE", module))
            (self._engines / "bin" / name).chmod(0o755)
        root = skeleton(self._short / "base")
        (root / "opt" / "engines").mkdir(parents=True)
        (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\nserver:x:2000:2000::/tmp:/bin/sh\n")
        run("tar", "-C", root, "-cf", self._short / "base.tar", ".")
        change = ("--change", f"ENV PATH={BASE_PATH}")
        run(*self._argv, "import", *change, self._short / "base.tar", "localhost/base")

    @property
    def volumes(self):
        """What stands for the base image's own files."""
        shown = dict.fromkeys(("/usr", sys.base_prefix))
        return [
            *(f"--volume={path}:{path}:ro" for path in shown if path == "/usr" or not path.startswith("/usr/")),
            f"--volume={self._engines}:{ENGINES}:ro",
        ]

    def build(self, context, **arguments):
        """Build IMAGE from the base; `arguments` are those of the Containerfile."""
        given = {"BASE": "localhost/base", "PIP_NO_INDEX": "1", **arguments}
        words = [f"--build-arg={name}={value}" for name, value in given.items()]
        # without layers: vfs copies the whole image for each
        limits = ("--layers=false", "--ulimit=nofile=4096:4096", "--ulimit=nproc=4000:4000", "--network=none")
        file = context / "deploy" / "container" / "Containerfile"
        run(*self._argv, "build", *limits, *self.volumes, *words, "-t", IMAGE, "-f", file, context)

    def output(self, *words, options=(), code=0, limit_s=60):
        """Run a container to its end; return what it printed, both streams together."""
        return self.finished(self.run_argv("--network=none", *self.volumes, *options, IMAGE, *words), code, limit_s)

    @staticmethod
    def finished(argv, code=0, limit_s=60):
        """Run a command to its end, assert its exit code, and return what it printed."""
        done = subprocess.run(
            argv,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s, check=False,
        )  # fmt: skip
        assert done.returncode == code, (done.returncode, done.stdout[-3000:])
        return done.stdout

    @contextlib.contextmanager
    def serving(self, rig, *words, options=(), port, codes=(0, 143), watched=True):
        """Run a container that serves at `port` of this host, with the rig's state folder and model; at the end stop it, and assert that
        nothing of it is left (`watched`).
        """
        volumes = (f"--volume={rig.home}:/var/lib/quickthaw", f"--volume={rig.model}:{rig.model}:ro")
        env = {
            **rig.watch.environment,
            "QUICKTHAW_SHARED_STEP": "1",
            "SGLANG_USE_CPU_ENGINE": "1",
            "QUICKTHAW_REHEARSE": "0",
        }
        given = ("--network=host", *volumes, *(f"--env={name}={value}" for name, value in env.items()), *options)
        log = rig.folder / f"log-{port}"
        with log.open("ab") as out:
            process = subprocess.Popen(
                self.run_argv(*given, *self.volumes, IMAGE, *words), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        with stopped_at_the_end(Started(port, process, log), codes) as started:
            yield started
        assert not watched or rig.watch.gone() == set()
