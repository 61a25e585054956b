"""GPU state around a dump and a restore: the order of calls (`checkpoint`), the driver (`driver`), and the process that
calls it (`helper`)."""
