"""How a launch listens: on the UNIX socket of `--uds`, over TLS with the user's files, and with the engine's keys, with snapshots."""

import contextlib
import http.client
import os
import signal
import socket
import ssl
import stat
import time
from pathlib import Path

import pytest

from tests.kits.launch_rig import call, over_unix
from tests.kits.tls_kit import Authority

pytestmark = [pytest.mark.t1, pytest.mark.timeout(180)]


def over_tls(port, authority, client=None):
    context = ssl.create_default_context(cafile=str(authority.file))
    if client:
        context.load_cert_chain(client.certificate, client.key)
    return lambda limit_s: http.client.HTTPSConnection("127.0.0.1", port, timeout=limit_s, context=context)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "tls")


def served_certificate(port, authority):
    """The subject's name of the certificate that a server shows."""
    context = ssl.create_default_context(cafile=str(authority.file))
    with (
        socket.create_connection(("127.0.0.1", port), 30) as sock,
        context.wrap_socket(sock, server_hostname="localhost") as tls,
    ):
        return dict(pair[0] for pair in tls.getpeercert()["subject"])["commonName"]


# A UNIX socket


@pytest.mark.slow
def test_a_launch_listens_on_the_engines_unix_socket(rig_of, tmp_path):
    """Cold, then restored; the file has the umask's mode, and is gone at the end."""
    rig, path, answers = rig_of("vllm"), tmp_path / "engine.sock", []
    for phase in ("warming", "restoring"):
        with rig.running(arguments=["--uds", str(path)]) as started:
            port, started.port = started.port, over_unix(path)
            answers.append(started.ask())
            assert stat.S_ISSOCK(path.stat().st_mode)
            assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~current_umask()
            assert started.ours().count(f"listening on unix:{path}") == 1
            with pytest.raises(ConnectionRefusedError):
                call(port, "GET", "/health")
            assert not any("uds" in word for word in started.facts()["worker"]["argv"])
            started.wait_for("serving (")
            assert f"quickthaw: {phase}" in started.text()
        assert not path.exists()
    assert answers[0] == answers[1]
    # The same snapshot serves at a port: how it listens is no part of an engine.
    with rig.running() as started:
        assert started.ask() == answers[0]
        assert "restoring" in started.phases()[0]
    with rig.running(rig.name, "--uds", str(path), words=("restore",)) as started:
        started.port = over_unix(path)
        assert started.ask() == answers[0]


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.slow
def test_the_socket_of_a_killed_launch_is_replaced_and_that_of_a_living_one_is_not(rig_of, tmp_path):
    rig, path = rig_of("vllm"), tmp_path / "engine.sock"
    started = rig.start("--no-snapshot", "--no-mount", arguments=["--uds", str(path)])
    try:
        started.wait_for("listening on ")
        other = rig.cli("launch", "--engine-python", rig.python, "vllm", "--model", rig.model, "--uds", path)
    finally:
        started.stop(signal.SIGKILL)
    assert other.returncode == 2
    assert f"quickthaw: socket-in-use: cannot listen on {path}; another process listens there; " in other.stderr
    assert path.exists()
    assert rig.watch.gone() == set()
    with rig.running("--no-snapshot", arguments=["--uds", str(path)]) as started:
        started.port = over_unix(path)
        started.ask()
    assert not path.exists()


@pytest.mark.slow
def test_what_is_no_socket_is_left_alone(rig_of, tmp_path):
    rig, path = rig_of("vllm"), tmp_path / "a file"
    path.write_text("kept")
    with_file = rig.cli("launch", "--engine-python", rig.python, "vllm", "--model", rig.model, "--uds", path)
    missing = tmp_path / "nowhere" / "s"
    nowhere = rig.cli("launch", "--engine-python", rig.python, "vllm", "--model", rig.model, "--uds", missing)
    assert (with_file.returncode, nowhere.returncode) == (2, 2)
    assert "socket-in-use" in with_file.stderr and "socket-in-use" in nowhere.stderr
    assert path.read_text() == "kept"


def test_a_socket_that_is_bound_and_does_not_listen_yet_is_not_replaced(rig_of, tmp_path):
    """An engine alone binds first, and listens once its model is loaded."""
    rig, path = rig_of("vllm"), tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as early:
        early.bind(str(path))
        done = rig.cli("launch", "--engine-python", rig.python, "vllm", "--model", rig.model, "--uds", path)
        assert done.returncode == 2 and "socket-in-use" in done.stderr
        assert path.exists()


# TLS


@pytest.mark.slow
def test_tls_ends_at_our_port_and_a_snapshot_holds_no_key(rig, authority):
    """Cold, then restored, with another pair, since a certificate is no part of an engine."""
    answers = []
    for name, phase in (("first", "warming"), ("second", "restoring")):
        pair = authority.pair(name)
        with rig.running(arguments=pair.arguments()) as started:
            port, started.port = started.port, over_tls(started.port, authority)
            answers.append(started.ask())
            started.wait_serving()
            assert phase in started.phases()[0], started.text()
            assert served_certificate(port, authority) == name
            assert f"listening on https://127.0.0.1:{port} " in started.ours()
            facts = started.facts()["worker"]
            assert not any("ssl" in word for word in facts["argv"])
            assert call(started.port, "GET", "/-/status")[1]["listens_at"].startswith("https://")
    assert answers[0] == answers[1]
    pair = authority.pair("third")
    with rig.running(rig.name, *pair.arguments("--enable-ssl-refresh"), words=("restore",)) as started:
        port, started.port = started.port, over_tls(started.port, authority)
        assert started.ask() == answers[0]
        assert served_certificate(port, authority) == "third"
    folder = rig.library.path(rig.name)
    lines = (authority.folder / "first-key.pem").read_text().splitlines()[1:-1]
    for file in filter(Path.is_file, folder.rglob("*")):
        assert not any(line.encode() in file.read_bytes() for line in lines), file


@pytest.mark.slow
def test_failed_handshakes_do_no_harm(rig_of, authority):
    rig = rig_of("sglang")
    with rig.running("--no-snapshot", arguments=authority.pair("server").arguments()) as started:
        port, started.port = started.port, over_tls(started.port, authority)
        answer = started.ask()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as plain:
            plain.request("GET", "/health")
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                plain.getresponse()
        with socket.create_connection(("127.0.0.1", port), 30) as garbage:
            garbage.sendall(b"\x16\x03\x01\xff\xff" + os.urandom(200))
            garbage.settimeout(30)
            with contextlib.suppress(ConnectionError):
                while garbage.recv(4096):
                    pass
        silent = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(20)]
        stranger = ssl.create_default_context()
        with socket.create_connection(("127.0.0.1", port), 30) as sock, pytest.raises(ssl.SSLError):
            stranger.wrap_socket(sock, server_hostname="localhost")
        assert started.ask() == answer
        for sock in silent:
            sock.close()
        assert started.ask() == answer


@pytest.mark.slow
def test_clients_must_show_a_certificate_if_the_engine_wants_one(rig_of, authority):
    rig = rig_of("vllm")
    more = authority.pair("server").arguments("--ssl-ca-certs", authority.file, "--ssl-cert-reqs", "2")
    with rig.running("--no-snapshot", arguments=more) as started:
        port, started.port = started.port, over_tls(started.port, authority, authority.pair("client"))
        started.ask()
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
            call(over_tls(port, authority), "GET", "/health")


@pytest.mark.slow
def test_changed_certificates_are_read_again_if_the_engine_would(rig, authority):
    """A certificate without its key changes nothing; the pair does. Connections that exist go on."""
    pair, second = authority.pair("first"), authority.pair("second")
    with rig.running("--no-snapshot", arguments=pair.arguments("--enable-ssl-refresh")) as started:
        port, started.port = started.port, over_tls(started.port, authority)
        started.ask()
        with contextlib.closing(started.port(30)) as kept:
            kept.request("GET", "/health")
            kept.getresponse().read()
            pair.certificate.write_bytes(second.certificate.read_bytes())
            started.wait_for("the certificate before stays in use")
            assert served_certificate(port, authority) == "first"
            pair.replace_by(second)
            limit = time.monotonic() + 30
            while served_certificate(port, authority) != "second":
                assert time.monotonic() < limit, started.ours()
                time.sleep(0.1)
            kept.request("GET", "/health")
            assert kept.getresponse().status == 200


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_files_that_cannot_be_used_are_refused_by_name_at_once(rig_of, authority, engine):
    rig = rig_of(engine)
    server, other, locked = authority.pair("server"), authority.pair("other"), authority.pair("locked", password="x")
    for given, words in [
        (["--ssl-certfile", server.certificate, "--ssl-keyfile", other.key], "KEY VALUES MISMATCH"),
        (["--ssl-certfile", "/nowhere.pem", "--ssl-keyfile", server.key], "/nowhere.pem, "),
        (["--ssl-keyfile", server.key], "No such file"),
        (locked.arguments(), "the key is encrypted"),
    ]:
        flag = "--model-path" if engine == "sglang" else "--model"
        done = rig.cli("launch", "--engine-python", rig.python, engine, flag, rig.model, *given)
        assert done.returncode == 2, done.stderr
        (line,) = (line for line in done.stderr.splitlines() if "tls-files" in line)
        assert line.startswith("quickthaw: tls-files: ") and words in line
    assert rig.watch.gone() == set()


@pytest.mark.slow
def test_an_encrypted_key_and_a_file_of_options(rig_of, authority):
    rig, pair = rig_of("sglang"), authority.pair("server", password="letmein")
    file = rig.folder / "engine.yaml"
    file.write_text(
        f"ssl-certfile: {pair.certificate}\nssl-keyfile: {pair.key}\nssl_keyfile_password: letmein\napi-key: the key\n"
    )
    with rig.running("--no-snapshot", arguments=["--config", str(file)]) as started:
        started.port = over_tls(started.port, authority)
        started.headers = {"Authorization": "Bearer the key"}
        started.ask()
        argv = started.facts()["worker"]["argv"]
        assert {"--ssl-certfile=", "--ssl-keyfile=", "--ssl-keyfile-password="} <= set(argv)


# Keys


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "variable", "line"),
    [
        (["--api-key", "one", "two"], "", ""),
        (["--api-key", "none", "--api-key=one"], "", ""),
        (["--api-key", "", "one"], "", ""),
        ([], "one", ""),
        (["--api-key", "one"], "another", ""),
        ([], "another", 'api-key: ["", "one"]'),
    ],
)
def test_a_vllm_with_keys_has_snapshots_wherever_they_stand(rig_of, arguments, variable, line):
    rig, answers = rig_of("vllm"), []
    if line:
        (rig.folder / "engine.yaml").write_text(f"{line}\n")
        arguments = ["--config", str(rig.folder / "engine.yaml")]
    for phase in ("warming", "restoring"):
        with rig.running(arguments=arguments, env={"VLLM_API_KEY": variable or None}) as started:
            started.headers = {"Authorization": "Bearer one"}
            answers.append(started.ask())
            started.wait_serving()
            assert phase in started.phases()[0], started.text()
            assert "no-canary" not in started.ours()
            assert call(started.port, "POST", "/v1/completions", {"prompt": "x"})[0] == 401
    assert answers[0] == answers[1]
