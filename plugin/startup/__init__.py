"""Run before any heavy import of a command: act as a container's process 1 (`pid1`), prefetch a snapshot's first bytes (`prefetch`)."""
