"""Run a launch.

`run` prepares it, `launcher` owns it, `replica` drives one engine through its phases, `steps` holds what a start does.
"""
