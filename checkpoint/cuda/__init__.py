"""GPU state around a dump and a restore.

`checkpoint` has the order of calls, `driver` the driver's interface, `helper` the process that calls it, `gpu_locks` what
keeps two restores apart, `processes` what /proc says.
"""
