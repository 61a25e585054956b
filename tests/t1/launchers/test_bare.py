"""An engine without a sandbox has its port on the host's loopback: another user's listener there gets none of its traffic."""

import os
import socket
import subprocess
import sys

import pytest

from launchers.bare import BareProcess, free_port
from launchers.client import Client

pytestmark = pytest.mark.t1
NOBODY = 65534
LISTEN = """
import os, socket, sys
os.setuid(int(sys.argv[1]))
server = socket.create_server((sys.argv[2], int(sys.argv[3])), **({"family": socket.AF_INET6, "dualstack_ipv6": True} if ":" in sys.argv[2] else {}))
print("up", flush=True)
sock, _ = server.accept()
got = sock.recv(65536)
print(len(got), flush=True)
if got:
    sock.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}")
"""


def listener(user, address, port):
    argv = [sys.executable, "-S", "-c", LISTEN, str(user), address, str(port)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_foreign_listener_at_the_engines_port_gets_neither_request_nor_key(address, caplog):
    if ":" in address and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    port = free_port()
    place = BareProcess()
    client = Client(lambda: place.connect(port), token="clients-key")
    with listener(NOBODY, address, port) as squatter:
        with pytest.raises(OSError, match="engine-port-taken"):
            client.call("GET", "/health", timeout_s=5.0)
        assert squatter.stdout.readline() == "0\n", "it received data"
    assert caplog.text.count("engine-port-taken") == 1


def test_an_engine_of_the_same_user_is_reached():
    port = free_port()
    place = BareProcess()
    with listener(os.geteuid(), "127.0.0.1", port):
        assert Client(lambda: place.connect(port)).call("GET", "/health", timeout_s=5.0) == (200, b"{}")
