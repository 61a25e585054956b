"""Run before any heavy import of a command: act as a container's process 1, and start helper processes (`pid1`)."""
