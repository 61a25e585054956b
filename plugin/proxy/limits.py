"""How many files this process may open, which bounds its connections: each request under way needs two."""

from __future__ import annotations

import errno
import resource

_WANTED = 65535  # what vLLM and SGLang raise their own to
_RESERVED = 32  # listeners, pipes, logs, a hook, and what an import opens
SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of a connect that say something of this host, and nothing of the replica. EADDRNOTAVAIL is not among them: it
may also mean that the replica's address family is absent here.
"""


def raise_files() -> int:
    """Raise the soft limit on open files as far as the hard one and need go (shells give 1,024); the limit now.

    What this process starts from now on inherits it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft


def most_clients() -> int:
    """How many clients may be connected so that each can have a connection to a replica as well."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (1 << 30) if soft == resource.RLIM_INFINITY else max(1, (soft - _RESERVED) // 2)
