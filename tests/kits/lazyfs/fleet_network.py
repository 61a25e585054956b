"""A fleet of hosts in network namespaces, and a store behind a link that `tc` makes slow.

    python -m tests.kits.lazyfs.fleet_network run --hosts 8 --megabytes 96 --store-mb-s 20 [--bad] [--patient]

It loads a model on one host alone and then on all of them at once, compares every byte, and prints one JSON line. `--bad`: of the
hosts' peers one lies, one stalls, and one is killed within the load; their hosts load the model, too. `--patient`: a pause of a
machine on which other work runs is not taken for a peer's silence.

All of it (namespaces, links, processes, files) lives in one PID, mount and network namespace, whose first process the kernel
kills with the caller: nothing is left after an end of any kind.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.importer import import_tree
from lazyfs.content.manifest import Manifest
from lazyfs.stores.local import LocalStore
from tests.kits.lazyfs.fleet import BadPeer, SlowStore
from tests.kits.lazyfs.models import make_model

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "fleet"
PORT, STORE_PORT = 9470, 8080
LIMIT_S = 300
# Hides the host's /run, with the names of its namespaces, in the mount namespace of the run.
RUN = Path("/run")


def command(words: list[str]) -> list[str]:
    """Return the command that runs one of this module's commands in namespaces of its own, which end with the caller."""
    apart = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--fork", "--kill-child", "--mount"]
    return [*apart, "--mount-proc", sys.executable, "-m", __name__.replace("__main__", _NAME), "inside", *words]


_NAME = "tests.kits.lazyfs.fleet_network"
_PATIENT = "from lazyfs.peers import client; client.GRACE_S = 3.0; from plugin.__main__ import main; main()"


def run(hosts: int, megabytes: int, store_mb_s: float, *, bad: bool, patient: bool = False) -> dict[str, float]:
    """Load a model on one host, then on all; return seconds, copies that left the store, wrong bytes. Needs root."""
    words = ["--hosts", str(hosts), "--megabytes", str(megabytes), "--store-mb-s", str(store_mb_s)]
    words += ["--bad"] * bad + ["--patient"] * patient
    done = subprocess.run(command(words), cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def address(host: int) -> str:
    """Return the address of a host; the store is host 0."""
    return f"10.77.0.{host + 1}"


class Network:
    """Namespaces `h0` (the store), `h1`, … on one bridge. `store_mb_s`: what the store's link carries."""

    def __init__(self, hosts: int, store_mb_s: float) -> None:
        for line in ("netns add sw", "-n sw link add br0 type bridge", "-n sw link set br0 up"):
            ip(line)
        for host in range(hosts + 1):
            ip(f"netns add h{host}")
            ip(f"-n h{host} link add eth0 type veth peer name h{host} netns sw")
            ip(f"-n h{host} addr add {address(host)}/24 dev eth0")
            for line in (f"-n sw link set h{host} master br0 up", f"-n h{host} link set eth0 up"):
                ip(line)
            ip(f"-n h{host} link set lo up")
        ip(f"netns exec h0 tc qdisc add dev eth0 root tbf rate {store_mb_s * 8:g}mbit burst 512kb latency 100ms")

    @staticmethod
    def sent_by_store() -> int:
        """Return the bytes that have left the store's link, with the headers of all protocols."""
        links = json.loads(ip("-n h0 -s -j link show eth0"))
        return int(links[0]["stats64"]["tx"]["bytes"])


def ip(line: str) -> str:
    """Run iproute2."""
    return subprocess.run(["ip", *line.split()], check=True, timeout=30, stdout=subprocess.PIPE, text=True).stdout


def start(host: int, words: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start Python in a host's network, not in a mount namespace of its own as `ip netns exec` would."""
    enter = ["nsenter", f"--net={RUN}/netns/h{host}", sys.executable, *words]
    return subprocess.Popen(enter, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and "ready" in process.stdout.readline()


class Fleet:
    """Hosts in their networks, and what each has loaded."""

    def __init__(self, folder: Path, hosts: int, megabytes: int, store_mb_s: float, *, patient: bool) -> None:
        self.folder = folder
        self.quickthaw = ["-c", _PATIENT] if patient else ["-m", "plugin"]
        self.network = Network(hosts, store_mb_s)
        make_model(folder / "model", megabytes=megabytes)
        self.digest, self.manifest = import_tree(folder / "model", ChunkStore(LocalStore(folder / "store"), zstd=None))
        self.unique = sum({c.digest: c.length for f in self.manifest.files for c in f.chunks}.values())
        self.url = f"http://{address(0)}:{STORE_PORT}"
        ready(start(0, ["-m", _NAME, "store", str(folder / "store")]))

    def load(self, hosts: range, name: str, *, does: dict[int, str], dies_after_s: float = 0.0) -> tuple[float, float]:
        """Load the model on these hosts at once; return seconds until the last has it, and copies that left the store.

        `does`: what each host's peer does: `serve`, `die` within the load, or as a `BadPeer`; a host that is not named has none.
        """
        peers = ",".join(f"{address(host)}:{PORT}" for host in does)
        servers: dict[int, subprocess.Popen[str]] = {}
        common = {"QUICKTHAW_PEERS": peers, "QUICKTHAW_PEER_TOKEN": TOKEN, "QUICKTHAW_CACHE_LIMIT": "none"}
        for host, what in does.items():
            words = ["-m", _NAME, "bad", "--does", what, "--host", str(host)]
            if what in ("serve", "die"):
                words = [*self.quickthaw, "peer", "--listen", f"{address(host)}:{PORT}", "--store", self.url]
            servers[host] = start(host, words, QUICKTHAW_HOME=str(self.folder / name / f"h{host}"), **common)
        for server in servers.values():
            ready(server)
        killer = threading.Timer(dies_after_s, lambda: [servers[h].kill() for h, what in does.items() if what == "die"])
        sent, began = self.network.sent_by_store(), time.monotonic()
        loads = [
            start(
                host, [*self.quickthaw, "cache", "warm", self.digest, "--store", self.url],
                QUICKTHAW_HOME=str(self.folder / name / f"h{host}"), **common,
            )
            for host in hosts
        ]  # fmt: skip
        killer.start()
        codes = [one.wait(LIMIT_S) for one in loads]
        took, copies = time.monotonic() - began, (self.network.sent_by_store() - sent) / self.unique
        killer.cancel()
        for server in servers.values():
            server.terminate()
            server.wait(30)
        assert not any(codes), f"loads ended with {codes}"
        return took, copies

    def wrong_bytes(self, hosts: range, name: str) -> int:
        """Return how many bytes of the hosts' caches differ from the model's, or are not there."""
        folders = [self.folder / name / f"h{host}" / "cache" / "images" for host in hosts]
        return sum(differing(folder, self.folder / "model", self.manifest) for folder in folders)


def differing(images: Path, model: Path, manifest: Manifest) -> int:
    """Return how many bytes of the model's files are not as they should be in a cache."""
    wrong = 0
    for file in manifest.files:
        right = (model / file.path).read_bytes()
        data = images / file.digest[:2] / file.digest / "data"
        found = data.read_bytes() if data.exists() else b""
        if found != right:
            wrong += abs(len(right) - len(found)) + sum(a != b for a, b in zip(right, found, strict=False))
    return wrong


def inside(hosts: int, megabytes: int, store_mb_s: float, *, bad: bool, patient: bool) -> dict[str, float]:
    """Be the first process of the namespaces."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(RUN)], check=True, timeout=30)
    (RUN / "netns").mkdir()
    folder = RUN / "fleet"
    folder.mkdir()
    fleet = Fleet(folder, hosts, megabytes, store_mb_s, patient=patient)
    everybody = range(1, hosts + 1)
    alone, alone_copies = fleet.load(range(1, 2), "alone", does={})
    does = dict.fromkeys(everybody, "serve")
    if bad:
        does |= {hosts - 2: "die", hosts - 1: "lie", hosts: "stall"}
    together, copies = fleet.load(everybody, "fleet", does=does, dies_after_s=alone / 2)
    return {
        "hosts": hosts, "megabytes": round(fleet.unique / 1e6), "one_s": round(alone, 2), "last_s": round(together, 2),
        "ratio": round(together / alone, 2), "copies_of_one": round(alone_copies, 3), "copies": round(copies, 3),
        "wrong_bytes": fleet.wrong_bytes(range(1, 2), "alone") + fleet.wrong_bytes(everybody, "fleet"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("run", "inside"):
        one = commands.add_parser(name)
        one.add_argument("--hosts", type=int, default=8)
        one.add_argument("--megabytes", type=int, default=96)
        one.add_argument("--store-mb-s", type=float, default=20.0)
        one.add_argument("--bad", action="store_true")
        one.add_argument("--patient", action="store_true")
    commands.add_parser("store").add_argument("folder", type=Path)
    bad = commands.add_parser("bad")
    bad.add_argument("--does", required=True)
    bad.add_argument("--host", type=int, required=True)
    given = vars(parser.parse_args())
    what = given.pop("what")
    if what in ("run", "inside"):
        print(json.dumps((run if what == "run" else inside)(**given)))
        return
    if what == "store":
        SlowStore(given["folder"], rate=1e12, address=(address(0), STORE_PORT))
    else:
        BadPeer(given["does"], address(given["host"]), PORT)
    print("ready", flush=True)
    signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
