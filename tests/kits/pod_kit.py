"""Pods of a rendered chart, run by `podman kube play`: what a kubelet would do with them, as far as podman does it.

Each pod has a network of its own, with loopback only, as tests reach it: the connection is made inside. `Pods` does what
podman leaves to the kubelet: seccomp profiles of a pod's `securityContext`, probes, `preStop`.
"""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time

import yaml

from checkpoint.sandbox.network import inside
from tests.kits.image_kit import ENGINES, Images, run
from tests.kits.launch_rig import REPO, Started
from tests.kits.tls_kit import Authority

PROFILES = REPO / "deploy" / "container"
# podman raises the limit on open files to its own default, which takes a privilege that this machine's root lacks.
_RUNTIME = f"""#!{sys.executable}
import json, os, sys
words = sys.argv[1:]
if "create" in words:
    file = os.path.join(words[words.index("--bundle") + 1], "config.json")
    with open(file) as read:
        config = json.load(read)
    config["process"].pop("rlimits", None)
    with open(file, "w") as write:
        json.dump(config, write)
os.execvp("runc", ["runc", *words])
"""
_KEEP_INIT = {"io.podman.annotations.init.container.type": "always"}
"""podman else removes an init container, with what it said."""
_PAUSE = "#include <signal.h>\n#include <unistd.h>\nint main(void) { signal(SIGTERM, _exit); for (;;) pause(); }\n"


class _InPod(http.client.HTTPConnection):
    """HTTP to a port in a pod's network."""

    def __init__(self, network, port, timeout):
        super().__init__("127.0.0.1", port, timeout=timeout)
        self.network = network

    def connect(self):
        with inside(self.network):
            self.sock = socket.socket()
        self.sock.settimeout(self.timeout)
        self.sock.connect((self.host, self.port))


class Pod(Started):
    """A pod that runs: `port` and `admin` connect to its ports."""

    def __init__(self, pods, name, spec, log):
        self.pods, self.name, self.spec = pods, name, spec
        (self.engine,) = spec["spec"]["containers"]
        self._network = None
        super().__init__(self.port_named("http"), self, log)

    def port_named(self, name):
        numbers = [port["containerPort"] for port in self.engine.get("ports", ()) if port["name"] == name]
        return lambda limit_s: _InPod(self.network, numbers[0], limit_s)

    @property
    def network(self):
        if self._network is None:
            limit = time.monotonic() + 30
            while not (pid := self.pid()):
                assert self.poll() is None and time.monotonic() < limit, self.text()
                time.sleep(0.05)
            self._network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        return self._network

    @property
    def container(self):
        return f"{self.name}-{self.engine['name']}"

    def _inspect(self, what):
        words = [*self.pods.words, "inspect", "--type=container", "-f", what, self.container]
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False).stdout.strip()

    def pid(self):
        """The PID here of the engine's container; 0 when it does not run."""
        return int(self._inspect("{{.State.Pid}}") or 0)

    def poll(self):
        """The exit code of the engine's container; None while it runs, or is not made yet."""
        state = self._inspect("{{.State.Status}} {{.State.ExitCode}}").split()
        return int(state[1]) if state and state[0] in ("exited", "stopped") else None

    def text(self):
        """What the pod's containers have said, those of its start first."""
        names = [one["name"] for one in (*self.spec["spec"].get("initContainers", ()), self.engine)]
        return "".join(self.pods.said(f"{self.name}-{name}") for name in names)

    def probe(self, name, limit_s=60.0):
        """Probe as a kubelet does until the probe succeeds; return the seconds that took."""
        probe = self.engine[name]
        began = time.monotonic()
        while True:
            connection = self.port_named(probe["httpGet"]["port"])(probe.get("timeoutSeconds", 1))
            with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
                connection.request("GET", probe["httpGet"]["path"])
                if connection.getresponse().status < 400:
                    return time.monotonic() - began
            assert self.poll() is None, self.text()[-3000:]
            assert time.monotonic() - began < limit_s, self.text()[-3000:]
            time.sleep(0.1)

    def status(self):
        connection = self.port_named("admin")(10)
        try:
            with contextlib.closing(connection):
                connection.request("GET", "/-/status")
                return json.loads(connection.getresponse().read())["pools"][0]["replicas"]
        except ConnectionRefusedError:
            assert self.poll() is None, self.text()[-3000:]
            return []

    def metrics(self):
        connection = self.port_named("admin")(10)
        with contextlib.closing(connection):
            connection.request("GET", "/-/metrics")
            return connection.getresponse().read().decode()

    def close(self):
        """Stop the pod as a kubelet does, and remove it; return the exit code of its engine's container."""
        grace = self.spec["spec"].get("terminationGracePeriodSeconds", 30)
        run(*self.pods.words, "stop", f"--time={min(grace, 30)}", self.container)
        code = self.poll()
        if self._network is not None:
            os.close(self._network)
        run(*self.pods.words, "pod", "rm", "--force", "--time=1", self.name)
        return code


class Pods(Images):
    """podman with the image of the engine's double, and pods."""

    def __init__(self, double):
        super().__init__(double)
        runtime = self._short / "runc"
        runtime.write_text(_RUNTIME)
        runtime.chmod(0o755)
        config = self._short / "containers.conf"
        config.write_text('[engine]\ninfra_image = "localhost/pause:1"\ninfra_command = "/pause"\n')
        self.environment = {**os.environ, "CONTAINERS_CONF": str(config)}
        self.words = [str(word) for word in self._argv if not str(word).startswith("--runtime=")]
        self.words.append(f"--runtime={runtime}")
        pause = self._short / "pause-image"
        pause.mkdir()
        (pause / "pause.c").write_text(_PAUSE)
        run("gcc", "-static", "-Os", "-o", pause / "pause", pause / "pause.c")
        run("tar", "-C", pause, "-cf", self._short / "pause.tar", "pause")
        run(*self._argv, "import", "--change", 'ENTRYPOINT ["/pause"]', self._short / "pause.tar", "localhost/pause:1")

    def _account(self):
        """The folder of a service account, whose API answers nothing."""
        folder = self._short / "account"
        if not folder.exists():
            authority = Authority(folder)
            authority.file.rename(folder / "ca.crt")
            (folder / "token").write_text("token")
            (folder / "namespace").write_text("models")
        return folder

    def _kubelet(self, name, pod):
        """The pod as podman takes it: with the base image's own files, and without what podman would do otherwise."""
        made = json.loads(json.dumps(pod))
        made |= {"apiVersion": "v1", "kind": "Pod"}
        made["metadata"] = {"name": name, "labels": pod["metadata"]["labels"], "annotations": dict(_KEEP_INIT)}
        spec = made["spec"]
        spec["restartPolicy"] = "Never"
        shown = dict.fromkeys(("/usr", sys.base_prefix))
        paths = {path: path for path in shown if path == "/usr" or not path.startswith("/usr/")}
        paths[str(ENGINES)] = str(self._engines)
        spec.setdefault("volumes", [])
        for number, source in enumerate(paths.values()):
            spec["volumes"].append({"name": f"base-{number}", "hostPath": {"path": source, "type": "Directory"}})
        if spec.get("automountServiceAccountToken", True):
            spec["volumes"].append({"name": "account", "hostPath": {"path": str(self._account()), "type": "Directory"}})
            place = "/var/run/secrets/kubernetes.io/serviceaccount"
            for container in spec["containers"]:
                container["volumeMounts"].append({"name": "account", "mountPath": place, "readOnly": True})
                address = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"}
                container["env"] += [{"name": name, "value": value} for name, value in address.items()]
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            for number, target in enumerate(paths):
                container.setdefault("volumeMounts", []).append(
                    {"name": f"base-{number}", "mountPath": target, "readOnly": True}
                )
            for part in ("startupProbe", "readinessProbe", "livenessProbe", "lifecycle", "resources", "ports"):
                container.pop(part, None)
            profile = container["securityContext"].pop("seccompProfile")
            said = {"Unconfined": "unconfined", "RuntimeDefault": "runtime/default"}.get(profile["type"])
            if said is None:
                # deploy/container/seccomp.json is copied under this name
                assert profile["localhostProfile"] == "quickthaw.json"
                said = "localhost/seccomp.json"
            made["metadata"]["annotations"][f"container.seccomp.security.alpha.kubernetes.io/{container['name']}"] = (
                said
            )
        return made

    def play(self, name, pod, *more):
        """Start a pod of a rendered Deployment or Job; return it. Init containers have ended by then. `more`: ConfigMaps."""
        file = self._short / f"{name}.yaml"
        file.write_text(yaml.safe_dump_all([self._kubelet(name, pod), *more]))
        self._kube_play(file)
        return Pod(self, name, pod, None)

    def _kube_play(self, file):
        words = ("kube", "play", "--network=none", f"--seccomp-profile-root={PROFILES}", file)
        run(*self.words, *words, env=self.environment)

    def finish(self, name, pod, limit_s=120.0):
        """Run a pod of a rendered Job to its end, assert that it ended well, and return what it said."""
        file = self._short / f"{name}.yaml"
        file.write_text(yaml.safe_dump(self._kubelet(name, pod)))
        self._kube_play(file)
        (main,) = pod["spec"]["containers"]
        container = f"{name}-{main['name']}"
        try:
            code = run(*self.words, "wait", container, limit_s=limit_s).strip()
            said = "".join(self.said(f"{name}-{one['name']}") for one in (*pod["spec"].get("initContainers", ()), main))
            assert code == "0", (code, said[-3000:])
            return said
        finally:
            run(*self.words, "pod", "rm", "--force", "--time=1", name)

    def said(self, container):
        done = subprocess.run([*self.words, "logs", container], capture_output=True, text=True, timeout=30, check=False)
        return done.stdout + done.stderr
