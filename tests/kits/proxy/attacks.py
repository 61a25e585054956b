"""Spellings of a denied path: what a client may write so that one reader sees another path than the next.

`spellings(path)` runs against the proxy's rules (t0), the proxy in front of a toy engine (t1), and both real engines
(t2).
"""

import json
import socket
import sys


def spellings(path: str, prefix: str = "") -> list[str]:
    """Return request targets that some reader takes for `path` (with a leading slash). `prefix`: a routing prefix to
    prepend too.
    """
    first, rest = path[1], path[2:]
    escaped = "".join(f"%{ord(c):02x}" for c in path[1:])
    found = [
        path,
        f"{path}?level=2",
        f"{path}/",
        f"{path}//",
        f"{path}/.",
        f"{path}/anything",
        f"{path}/anything/..",
        f"{path}/../x",
        f"{path}%2f..%2fx",
        f"{path}/%2e%2e/x",
        f"{path};x=1",
        f"{path};/../x",
        f"{path}?/../../x",
        f"{path}%3F",
        f"{path}%3f/../x",
        f"{path}%253f/../x",
        f"{path}%23/../x",
        f"{path}%00",
        f"{path}%20",
        f"{path}%09",
        f"{path}%0d%0a",
        path.upper(),
        path.title(),
        f"/%{ord(first):02x}{rest}",
        f"/%{ord(first):02X}{rest}",
        f"/%25{ord(first):02x}{rest}",
        f"/%2525{ord(first):02x}{rest}",
        f"/{escaped}",
        f"//{path[1:]}",
        f"///{path[1:]}",
        f"/.{path}",
        f"/./.{path}",
        f"/..{path}",
        f"/%2e{path}",
        f"/%2e%2e{path}",
        f"/%252e%252e{path}",
        f"/x/..{path}",
        f"/x/%2e%2e{path}",
        f"/x/..%2f{path[1:]}",
        f"/x/%2e%2e%2f{path[1:]}",
        f"/x/%252e%252e%252f{path[1:]}",
        f"/x/..;{path}",
        f"/x;a=b/..{path}",
        f"/x%3F/..{path}",
        f"/x%3f/%2e%2e{path}",
        f"/x%23/..{path}",
        f"/%2f{path[1:]}",
        f"/%5c{path[1:]}",
        f"/\\{path[1:]}",
        f"/x\\..\\{path[1:]}",
        f"http://t{path}",
        f"HTTP://t{path}",
        f"http://t//%{ord(first):02x}{rest}",
        f"http://t:80/x/..{path}",
        f"ws://t{path}",
    ]
    if prefix:
        found += [
            f"{prefix}{path}",
            f"{prefix}{prefix}{path}",
            f"{prefix}/{path}",
            f"{prefix}/x/..{path}",
            f"{prefix}%2f{path[1:]}",
            f"/%{ord(prefix[1]):02x}{prefix[2:]}{path}",
            f"http://t{prefix}{path}",
            f"{prefix}/%2e%2e{prefix}{path}",
        ]
    return found


MATCHED_BY_PREFIX = [
    "/metricsx",
    "/metrics.txt",
    "/metrics%78",
    "/metrics-/..",
    "/%6detricsx",
    "/METRICSx",
    "/x/../metricsx",
]
"""Targets that reach what engines match by the beginning of a path: their metrics."""


def main() -> None:
    """Read requests from standard input ([method, target] as JSON), send them to a port of this network, print their
    statuses.
    """
    found = []
    for method, target in json.load(sys.stdin):
        with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=30) as sock:
            body = b"" if method == "GET" else b"{}"
            head = f"{method} {target} HTTP/1.1\r\nHost: t\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            sock.sendall(head.encode("latin-1") + body)
            found.append(int(sock.makefile("rb").readline().split()[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
