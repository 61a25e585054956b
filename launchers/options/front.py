"""Options by which an engine listens, which quickthaw's port takes over: a UNIX socket, and TLS with the user's own files.

The engine in its sandbox listens on plain HTTP. So neither these options nor the key's file are part of a snapshot.
"""

from __future__ import annotations

UDS = {"--uds": "uds"}
SSL = {
    "--ssl-keyfile": "ssl_keyfile",
    "--ssl-certfile": "ssl_certfile",
    "--ssl-ca-certs": "ssl_ca_certs",
    "--ssl-cert-reqs": "ssl_cert_reqs",
    "--ssl-ciphers": "ssl_ciphers",
    "--ssl-keyfile-password": "ssl_keyfile_password",
    "--enable-ssl-refresh": "ssl_refresh",
    "--no-enable-ssl-refresh": "ssl_refresh",
}
"""Option → the name of its value; an engine has some of them."""
SSL_FILES = frozenset(["ssl_certfile", "ssl_keyfile"])
"""Names of values of which one is needed for TLS."""
TAKEN_OVER = frozenset(["host", "port", "uds", *SSL.values()])
"""Names of values whose options the engine does not get."""
BLANKED = frozenset(["uds", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_keyfile_password"])
"""Those that an empty option turns off, where the file of `--config` has them."""
