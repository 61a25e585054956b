"""Rehearse a snapshot: restore it once before anybody needs it, at the lowest priority, so that the first real restore is a fast one.

`rehearse` does it in a process of its own, `process` runs that process, `beside` decides in a launch when it may run.
"""
