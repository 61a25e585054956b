"""A mirror of Debian on loopback, signed with a key of its own, and packages made of the CRIU that this machine has."""

import contextlib
import hashlib
import lzma
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from checkpoint.criu import self_contained
from checkpoint.criu.binary import Criu
from plugin.runtime.config import state_home

LIBRARIES = "usr/lib/x86_64-linux-gnu"


def run(*words, **more):
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=120, check=False, **more
    )
    assert done.returncode == 0, (words, done.stdout[-1000:], done.stderr[-1000:])
    return done.stdout


def package(target, name, files, version="1.0-1", depends="", compression="xz"):
    """Build a .deb in the folder `target` with dpkg-deb. `files`: path to bytes, to a file to copy, or to `-> link`."""
    tree = target / f"tree-{name}-{compression}"
    (tree / "DEBIAN").mkdir(parents=True)
    sums = []
    for path, content in files.items():
        place = tree / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            place.symlink_to(content.removeprefix("-> "))
            continue
        data = content if isinstance(content, bytes) else Path(content).read_bytes()
        place.write_bytes(data)
        place.chmod(0o755 if "bin/" in path or "ld-linux" in path else 0o644)
        sums.append(f"{hashlib.md5(data, usedforsecurity=False).hexdigest()}  {path}\n")
    (tree / "DEBIAN" / "md5sums").write_text("".join(sums))
    control = {"Package": name, "Version": version, "Architecture": "amd64", "Maintainer": "tests <t@localhost>"}
    control |= {"Depends": depends} if depends else {}
    control |= (
        {"Source": "libs-source", "Description": "of a test"}
        if name.startswith("lib")
        else {"Description": "of a test"}
    )
    (tree / "DEBIAN" / "control").write_text("".join(f"{key}: {value}\n" for key, value in control.items()))
    deb = target / f"{name}_{version.replace(':', '%3a')}_amd64.deb"
    run("dpkg-deb", "--root-owner-group", f"-Z{compression}", "-z1", "--build", tree, deb)
    return deb


def packages_of_criu(target, version="4.2.1-1"):
    """Make packages of this machine's self-contained CRIU: criu, its libraries, libgcc whose licence is that of gcc-14-base, base-files."""
    folder = Criu.find(state_home()).program.resolve().parent
    assert self_contained.loader_of(folder), "these tests need the CRIU of quickthaw setup criu"
    target.mkdir()
    libraries = {}
    for file in sorted((folder / "lib").iterdir()):
        if not file.name.startswith("libgcc_s"):
            libraries[f"{LIBRARIES}/{file.resolve().name}"] = file.resolve()
            if file.is_symlink():
                libraries[f"{LIBRARIES}/{file.name}"] = f"-> {file.resolve().name}"
    # As libc6 has them: a link of the loader's own name elsewhere, and variants for newer processors, which are not for us.
    libraries["usr/lib64/ld-linux-x86-64.so.2"] = "-> ../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    libraries[f"{LIBRARIES}/glibc-hwcaps/x86-64-v9/libc.so.6"] = b"for another processor"
    libraries["usr/share/doc/libcriulibs/copyright"] = b"see /usr/share/common-licenses/LGPL-2.1, and MIT."
    gcc = {
        f"{LIBRARIES}/libgcc_s.so.1": next((folder / "lib").glob("libgcc_s.so.1")),
        "usr/share/doc/libgcc-s1": "-> gcc-14-base",
    }
    criu = {
        "usr/sbin/criu": folder / "criu.bin",
        "usr/share/doc/criu/copyright": b"GPL-2: see /usr/share/common-licenses/GPL-2.",
        "usr/share/doc/criu/README": b"not wanted",
    }
    licences = {f"usr/share/common-licenses/{name}": name.encode() for name in ("GPL-2", "LGPL-2.1", "Artistic")}
    return [
        package(target, "criu", criu, version, "libcriulibs, libgcc-s1, python3"),
        package(target, "libcriulibs", libraries),
        package(target, "libgcc-s1", gcc, depends="gcc-14-base"),
        package(target, "gcc-14-base", {"usr/share/doc/gcc-14-base/copyright": b"GCC: GPL-3"}),
        package(target, "base-files", licences),
        package(target, "python3", {"usr/bin/python3": b"never fetched"}),
    ]


class Keys:
    """A signing key in a folder of its own, and the keyring that holds its public half."""

    def __init__(self, folder):
        self.folder, self.keyring = folder, folder / "keyring.gpg"
        folder.mkdir(mode=0o700)
        self._gpg("--quick-gen-key", "mirror@localhost", "ed25519", "sign", "never")
        self._gpg("--output", self.keyring, "--export")

    def sign(self, file, target):
        self._gpg("--yes", "--output", target, "--clearsign", file)

    def _gpg(self, *words):
        run("gpg", "--homedir", self.folder, "--batch", "--quiet", "--passphrase", "", *words)

    def close(self):
        """End the agent that gpg started."""
        run("gpgconf", "--homedir", self.folder, "--kill", "all")


def fields(deb):
    """What a Packages file says of one package."""
    data = deb.read_bytes()
    more = {"Filename": f"pool/{deb.name}", "Size": len(data), "SHA256": hashlib.sha256(data).hexdigest()}
    return run("dpkg-deb", "--field", deb).rstrip() + "\n" + "".join(f"{key}: {value}\n" for key, value in more.items())


class Mirror:
    """Serve packages as the suite `sid`. `damaged` and `held`: base names whose bytes are wrong, or that are sent halfway, then nothing."""

    def __init__(self, folder, debs, keys):
        self.folder, self.keyring = folder, keys.keyring
        self.requests, self.damaged, self.held = [], set(), set()
        self.asked, self.release = threading.Event(), threading.Event()
        index = folder / "dists" / "sid" / "main" / "binary-amd64" / "Packages.xz"
        index.parent.mkdir(parents=True)
        text = "\n".join(map(fields, debs)).encode()
        index.write_bytes(lzma.compress(text))
        (folder / "pool").mkdir()
        for deb in debs:
            (folder / "pool" / deb.name).symlink_to(deb)
        listed = "".join(
            f" {hashlib.sha256(data).hexdigest()} {len(data)} main/binary-amd64/{name}\n"
            for name, data in (("Packages", text), ("Packages.xz", index.read_bytes()))  # apt looks for both
        )
        release = folder / "dists" / "sid" / "Release"
        release.write_text(
            "Origin: tests\nSuite: unstable\nCodename: sid\nArchitectures: amd64\nComponents: main\n"
            f"Date: Sat, 01 Jan 2022 00:00:00 UTC\nSHA256:\n{listed}"
        )
        keys.sign(release, release.with_name("InRelease"))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self, directory=str(folder)))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/debian"

    def downloads(self):
        """The packages that were asked for, in order."""
        return [name for name in self.requests if name.endswith(".deb")]

    def close(self):
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, mirror, *words, **more):
        self.mirror = mirror
        super().__init__(*words, **more)

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.mirror.requests.append(name)
        self.path = self.path.removeprefix("/debian")
        if name not in self.mirror.damaged | self.mirror.held:
            with contextlib.suppress(ConnectionError):
                super().do_GET()
            return
        data = bytearray(Path(self.translate_path(self.path)).read_bytes())
        data[len(data) // 2] ^= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        held = name in self.mirror.held
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data[: len(data) // 2] if held else data)
            self.wfile.flush()
            if held:
                self.mirror.asked.set()
                self.mirror.release.wait(60)
                self.close_connection = True

    def log_message(self, *_):
        pass
